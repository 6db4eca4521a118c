"""A fixed number of clients at once; a lane that falls free takes the longest client still waiting.

This is list scheduling, longest first (Graham 1969), inside the compiled program: time follows the
work there is and memory the number of lanes.

Letters: C clients in the cohort, L lanes.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _validate, tree
from jfed.clients.width import choose, over_lanes
from jfed.core import ClientMap, ClientWork, Cohort, Tree


def lanes(width: int | Literal["auto"]) -> ClientMap:
    """At most `width` clients at once; a lane that falls free takes the longest one waiting.

    Guarantees:
      * Memory holds `width` carries, one sum of `added`, and `kept`, whatever the cohort.
      * `finish` and `start` run for a quarter of the lanes at a time, and only as often as there are
        lanes done: a heavy uplink costs by the client, not by the step (under an outer `vmap` whose
        axis reaches the clients' steps, they run in every step).
      * Clients without steps cost no local step, absent ones (no weight either) nothing at all.

    Reverse-mode differentiation through it is not defined; use `vectorised(max_steps=...)`.

    Args:
      width: lanes, L. More keep an accelerator busier and need more memory; one is usually best on a
        CPU, with a device for each core (`jfed.mesh.use_cores`). "auto" measures a few steps at a few
        widths when a program is first compiled and takes the fastest that fits the memory; the choice
        is remembered on this machine; a run to be resumed elsewhere to the same bits needs a number.
        `jfed.clients.explain` shows what each width costs.

    Raises:
      ValueError: if `width` is neither "auto" nor a whole number of at least 1.
    """
    if width != "auto":
        _validate.at_least_one("lanes", "width", width, "a good start is 16, and 'auto' measures")

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        count = clients.ids.shape[0]
        lane_count = min(choose(work, shared, clients) if width == "auto" else width, count)
        step = work.step if lane_count == 1 else jax.vmap(work.step, (None, 0, 0, 0))
        some = max(lane_count // 4, 1)  # lanes that turn over at once
        start = over_lanes(work.start, (None, 0), some)
        finish = over_lanes(work.finish, (None, 0, 0), some)

        # The queue: longest first; then those that only report, done as soon as a lane takes them; absent
        # ones last, and never looked at.
        present = clients.weight != 0
        queue = jnp.argsort(jnp.where(clients.steps > 0, clients.steps, present - 1), descending=True, stable=True)
        waiting = jnp.sum(present | (clients.steps > 0))

        def row_at(place):
            """The client at a place of the queue; `count`, nobody, past its end."""
            return jnp.where(place < waiting, queue[jnp.minimum(place, count - 1)], count)

        def settle(sums, row, client, carry):
            """Adds the results of a few clients; a row of `count` is nobody."""
            kept, added = sums
            client_kept, client_added = finish(shared, client, carry)
            nothing = jax.tree.map(jnp.zeros_like, client_added)
            client_added = tree.select(row < count, client_added, nothing)
            added = jax.tree.map(jnp.add, added, tree.total(client_added))
            return tree.put(kept, row, client_kept), added

        def train(shared, row, client, t, carry):
            """Runs all lanes until one of them, or more, is done."""

            def done(t):
                return (row < count) & (t >= client.steps)

            t, carry = lax.while_loop(
                lambda loop: ~jnp.any(done(loop[0])),
                lambda loop: (loop[0] + 1, step(shared, client, loop[1], loop[0])),
                (t, carry),
            )
            return done(t), carry, t

        if lane_count == 1:  # no lane axis within the loop: XLA would copy the carry in every step
            train = over_lanes(train, (None, 0, 0, 0, 0), 1)

        def advance(loop):
            """Trains until some lane is done, settles some that are and gives them their next clients."""
            (row, client, t, carry), first, sums = loop
            done, carry, t = train(shared, row, client, t, carry)
            lane = jnp.nonzero(done, size=some, fill_value=lane_count)[0]
            lane_state = row, client, t, carry
            row, client, _, carry = lane_state if some == lane_count else tree.take(lane_state, lane)
            sums = settle(sums, jnp.where(lane < lane_count, row, count), client, carry)
            row = row_at(first + jnp.arange(some))
            client = tree.take(clients, row)
            fresh = row, client, jnp.zeros(some, jnp.int32), start(shared, client)
            lane_state = fresh if some == lane_count else tree.put(lane_state, lane, fresh)
            return lane_state, first + jnp.sum(lane < lane_count), sums

        row = row_at(jnp.arange(lane_count))
        client = tree.take(clients, row)
        carry = over_lanes(work.start, (None, 0), lane_count)(shared, client)
        kept, added = jax.eval_shape(work.finish, shared, *tree.take((client, carry), 0))
        sums = tree.zeros(kept, (count,)), tree.zeros(added)
        loop = (row, client, jnp.zeros(lane_count, jnp.int32), carry), jnp.asarray(lane_count), sums
        *_, sums = lax.while_loop(lambda loop: jnp.any(loop[0][0] < count), advance, loop)
        return sums

    return map_fn
