"""Client maps: how the work of one client is run for a whole cohort.

`vectorised` trains all clients side by side until the longest is done: the reference, and the
differentiable one. `lanes` keeps a fixed number of model copies alive and gives each that falls
free the longest client still waiting (list scheduling, longest first: Graham 1969), inside the
compiled program, so that time follows the work there is and memory the number of lanes. `sharded`
deals clients to the devices of a mesh and runs either of the two on each.

A round's result does not depend on which is used, up to the order of float additions.

Letters: C clients in the cohort, L lanes, n devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jfed import _validate, tree
from jfed import mesh as meshes
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
        kept, added = jax.vmap(work.finish, (None, 0, 0))(shared, clients, carry)
        return kept, jax.tree.map(lambda a: jnp.sum(a, 0, dtype=a.dtype), added)

    return map_fn


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


def sharded(mesh: Mesh, inner: ClientMap, *, axis: str = "clients") -> ClientMap:
    """Deals the clients to the devices along one mesh axis and sums what they add with one `psum`.

    Clients are dealt longest first, back and forth over the devices, so that each device gets
    nearly the same number of local steps. `shared` is the same on every device: a state or population
    put there beforehand, with `jfed.mesh.replicate`, is not copied, nor a program compiled, again.

    Args:
      mesh: from `jfed.mesh.make`; may span processes.
      inner: the client map each device runs, such as `lanes(16)`.
      axis: name of the mesh axis.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"sharded(axis={axis!r}): the mesh has axes {mesh.axis_names}; name one of them.")
    n = mesh.shape[axis]

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        count = clients.ids.shape[0]
        rounds = -(-count // n)
        # Row d of `deal` is the hand of device d; a place past the cohort is a slot left empty.
        deal = jnp.arange(rounds * n).reshape(rounds, n)
        deal = jnp.where(jnp.arange(rounds)[:, None] % 2 == 0, deal, deal[:, ::-1]).T.reshape(-1)
        queue = jnp.argsort(clients.steps, descending=True, stable=True)
        hand = queue[jnp.minimum(deal, count - 1)]
        real = deal < count
        dealt = tree.take(clients, hand)
        dealt = dealt._replace(steps=jnp.where(real, dealt.steps, 0), state=(dealt.state, real))

        @meshes.shard_map(mesh=mesh, in_specs=(P(), P(axis)), out_specs=(P(axis), P()))
        def on_each_device(shared, dealt):
            kept, added = inner(_only_real(work), shared, dealt)
            return kept, lax.psum(added, axis)

        kept, added = on_each_device(shared, dealt)
        place = (
            jnp.zeros(count, jnp.int32)
            .at[jnp.where(real, hand, count)]
            .set(jnp.arange(rounds * n, dtype=jnp.int32), mode="drop")
        )
        return tree.take(kept, place), added

    return map_fn


def _only_real(work: ClientWork) -> ClientWork:
    """`work` for clients whose state is `(state, real)`: one that is not real adds nothing."""

    def plain(client: Cohort) -> Cohort:
        return client._replace(state=client.state[0])

    def finish(shared, client, carry):
        kept, added = work.finish(shared, plain(client), carry)
        return kept, tree.select(client.state[1], added, jax.tree.map(jnp.zeros_like, added))

    return ClientWork(
        steps=work.steps,
        start=lambda shared, client: work.start(shared, plain(client)),
        step=lambda shared, client, carry, t: work.step(shared, plain(client), carry, t),
        finish=finish,
    )


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
