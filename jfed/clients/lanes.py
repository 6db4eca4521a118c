"""A fixed number of clients at once; a lane that falls free takes the longest client still waiting.

This is list scheduling, longest first (Graham 1969), inside the compiled program: time follows the
work there is and memory the number of lanes.

Letters: C clients in the cohort, L lanes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _validate, tree
from jfed.core import ClientMap, ClientWork, Cohort, Tree


def lanes(width: int) -> ClientMap:
    """At most `width` clients at once; a lane that falls free takes the longest one waiting.

    Guarantees:
      * Memory holds `width` carries, one sum of `added`, and `kept`, whatever the cohort.
      * `finish` and `start` run only in steps in which some lane is done (under an outer `vmap`
        they run in every step, since a batched condition takes both branches).
      * Clients without steps cost no local step.

    Reverse-mode differentiation through it is not defined; use `vectorised(max_steps=...)`.

    Args:
      width: lanes, L. More keep an accelerator busier and need more memory; convolutions on CPU
        are fastest with 1.

    Raises:
      ValueError: if `width` is not a whole number of at least 1.
    """
    _validate.at_least_one("lanes", "width", width, "a good start is 16")

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        count = clients.ids.shape[0]
        lane_count = min(width, count)
        queue = jnp.argsort(clients.steps, descending=True, stable=True)
        working = jnp.sum(clients.steps > 0)  # these head the queue
        start = _over_lanes(work.start, (None, 0), lane_count)
        step = _over_lanes(work.step, (None, 0, 0, 0), lane_count)
        finish = _over_lanes(work.finish, (None, 0, 0), lane_count)

        def client_at(place):
            return tree.take(clients, queue[jnp.minimum(place, count - 1)])

        def settle(sums, place, done, carry):
            """Adds the results of the lanes that are done."""
            kept, added = sums
            client_kept, client_added = finish(shared, client_at(place), carry)
            row = jnp.where(done, queue[jnp.minimum(place, count - 1)], count)
            nothing = jax.tree.map(jnp.zeros_like, client_added)
            client_added = tree.select(done, client_added, nothing)
            added = jax.tree.map(lambda s, a: s + jnp.sum(a, 0, dtype=a.dtype), added, client_added)
            return tree.put(kept, row, client_kept), added

        def advance(loop):
            place, t, carry, waiting, sums = loop
            client = client_at(place)
            carry = step(shared, client, carry, t)
            t = t + 1
            done = (place < working) & (t >= client.steps)
            next_place = jnp.where(done, waiting + jnp.cumsum(done) - 1, place)

            def turn_over(carry_and_sums):
                carry, sums = carry_and_sums
                sums = settle(sums, place, done, carry)
                fresh = start(shared, client_at(next_place))
                return tree.select(done, fresh, carry), sums

            carry, sums = lax.cond(jnp.any(done), turn_over, lambda x: x, (carry, sums))
            return next_place, jnp.where(done, 0, t), carry, waiting + jnp.sum(done), sums

        def settle_idle(loop):
            first, sums = loop
            place = first + jnp.arange(lane_count)
            carry = start(shared, client_at(place))
            return first + lane_count, settle(sums, place, place < count, carry)

        place = jnp.arange(lane_count)
        carry = start(shared, client_at(place))
        kept, added = jax.eval_shape(finish, shared, client_at(place), carry)
        one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), (kept, added))
        sums = tree.zeros(one[0], (count,)), tree.zeros(one[1])
        loop = place, jnp.zeros(lane_count, jnp.int32), carry, jnp.asarray(lane_count), sums
        *_, sums = lax.while_loop(lambda loop: jnp.any(loop[0] < working), advance, loop)
        # Clients with no step to do: nothing to train, but the law counts them too.
        _, sums = lax.while_loop(lambda loop: loop[0] < count, settle_idle, (working, sums))
        return sums

    return map_fn


def _over_lanes(function: Callable, in_axes: tuple, width: int) -> Callable:
    """`jax.vmap`, except that a single lane runs the function itself.

    A batch axis of one still turns convolutions with a kernel per client into grouped ones, which
    compilers run slowly.
    """
    if width > 1:
        return jax.vmap(function, in_axes)

    def single(*args):
        args = [a if axis is None else jax.tree.map(lambda x: x[0], a) for a, axis in zip(args, in_axes, strict=True)]
        return jax.tree.map(lambda x: jnp.asarray(x)[None], function(*args))

    return single
