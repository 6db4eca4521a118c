"""Clients of different models that teach each other on public examples: FedMD and FedDF.

Models of different shapes cannot be averaged, but what they say about the same examples can. In FedMD
(Li and Wang 2019, arXiv:1910.03581, Algorithm 1) every client keeps a model of its own, sends its
scores on public examples, and learns from everybody's mean before it returns to its own data. In FedDF
(Lin et al. 2020, arXiv:2006.07242, Algorithm 3) the server keeps one model of each kind, averages what
comes back within a kind, and then trains each to agree with the mean of all clients' models on public,
unlabelled examples.

Letters: N clients, K kinds of model, P public examples, S of them used in a round.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, _validate, tree
from jfed.algorithms._work import same
from jfed.algorithms.federated import federated
from jfed.clients import lanes
from jfed.core import Algorithm, ClientWork, Cohort, Shared, Tree


class Kind(NamedTuple):
    """One kind of model, and how a client trains it."""

    apply: Callable  # (params, x [B, ...]) -> scores [B, classes]
    work: ClientWork  # training on the client's own examples


class ByKind(NamedTuple):
    """State of a method whose clients have models of several kinds."""

    kinds: tuple  # a FederatedState for each


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
    model towards the mean by its distance in the first norm (digest), then on its own examples (revisit).
    The paper trains every client to convergence beforehand: start from such models, or let a few rounds
    of `local_only` pass.

    `init` takes a tuple of params, one for each kind. `params` is the mean model of the first kind;
    `personal(state, i)` needs a number known outside a compiled program, as kinds differ in shape.

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
      ValueError: if `kind_of` names a kind there is not, S is more than P, or the batch does not divide S.
    """
    kind_of = _check("fedmd", kinds, kind_of, public, public_size, digest_batch)
    client_map = options.setdefault("client_map", lanes(16))
    num_clients = len(kind_of)

    def teach(kind: Kind, params: Tree, key: jax.Array, x: jax.Array, target: jax.Array) -> Tree:
        def distance(params, x, target):
            return jnp.mean(jnp.sum(jnp.abs(kind.apply(params, x) - target), 1))

        return _train(distance, digest, params, key, x, target, digest_epochs, digest_batch)

    def own(kind: Kind) -> Algorithm:
        """Clients of one kind; the server's state is what everybody is taught this round."""

        def start_fn(shared, client):
            key = jax.random.fold_in(jax.random.fold_in(shared.key, _streams.PUBLIC), client.ids)
            params = teach(kind, client.state, key, public[shared.extra["rows"]], shared.extra["scores"])
            return kind.work.start(shared._replace(params=params), client)

        def finish_fn(shared, client, carry):
            return ((), carry.params), kind.work.finish(shared, client, carry)[1]

        def update_fn(mean, state, params):
            return jax.tree.map(jnp.zeros_like, params), state

        return federated(
            kind.work._replace(start=start_fn, finish=finish_fn),
            server=optax.GradientTransformation(lambda params: (), update_fn),
            num_clients=num_clients,
            memory=same,
            message=lambda params: (),
            broadcast=lambda state, shared, clients: state,
            **options,
        )

    def scores(kind: Kind, memory: Tree, cohort: Cohort, rows: jax.Array) -> dict:
        """Weighted sum of the clients' scores, and of their weights."""

        def finish_fn(shared, client, carry):
            said = kind.apply(client.state, public[rows]).astype(jnp.float32)
            sound = tree.all_finite(said) & (client.weight > 0)
            return (), {
                "scores": jnp.where(sound, client.weight * said, 0.0),
                "weight": jnp.where(sound, client.weight, 0.0),
            }

        ask = ClientWork(
            kind.work.steps, start=lambda shared, client: (), step=lambda shared, client, carry, t: (), finish=finish_fn
        )
        clients = cohort._replace(examples=(), steps=jnp.zeros_like(cohort.steps), state=tree.take(memory, cohort.ids))
        return client_map(ask, Shared((), (), jax.random.key(0), jnp.int32(0)), clients)[1]

    inner = [own(kind) for kind in kinds]

    def round_fn(state: ByKind, cohort: Cohort, key: jax.Array) -> tuple[ByKind, dict]:
        rows = _rows(key, public, public_size)
        parts = [_only(cohort, kind_of, k) for k in range(len(kinds))]
        asked = [scores(kind, s.memory, part, rows) for kind, s, part in zip(kinds, state.kinds, parts, strict=True)]
        total = jax.tree.map(lambda *x: sum(x), *asked)
        taught = {"rows": rows, "scores": total["scores"] / jnp.where(total["weight"] > 0, total["weight"], 1.0)}
        after, metrics = [], []
        for algorithm, s, part in zip(inner, state.kinds, parts, strict=True):
            s, m = algorithm.round(s._replace(server=taught), part, key)
            after.append(s._replace(server=()))
            sent = np.uint32(tree.nbytes(taught["scores"]))
            metrics.append(m | {"download_bytes": sent + np.uint32(tree.nbytes(rows)), "upload_bytes": sent})
        return ByKind(tuple(after)), _together(metrics)

    def personal(state: ByKind, i: int) -> Tree:
        return tree.take(state.kinds[kind_of[i]].memory, i)

    def params_fn(state: ByKind) -> Tree:
        first = np.flatnonzero(kind_of == 0)
        return jax.tree.map(lambda x: jnp.mean(x[first], 0), state.kinds[0].memory)

    return Algorithm(_init(inner), round_fn, params_fn, personal)


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
      ValueError: if `kind_of` names a kind there is not, S is more than P, or the batch does not divide S.
    """
    kind_of = _check("feddf", kinds, kind_of, public, public_size, distill_batch)

    def own(kind: Kind) -> Algorithm:
        """FedAvg of one kind, whose server also keeps the mean of what the clients' models say."""

        def decode(message, shared):
            model = jax.tree.map(jnp.subtract, shared.params, message)
            return {"model": message, "scores": kind.apply(model, public[_rows(shared.key, public, public_size)])}

        def update_fn(mean, state, params=None, *, weight, **extra_args):
            del extra_args
            return jax.tree.map(jnp.negative, mean["model"]), {"scores": mean["scores"], "weight": weight}

        def init_fn(params):
            return {"scores": jnp.zeros_like(kind.apply(params, public[:public_size])), "weight": jnp.zeros(())}

        server = optax.GradientTransformationExtraArgs(init_fn, update_fn)
        return federated(kind.work, server=server, decode=decode, **options)

    def agree(kind: Kind, params: Tree, key: jax.Array, x: jax.Array, target: jax.Array) -> Tree:
        def divergence(params, x, target):
            said = jax.nn.log_softmax(kind.apply(params, x))
            return jnp.mean(jnp.sum(jax.scipy.special.xlogy(target, target) - target * said, 1))

        return _train(divergence, distill, params, key, x, target, distill_epochs, distill_batch)

    inner = [own(kind) for kind in kinds]

    def round_fn(state: ByKind, cohort: Cohort, key: jax.Array) -> tuple[ByKind, dict]:
        parts = [_only(cohort, kind_of, k) for k in range(len(kinds))]
        rounds = [a.round(s, part, key) for a, s, part in zip(inner, state.kinds, parts, strict=True)]
        metrics = [m for _, m in rounds]
        # A kind nobody of which reported still holds what an earlier round left.
        weights = [jnp.where(m["reports"] > 0, s.server["weight"], 0.0) for s, m in rounds]
        total = sum(weights)
        said = sum(w * s.server["scores"].astype(jnp.float32) for w, (s, _) in zip(weights, rounds, strict=True))
        target = jax.nn.softmax(said / jnp.where(total > 0, total, 1.0))
        x = public[_rows(key, public, public_size)]
        after = []
        for k, (kind, (s, _)) in enumerate(zip(kinds, rounds, strict=True)):
            taught = agree(kind, s.params, jax.random.fold_in(jax.random.fold_in(key, _streams.PUBLIC), k), x, target)
            after.append(s._replace(params=tree.select(total > 0, taught, s.params)))
        return ByKind(tuple(after)), _together(metrics)

    return Algorithm(
        _init(inner), round_fn, lambda state: state.kinds[0].params, lambda state, i: state.kinds[kind_of[i]].params
    )


def _init(inner: list[Algorithm]) -> Callable:
    def init_fn(params: tuple) -> ByKind:
        return ByKind(tuple(algorithm.init(p) for algorithm, p in zip(inner, params, strict=True)))

    return init_fn


def _only(cohort: Cohort, kind_of: np.ndarray, kind: int) -> Cohort:
    """The cohort with all but one kind absent."""
    here = jnp.take(jnp.asarray(kind_of), cohort.ids, mode="fill", fill_value=-1) == kind
    return cohort._replace(
        steps=jnp.where(here, cohort.steps, 0),
        weight=jnp.where(here, cohort.weight, 0.0),
        size=jnp.where(here, cohort.size, 0),
    )


def _rows(key: jax.Array, public: jax.Array, count: int) -> jax.Array:
    """The round's public examples: [S] int32."""
    key = jax.random.fold_in(key, _streams.PUBLIC)
    return jax.random.choice(key, public.shape[0], (count,), replace=False).astype(jnp.int32)


def _train(loss, optimizer, params, key, x, target, epochs, batch):
    """Epochs of an optimizer over `(x, target)`, in a new order each."""
    optimizer = optax.with_extra_args_support(optimizer)
    steps = x.shape[0] // batch

    def step(carry, rows):
        params, state = carry
        gradient = jax.grad(loss)(params, x[rows], target[rows])
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, x.shape[0]).reshape(steps, batch)
        return jax.lax.scan(step, carry, order)

    (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), jax.random.split(key, epochs))
    return params


def _together(metrics: list[dict]) -> dict:
    """A round's metrics over all kinds; bytes are the mean of a message, rounded up."""
    total = {name: sum(m[name] for m in metrics) for name in ("reports", "dropped", "steps", "downloads", "uploads")}
    reports = jnp.stack([m["reports"] for m in metrics])
    losses = jnp.stack([m["loss"] for m in metrics])
    present = reports > 0
    loss = jnp.sum(jnp.where(present, reports * losses, 0.0)) / jnp.maximum(jnp.sum(reports), 1)
    sent = {}
    for way in ("download", "upload"):
        counts = jnp.stack([m[f"{way}s"] for m in metrics]).astype(jnp.float32)
        nbytes = jnp.array([float(m[f"{way}_bytes"]) for m in metrics])
        sent[f"{way}_bytes"] = jnp.ceil(jnp.sum(counts * nbytes) / jnp.maximum(jnp.sum(counts), 1)).astype(jnp.uint32)
    return {"loss": jnp.where(jnp.any(present), loss, jnp.nan), **total, **sent}


def _check(where, kinds, kind_of, public, size, batch) -> np.ndarray:
    kind_of, count = np.asarray(kind_of), len(kinds)
    known = np.issubdtype(kind_of.dtype, np.integer) and np.all((kind_of >= 0) & (kind_of < count))
    if kind_of.ndim != 1 or not known:
        raise ValueError(f"{where}(kind_of={kind_of}): one number in [0, {count}) for each client, whose kind it is.")
    _validate.at_least_one(where, "public_size", size, "5000 is usual")
    if size > public.shape[0] or size % batch:
        raise ValueError(
            f"{where}(public_size={size}): at most the {public.shape[0]} public examples there are, and a multiple of "
            f"the batch, {batch}."
        )
    return kind_of
