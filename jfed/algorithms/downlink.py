"""Compressing what the server sends: changes of the model, made up for later where they were left out.

Letters: N clients, C clients in a cohort; t the round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _streams, _validate, compress, tree
from jfed.algorithms.federated import FederatedState
from jfed.compress.feedback import EF21State
from jfed.core import Algorithm, Cohort, Tree


class DownlinkState(NamedTuple):
    """State of a method whose server sends compressed changes."""

    model: FederatedState  # of the method; its params are the server's
    sender: EF21State  # its `known` is the model as clients have it
    held: jax.Array  # [N] int32, rounds whose changes a client has been sent; -1 before its first


def compressed_downlink(
    algorithm: Algorithm,
    compressor: optax.GradientTransformation,
    *,
    num_clients: int,
    whole: optax.GradientTransformation | None = None,
    refuse: bool = True,
) -> Algorithm:
    """A method whose clients are sent C(w - known), the change of the model since what they know, and not the model.

    What was left out of a change is part of the next: `known` follows the server's model as `compress.ef21` follows
    a gradient. Clients train from `known`, and the server applies what comes back to its own model. With `ternary` both
    ways this is Sattler et al. 2019 (arXiv:1903.02891, Algorithm 2).

    A client that stayed away for some rounds is sent all the changes it missed or, where that is less, and the first
    time, the model; that is what `"traffic"` counts (their section V-D).

    Guarantees:
      * With a compressor that leaves nothing out it is the method itself, up to rounding.
      * A client whose id is not below `num_clients` is dropped.

    Args:
      algorithm: a method whose state is a `FederatedState`.
      compressor: a contraction of `jfed.compress`, such as `quantize(8, rounding="nearest")`.
      num_clients: N.
      whole: what the model is sent by, which must leave nothing out of it, such as `compress.nonzeros` of a pruned one;
        by default it is sent as it is.
      refuse: whether to refuse what is no contraction.

    Raises:
      ValueError: if `num_clients` is not a whole number of at least 1; at `init`, if the method's state is another
        than `FederatedState`; at `round`, as `compress.ef21`.
    """
    _validate.at_least_one("compressed_downlink", "num_clients", num_clients, "it is the number of clients")
    follow = compress.ef21(compressor, refuse=refuse)

    def init_fn(params: Tree) -> DownlinkState:
        model = algorithm.init(params)
        if not isinstance(model, FederatedState):
            raise ValueError(
                f"compressed_downlink(algorithm): its state is a {type(model).__name__}; methods over "
                "algorithms.federated keep it in a FederatedState, and can be sent as changes."
            )
        sender = follow.init(model.params)._replace(known=jax.tree.map(jnp.copy, model.params))
        return DownlinkState(model, sender, jnp.full(num_clients, -1, jnp.int32))

    def round_fn(state: DownlinkState, cohort: Cohort, key: jax.Array) -> tuple[DownlinkState, dict]:
        w, t = state.model.params, state.model.round
        drawn = jax.random.fold_in(key, _streams.DOWNLINK)
        message, sender = follow.update(w, state.sender, w, key=drawn, round=t)
        here = cohort.ids < num_clients
        cohort = cohort._replace(weight=jnp.where(here | (cohort.weight == 0), cohort.weight, jnp.nan))
        model, metrics = algorithm.round(state.model._replace(known=sender.known), cohort, key)

        traffic, dense = metrics["traffic"], tree.number_of_bytes(tree.nbytes(w))
        model_bytes = dense if whole is None else tree.number_of_bytes(_size(whole, w))
        change = tree.number_of_bytes(compress.nbytes(message))
        held = jnp.where(here, tree.take(state.held, cohort.ids), -1)
        missed = (t + 1 - held).astype(change.dtype)
        # Compared before they are multiplied, which might be more than uint32 holds.
        few = (held >= 0) & (missed <= model_bytes // max(change, change.dtype.type(1)))
        there = traffic.down > 0
        down = traffic.down - dense + jnp.where(few, missed * change, model_bytes)
        row = jnp.where(there, cohort.ids, num_clients)
        after = DownlinkState(model._replace(known=()), sender, tree.put(state.held, row, jnp.full_like(row, t + 1)))
        return after, metrics | {"traffic": traffic._replace(down=jnp.where(there, down, traffic.down))}

    personal = algorithm.personal
    return Algorithm(
        init_fn,
        round_fn,
        lambda state: algorithm.params(state.model),
        # A client merges what is its own with what it knows.
        None if personal is None else lambda state, i: personal(state.model._replace(params=state.sender.known), i),
    )


def _size(link: optax.GradientTransformation, params: Tree) -> int:
    message = jax.eval_shape(lambda params: link.update(params, link.init(params), params)[0], params)
    return compress.nbytes(message)
