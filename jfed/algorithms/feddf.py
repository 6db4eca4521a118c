"""FedDF: models of several kinds, fused by what all clients' models say about public examples.

The server averages what comes back within a kind, as FedAvg does, and then trains each kind's model to
agree with the mean of all clients' models on unlabelled examples (Lin et al. 2020, arXiv:2006.07242).

Letters: N clients, K kinds of model, P public examples, S of them used in a round.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jfed import _streams, tree
from jfed.algorithms._kinds import ByKind, Kind, check, init_of, only, public_rows, together, train
from jfed.algorithms._work import specialised
from jfed.core import Algorithm, Cohort, Tree


def feddf(
    kinds: Sequence[Kind],
    *,
    kind_of: Sequence[int],
    public: jax.Array,
    public_size: int,
    distill: optax.GradientTransformation,
    distill_epochs: int = 1,
    distill_batch: int = 64,
    **options,
) -> Algorithm:
    """FedAvg within each kind of model, then ensemble distillation across all of them, on the server.

    The target is the softmax of the clients' mean scores (AVGLOGITS), by weight; the loss its
    Kullback-Leibler divergence. With `distill_epochs=0` and one kind it is FedAvg.

    `init` takes a tuple of params, one for each kind. `params` is the model of the first kind;
    `personal(state, i)` that of client i's kind, i known outside a compiled program.

    `public` becomes a constant of the compiled program: some thousands of examples. All kinds must count the
    same local steps for a client.

    Args:
      kinds: the K kinds.
      kind_of: [N] kind of every client.
      public: [P, ...] inputs, unlabelled.
      public_size: S.
      distill: the optimizer on the server, anew each round; the paper's is Adam at 0.001.
      distill_epochs: passes over the S examples; 0 distils nothing.
      distill_batch: examples a step of it; must divide S.
      **options: `uplink`, `client_map` and `num_clients` of `federated`.

    Raises:
      ValueError: if `kind_of` names a kind there is not, or a kind has no client; if S is more than P, or the batch
        does not divide it.
    """
    public = jnp.asarray(public)
    kind_of = check("feddf", kinds, kind_of, public, public_size, distill_epochs, distill_batch)

    def own(kind: Kind) -> Algorithm:
        """FedAvg of one kind, whose server also keeps the mean of what the clients' models say."""

        def decode(message, shared):
            model = jax.tree.map(jnp.subtract, shared.params, message)
            return {"model": message, "scores": kind.apply(model, public[public_rows(shared.key, public, public_size)])}

        def update_fn(mean, state, params=None, *, weight, **extra_args):
            del extra_args
            return jax.tree.map(jnp.negative, mean["model"]), {"scores": mean["scores"], "weight": weight}

        def init_fn(params):
            return {"scores": jnp.zeros_like(kind.apply(params, public[:public_size])), "weight": jnp.zeros(())}

        server = optax.GradientTransformationExtraArgs(init_fn, update_fn)
        return specialised("feddf", kind.work, options, server=server, decode=decode)

    def agree(kind: Kind, params: Tree, key: jax.Array, x: jax.Array, target: jax.Array) -> Tree:
        def divergence(params, x, target):
            said = jax.nn.log_softmax(kind.apply(params, x))
            return jnp.mean(jnp.sum(jax.scipy.special.xlogy(target, target) - target * said, 1))

        return train(divergence, distill, params, key, x, target, distill_epochs, distill_batch)

    inner = [own(kind) for kind in kinds]

    def round_fn(state: ByKind, cohort: Cohort, key: jax.Array) -> tuple[ByKind, dict]:
        parts = [only(cohort, kind_of, k) for k in range(len(kinds))]
        rounds = [a.round(s, part, key) for a, s, part in zip(inner, state.kinds, parts, strict=True)]
        metrics = [m for _, m in rounds]
        # A kind nobody of which reported still holds what an earlier round left.
        weights = [jnp.where(m["reports"] > 0, s.server["weight"], 0.0) for s, m in rounds]
        total = sum(weights)
        said = sum(w * s.server["scores"].astype(jnp.float32) for w, (s, _) in zip(weights, rounds, strict=True))
        target = jax.nn.softmax(said / jnp.where(total > 0, total, 1.0))
        x = public[public_rows(key, public, public_size)]
        after = []
        for k, (kind, (s, _)) in enumerate(zip(kinds, rounds, strict=True)):
            taught = agree(kind, s.params, jax.random.fold_in(jax.random.fold_in(key, _streams.TEACH), k), x, target)
            after.append(s._replace(params=tree.select(total > 0, taught, s.params)))
        return ByKind(tuple(after)), together(metrics)

    return Algorithm(
        init_of(inner), round_fn, lambda state: state.kinds[0].params, lambda state, i: state.kinds[kind_of[i]].params
    )
