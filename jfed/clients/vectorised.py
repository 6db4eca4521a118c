"""All clients side by side: the reference for every other map, and the differentiable one."""

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _validate, tree
from jfed.core import ClientMap, ClientWork, Cohort, Tree


def vectorised(*, max_steps: int | None = None) -> ClientMap:
    """All clients side by side, each masked once it is done.

    Memory is C models; time is C times the longest client's steps.

    Args:
      max_steps: a static bound on local steps. With it the map is a scan and can be differentiated in
        reverse; without it the longest client decides, at run time. It must not be below the
        longest client's steps: where those are traced, a longer client would be cut short.

    Raises:
      ValueError: if `max_steps` is not a whole number of at least 1, or is known to be too low.
    """
    if max_steps is not None:
        _validate.at_least_one("vectorised", "max_steps", max_steps, "leave it out to run every client to its end")

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        if max_steps is not None and _validate.is_concrete(clients.steps):
            longest = int(jnp.max(clients.steps, initial=0))
            if longest > max_steps:
                raise ValueError(
                    f"vectorised(max_steps={max_steps}): a client of this cohort does {longest} steps; "
                    f"raise max_steps to {longest}, or lower the clients' steps."
                )
        carry = jax.vmap(work.start, (None, 0))(shared, clients)
        step = jax.vmap(work.step, (None, 0, 0, None))

        def advance(t, carry):
            return tree.select(t < clients.steps, step(shared, clients, carry, t), carry)

        if max_steps is None:
            longest = jnp.max(clients.steps, initial=0)
            carry = lax.fori_loop(0, longest, advance, carry)
        else:
            carry, _ = lax.scan(lambda c, t: (advance(t, c), None), carry, jnp.arange(max_steps))
        results = jax.vmap(work.finish, (None, 0, 0))(shared, clients, carry)
        present = (clients.steps > 0) | (clients.weight != 0)
        kept, added = tree.select(present, results, jax.tree.map(jnp.zeros_like, results))
        return kept, tree.total(added)

    return map_fn
