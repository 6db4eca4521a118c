"""Numbers that may differ from client to client: checked, and looked up by id.

Letters: N clients in the population, K ids.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate


def check_each(
    where: str,
    name: str,
    value: Any,
    cure: str,
    *,
    low: float,
    high: float = np.inf,
    exclude_low: bool = False,
    whole: bool = False,
) -> None:
    """Raises a `ValueError` unless `value`, a scalar or [N], is traced or finite and within its bounds everywhere."""
    if not _validate.is_concrete(value):
        return
    array = np.asarray(value)
    numbers = array.dtype.kind in ("iu" if whole else "iuf") and array.ndim <= 1 and array.size
    if numbers and np.all(np.isfinite(array)) and np.all(array <= high):
        if np.all(array > low if exclude_low else array >= low):
            return
    kind = "whole number" if whole else "finite number"
    bound = f"above {low:g}" if exclude_low else f"of at least {low:g}"
    if np.isfinite(high):
        bound = f"in [{low:g}, {high:g}]"
    shown = value if array.ndim == 0 else f"{array.dtype}{list(array.shape)}"
    raise ValueError(f"{where}({name}={shown}): {name} must be a {kind} {bound}, or one for each client [N]; {cure}.")


def check_length(where: str, name: str, value: Any, count: int) -> None:
    """Raises a `ValueError` if `value` is [N] and N is not `count`, the population's number of clients."""
    if np.ndim(value) and np.shape(value)[0] != count:
        raise ValueError(
            f"{where}({name} of shape {np.shape(value)}): the population has {count} clients; give one number for all, "
            "or one for each."
        )


def of_client(value: Any, ids: jax.Array) -> jax.Array:
    """`value`, a scalar or [N], of the clients `ids` [K]: float32 [] or [K]; NaN past the end.

    >>> print(of_client(2.0, jnp.arange(3)), of_client([1.0, 5.0], jnp.array([1, 0, 2])))
    2.0 [ 5.  1. nan]
    """
    value = jnp.asarray(value, jnp.float32)
    return value if value.ndim == 0 else jnp.take(value, ids, mode="fill", fill_value=jnp.nan)
