"""FedMD: every client has a model of its own, of any kind, and only what it says about public examples travels.

Models of different shapes cannot be averaged, but their scores on the same examples can: each client
learns from everybody's mean before it returns to its own data (Li and Wang 2019, arXiv:1910.03581,
Algorithm 1).

Letters: N clients, K kinds of model, P public examples, S of them used in a round.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, tree
from jfed.algorithms._kinds import ByKind, Kind, check, init_of, only, public_rows, together, train
from jfed.algorithms._work import same, specialised
from jfed.clients import lanes
from jfed.core import Algorithm, ClientWork, Cohort, Shared, Traffic, Tree


def fedmd(
    kinds: Sequence[Kind],
    *,
    kind_of: Sequence[int],
    public: jax.Array,
    public_size: int,
    digest: optax.GradientTransformation,
    digest_epochs: int = 1,
    digest_batch: int = 64,
    **options,
) -> Algorithm:
    """Every client its own model; only scores on public examples travel.

    A round: S public examples are drawn; each client's scores on them are averaged; each client trains its
    model towards the mean by its distance in the first norm, smoothed near 0 (digest), then on its own
    examples (revisit).
    The mean is by weight, where the paper's is plain: `sampling.equally_weighted`.
    The paper trains every client to convergence beforehand: start from such models, or let a few rounds
    of `local_only` pass.

    `init` takes a tuple of params, one for each kind. `params` is the mean model of the first kind;
    `personal(state, i)` needs a number known outside a compiled program, as kinds differ in shape.

    `public` becomes a constant of the compiled program: some thousands of examples. All kinds must count the
    same local steps for a client.

    Args:
      kinds: the K kinds.
      kind_of: [N] kind of every client.
      public: [P, ...] inputs.
      public_size: S.
      digest: the optimizer of the digest, anew each round.
      digest_epochs: passes over the S examples.
      digest_batch: examples a step of it; must divide S.
      **options: `client_map` of `federated`.

    Raises:
      ValueError: if `kind_of` names a kind there is not, or a kind has no client; if S is more than P, or the batch
        does not divide it.
    """
    public = jnp.asarray(public)
    kind_of = check("fedmd", kinds, kind_of, public, public_size, digest_epochs, digest_batch)
    client_map = options["client_map"] = options.get("client_map") or lanes(16)
    num_clients = len(kind_of)

    def teach(kind: Kind, params: Tree, key: jax.Array, x: jax.Array, target: jax.Array) -> Tree:
        def distance(params, x, target):
            apart = kind.apply(params, x) - target
            # Smooth within a tenth: where all say the same, the slope of |.| would be that of rounding errors.
            return jnp.mean(jnp.sum(jnp.sqrt(apart**2 + 1e-2), 1))

        return train(distance, digest, params, key, x, target, digest_epochs, digest_batch)

    def own(kind: Kind) -> Algorithm:
        """Clients of one kind; the server's state is what everybody is taught this round."""

        def start_fn(shared, client):
            key = jax.random.fold_in(jax.random.fold_in(shared.key, _streams.TEACH), client.ids)
            params = teach(kind, client.state, key, public[shared.extra["rows"]], shared.extra["scores"])
            params = tree.select(shared.extra["said"], params, client.state)  # nobody spoke, nothing to learn
            return kind.work.start(shared._replace(params=params), client)

        def finish_fn(shared, client, carry):
            return ((), carry.params), kind.work.finish(shared, client, carry)[1]

        def update_fn(mean, state, params):
            return jax.tree.map(jnp.zeros_like, params), state

        return specialised(
            "fedmd",
            kind.work._replace(start=start_fn, finish=finish_fn),
            options,
            uplink=None,
            aggregator=None,
            server=optax.GradientTransformation(lambda params: (), update_fn),
            num_clients=num_clients,
            memory=same,
            message=lambda params: (),
            broadcast=lambda state, shared, clients: state,
        )

    def scores(kind: Kind, memory: Tree, cohort: Cohort, rows: jax.Array) -> dict:
        """Weighted sum of the clients' scores, and of their weights."""

        def finish_fn(shared, client, carry):
            said = kind.apply(client.state, public[shared.extra]).astype(jnp.float32)
            sound = tree.all_finite(said) & (client.weight > 0)
            return (), {
                "scores": jnp.where(sound, client.weight * said, 0.0),
                "weight": jnp.where(sound, client.weight, 0.0),
            }

        ask = ClientWork(
            kind.work.steps, start=lambda shared, client: (), step=lambda shared, client, carry, t: (), finish=finish_fn
        )
        clients = cohort._replace(examples=(), steps=jnp.zeros_like(cohort.steps), state=tree.take(memory, cohort.ids))
        return client_map(ask, Shared((), cohort.examples, jax.random.key(0), jnp.int32(0), rows), clients)[1]

    inner = [own(kind) for kind in kinds]

    def round_fn(state: ByKind, cohort: Cohort, key: jax.Array) -> tuple[ByKind, dict]:
        rows = public_rows(key, public, public_size)
        parts = [only(cohort, kind_of, k) for k in range(len(kinds))]
        asked = [scores(kind, s.memory, part, rows) for kind, s, part in zip(kinds, state.kinds, parts, strict=True)]
        total = jax.tree.map(lambda *x: sum(x), *asked)
        said = total["weight"] > 0
        taught = {"rows": rows, "scores": total["scores"] / jnp.where(said, total["weight"], 1.0), "said": said}
        after, metrics = [], []
        for algorithm, s, part in zip(inner, state.kinds, parts, strict=True):
            s, m = algorithm.round(s._replace(server=taught), part, key)
            after.append(s._replace(server=()))
            sent = tree.nbytes(taught["scores"])
            up = tree.count_bytes(sent, part.weight != 0)
            down = tree.count_bytes(sent + tree.nbytes(rows), part.size > 0)
            metrics.append(m | {"traffic": Traffic(cohort.ids, up, down)})
        return ByKind(tuple(after)), together(metrics)

    def personal(state: ByKind, i: int) -> Tree:
        return tree.take(state.kinds[kind_of[i]].memory, i)

    def params_fn(state: ByKind) -> Tree:
        first = np.flatnonzero(kind_of == 0)
        return jax.tree.map(lambda x: jnp.mean(x[first], 0), state.kinds[0].memory)

    return Algorithm(init_of(inner), round_fn, params_fn, personal)
