"""Every test sees eight CPU devices, and an array shape that merely happens to broadcast is an error."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile hundreds of tiny programs and run each a few times.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
# Most of the time goes into compiling, so what was compiled is kept for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/jfed-tests-{os.getuid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")


def group_of(item):
    """What a test says it shares programs with, if it does."""
    return next((mark.args[0] for mark in item.iter_markers("xdist_group")), "")


def pytest_collection_modifyitems(items):
    """Of a module, tests that share programs follow one another."""
    places = {path: i for i, path in reversed(list(enumerate(item.path for item in items)))}
    items.sort(key=lambda item: (places[item.path], group_of(item)))


def pytest_runtest_teardown(item, nextitem):
    """A process that keeps thousands of compiled programs runs out of memory mappings."""
    if nextitem is None or (item.path, group_of(item)) != (nextitem.path, group_of(nextitem)):
        jax.clear_caches()
