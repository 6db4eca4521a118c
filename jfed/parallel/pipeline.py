"""Pipelines: blocks are dealt to devices, and microbatches go from device to device by a schedule.

A schedule is data (`jfed.parallel.schedules`), and one executor runs any: a loop over its ticks, in which every device
does what the table says and then sends what it has made to both neighbours. All devices run one program.
Activations lie in slots that the table determines, so memory is bounded by the schedule: a 1F1B pipeline keeps no
more of a hundred microbatches than of a few.

    accumulated      gradients of all microbatches are added up, of one set of weights: exact
    stashed          PipeDream: weights change after every microbatch, each is differentiated at those it has seen

Source: Huang et al. 2019 (arXiv:1811.06965), Narayanan et al. 2019 (doi:10.1145/3341301.3359646) and 2021
(arXiv:2104.04473), Qi et al. 2023 (arXiv:2401.10241).

Letters: p devices, v chunks a device, l blocks a chunk, m microbatches of b examples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jfed._axis import permute
from jfed.core import Tree
from jfed.parallel import _slots
from jfed.parallel._phases import phases
from jfed.parallel._workers import wide
from jfed.parallel.layered import Functions, Parts
from jfed.parallel.schedules import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Schedule


class Weights(NamedTuple):
    """How a device's parameters live through a schedule; parts are its own, its blocks those of all its chunks."""

    init: Callable  # (what the program is given, slots of microbatches under way) -> state
    forward: Callable  # (state, slot) -> (parts, state), at a microbatch's forward tick
    backward: Callable  # (state, slot) -> parts, at its backward ticks
    learn: Callable  # (state, gradient) -> state
    result: Callable  # state -> what the pipeline returns


class Gradient(NamedTuple):
    """What one tick has found out; what is None is not of its concern."""

    enter: Tree | None = None
    blocks: Tree | None = None  # a list of l trees
    leave: Tree | None = None
    chunk: Any = 0  # of the blocks


class _Carry(NamedTuple):
    """What a device has between two ticks."""

    inputs: Tree  # leaves [slots, b, ...]
    kept: list
    gradients: Tree
    waiting: list
    weights: Tree
    loss: jax.Array  # [] float32
    onward: Tree  # what it sends after the tick, to the next stage and to the one before
    back: Tree


def accumulated() -> Weights:
    """Gradients of all microbatches, added up in float32 or better; the state is `(parts, total)`."""

    def init_fn(parts: Parts, slots: int) -> tuple[Parts, Parts]:
        del slots
        return parts, jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), parts)

    def learn_fn(state: tuple[Parts, Parts], gradient: Gradient) -> tuple[Parts, Parts]:
        parts, total = state

        def add(so_far, found):
            return so_far if found is None else jax.tree.map(lambda s, g: s + g.astype(s.dtype), so_far, found)

        blocks = total.blocks
        for j, found in enumerate(gradient.blocks or ()):
            blocks = jax.tree.map(lambda s, g, j=j: s.at[gradient.chunk, j].add(g.astype(s.dtype)), blocks, found)
        return parts, Parts(add(total.enter, gradient.enter), blocks, add(total.leave, gradient.leave))

    return Weights(
        init_fn, lambda state, slot: (state[0], state), lambda state, slot: state[0], learn_fn, lambda state: state[1]
    )


def stashed(optimizer: optax.GradientTransformation, summed: Callable) -> Weights:
    """Weights that a step changes after every microbatch, each differentiated at those its forward tick has seen.

    Entrance, blocks and exit have an optimizer each, which sees a device's own part; there is one chunk.

    Args:
      optimizer: one that acts number by number.
      summed: `(gradient, which) -> gradient` over all devices with other examples of the microbatch; which is 0, 1 or 2
        for the entrance, the blocks and the exit.

    Returns:
      Weights whose state is `(parts, states, stash)`, and whose result is `(parts, states)`.
    """

    def init_fn(given: tuple[Parts, Parts], slots: int) -> tuple:
        parts, states = given
        seen = (parts.enter, parts.blocks)  # an exit's forward and backward passes are of one tick
        return parts, states, jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), seen)

    def forward_fn(state: tuple, slot: jax.Array) -> tuple[Parts, tuple]:
        parts, states, stash = state
        return parts, (parts, states, _put(stash, slot, (parts.enter, parts.blocks)))

    def backward_fn(state: tuple, slot: jax.Array) -> Parts:
        parts, _, stash = state
        return Parts(*_get(stash, slot), parts.leave)

    def learn_fn(state: tuple, gradient: Gradient) -> tuple:
        parts, states, stash = list(state[0]), list(state[1]), state[2]
        blocks = gradient.blocks
        if blocks is not None:
            blocks = jax.tree.map(lambda *rows: jnp.stack(rows)[None], *blocks)
        for which, found in enumerate((gradient.enter, blocks, gradient.leave)):
            if found is not None:
                found = jax.tree.map(lambda g, x: g.astype(x.dtype), summed(found, which), parts[which])
                updates, states[which] = optimizer.update(found, states[which], parts[which])
                parts[which] = optax.apply_updates(parts[which], updates)
        return Parts(*parts), Parts(*states), stash

    return Weights(init_fn, forward_fn, backward_fn, learn_fn, lambda state: state[:2])


def run(
    functions: Functions,
    schedule: Schedule,
    weights: Weights,
    *,
    axis_name: str,
    recompute: bool,
    fill: float = 0.0,
) -> Callable:
    """The program of one device: `(given, batch, scale) -> (loss, result)`.

    Args:
      functions: the model.
      schedule: its table, of as many devices as the axis has.
      weights: how parameters live.
      axis_name: the axis of stages.
      recompute: keep the input of each stage only, and compute the rest again for the gradient.
      fill: what slots and messages hold that mean nothing; NaN shows whether any is used.

    Returns:
      A function of what weights start from (parts, blocks [v, l, ...]), a batch [m, b, ...], and the factor of each
      loss. The loss is summed over examples, on the device that has the last stage; on others it is 0.
    """
    slots = _slots.assigned(schedule)
    tables = [jnp.asarray(x) for x in (schedule.op, schedule.chunk, schedule.microbatch, *slots[:-1])]
    p, v = schedule.op.shape[1], schedule.chunks
    forth, back = [(r, (r + 1) % p) for r in range(p)], [(r, (r - 1) % p) for r in range(p)]

    def program(given: Any, batch: Tree, scale: float) -> tuple[jax.Array, Any]:
        device = lax.axis_index(axis_name)
        start = weights.init(given, slots.counts[1] + 1)
        parts = weights.forward(start, 0)[0]
        count = jax.tree.leaves(parts.blocks)[0].shape[1]

        def stage(blocks, h):
            for block in blocks:
                h = functions.block(block, h)
            return h

        def chunk_of(parts, chunk):
            own = jax.tree.map(lambda x: x[0] if v == 1 else x[chunk], parts.blocks)
            return [jax.tree.map(lambda x, j=j: x[j], own) for j in range(count)]

        def part(i):
            return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batch)

        sample = jax.eval_shape(lambda: functions.enter(parts.enter, part(0)))
        if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(sample)):
            raise ValueError(
                f"pipeline: {sample} passes between blocks; it has gradients, so all of it must be floating."
            )
        phase = phases(stage, jax.eval_shape(lambda: chunk_of(parts, 0)), sample, recompute=recompute)
        if p > 1:
            _refuse_permutes(functions.enter, parts.enter, part(0))
            _refuse_permutes(stage, chunk_of(parts, 0), sample)
            _refuse_permutes(functions.leave, parts.leave, sample, part(0))
        nothing = _filled(sample, fill)
        inputs, kept, gradients, waiting = (
            _filled(jax.tree.map(lambda x, n=n: jax.ShapeDtypeStruct((n + 1, *x.shape), x.dtype), shapes), fill)
            for n, shapes in zip(slots.counts, (sample, phase.kept, sample, phase.waiting), strict=True)
        )
        carry = _Carry(inputs, kept, gradients, waiting, start, jnp.zeros((), jnp.float32), nothing, nothing)

        def tick(carry: _Carry, row: list) -> tuple[_Carry, None]:
            op, chunk, i, *places = (jnp.take(x, device) for x in row)
            of_input, of_kept, of_gradient, of_waiting, got_input, got_gradient = places
            first, last = (device == 0) & (chunk == 0), (device == p - 1) & (chunk == v - 1)

            def forward(carry):
                now, state = weights.forward(carry.weights, of_kept)
                h = lax.cond(first, lambda: functions.enter(now.enter, part(i)), lambda: _get(carry.inputs, of_input))
                y, keep = phase.forward(chunk_of(now, chunk), h)
                # The last stage's output stands in its gradient's place until its backward tick.
                held = _once(last, lambda slots: _put(slots, of_gradient, y), carry.gradients)
                return carry._replace(
                    kept=_put(carry.kept, of_kept, keep), gradients=held, weights=state, onward=y, back=nothing
                )

            def from_above(carry, then):
                """The gradient of this stage's output, which the last stage has from the loss, and learns by it."""

                def of_loss(found):
                    y, state, loss = found

                    def total(leave, y):
                        losses = functions.leave(leave, y, part(i))
                        return jnp.sum(losses.astype(jnp.float32)) * scale

                    value, (of_leave, dy) = jax.value_and_grad(total, (0, 1))(then.leave, y)
                    return dy, weights.learn(state, Gradient(leave=of_leave)), loss + value

                found = _get(carry.gradients, of_gradient), carry.weights, carry.loss
                dy, state, loss = _once(last, of_loss, found)
                return dy, carry._replace(weights=state, loss=loss)

            def to_below(carry, then, dh):
                """What is sent back, by which the first stage's entrance learns instead."""

                def entered(state):
                    _, pull = jax.vjp(lambda enter: functions.enter(enter, part(i)), then.enter)
                    return weights.learn(state, Gradient(enter=pull(dh)[0]))

                state = _once(first, entered, carry.weights)
                return carry._replace(weights=state, onward=nothing, back=dh)

            def learned(carry, found):
                return carry._replace(weights=weights.learn(carry.weights, Gradient(blocks=found, chunk=chunk)))

            def backward(carry):
                then = weights.backward(carry.weights, of_kept)
                dy, carry = from_above(carry, then)
                found, dh = phase.backward(chunk_of(then, chunk), _get(carry.kept, of_kept), dy)
                return learned(to_below(carry, then, dh), found)

            def input_gradient(carry):
                then = weights.backward(carry.weights, of_kept)
                dy, carry = from_above(carry, then)
                dh, wait = phase.input_gradient(chunk_of(then, chunk), _get(carry.kept, of_kept), dy)
                return to_below(carry, then, dh)._replace(waiting=_put(carry.waiting, of_waiting, wait))

            def weight_gradient(carry):
                then = weights.backward(carry.weights, of_kept)
                kept, waiting = _get(carry.kept, of_kept), _get(carry.waiting, of_waiting)
                silent = carry._replace(onward=nothing, back=nothing)
                return learned(silent, phase.weight_gradient(chunk_of(then, chunk), kept, waiting))

            # Each sets both messages, so that none is sent before the work of a tick is done, whichever it is: a device
            # would then wait for another's before it begins its own.
            for number, work in (
                (FORWARD, forward),
                (BACKWARD, backward),
                (INPUT_GRADIENT, input_gradient),
                (WEIGHT_GRADIENT, weight_gradient),
            ):
                if (schedule.op == number).any():
                    carry = _once(op == number, work, carry)
            inputs = _put(carry.inputs, got_input, _sent(carry.onward, axis_name, forth))
            gradients = _put(carry.gradients, got_gradient, _sent(carry.back, axis_name, back))
            return carry._replace(inputs=inputs, gradients=gradients), None

        end, _ = lax.scan(tick, carry, tables)
        return end.loss, weights.result(end.weights)

    return program


def _refuse_permutes(f: Callable, *given: Any) -> None:
    """XLA:CPU's permutes wait for all devices of the program, of which some are at work on something else."""
    if "ppermute" in str(jax.make_jaxpr(f)(*given)):
        raise ValueError(
            "pipeline: the model sends by permutes (ring or zigzag attention, overlap=True), and while it does other "
            "stages do something else: messages would go astray; take all_to_all_attention, or overlap=False."
        )


def _once(condition: jax.Array, f: Callable, carry: Any) -> Any:
    """`f(carry)` where the condition holds, else `carry`.

    A loop of no turns or one, since XLA changes a loop's arrays in place and copies those of a `cond`.
    """
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), f(c[1])), (condition, carry))[1]


def _sent(tree: Tree, axis_name: str, pairs: list) -> Tree:
    return jax.tree.map(lambda x: permute(x, axis_name, pairs), tree)


def _filled(shapes: Tree, fill: float) -> Tree:
    def one(x):
        return jnp.full(x.shape, fill if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)

    return jax.tree.map(one, shapes)


def _get(slots: Tree, place: jax.Array) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, keepdims=False), slots)


def _put(slots: Tree, place: jax.Array, values: Tree) -> Tree:
    return jax.tree.map(lambda s, x: lax.dynamic_update_index_in_dim(s, x, place, 0), slots, values)
