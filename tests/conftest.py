"""Every test sees eight CPU devices, and an array shape that merely happens to broadcast is an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile hundreds of tiny programs and run each a few times.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
