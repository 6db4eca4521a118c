"""The round that methods without a server share.

Every peer has a model of its own. In a round each finds its pseudo-gradient on its own data, in any client map, and a
method says what it makes of that, of what it remembers, and of what its neighbours send. Nobody sees all models.

Letters of the papers: n peers, x_i a peer's model, g_i its gradient, W the mixing matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, _validate, tree
from jfed.clients import lanes
from jfed.core import Algorithm, ClientMap, ClientWork, Cohort, Shared, Traffic, Tree
from jfed.gossip import mix
from jfed.gossip.topology import graph


class PeersState(NamedTuple):
    """State of a method without a server between rounds."""

    params: Tree  # leaves [n, ...], every peer's model, x
    optimizer: Tree  # leaves [n, ...], state of each peer's optimizer
    memory: Tree  # leaves [n, ...], what a method remembers of each peer
    round: jax.Array  # [] int32, rounds completed


class Net(NamedTuple):
    """A round, as a method sees it."""

    mix: Callable  # (x, sent=x, speaks=everybody) -> own_i x_i + sum_j w_ij sent_j; `sent` may be messages
    hear: Callable  # (sent, slot) -> what each peer hears in the slot, leaves [n, ...]
    descend: Callable  # direction -> (updates, state of the optimizer); none for peers that did not train
    weights: mix.Weights
    trained: jax.Array  # [n] bool, who was present and found a finite pseudo-gradient
    key: jax.Array
    round: jax.Array  # [] int32


def decentralised(
    where: str,
    work: ClientWork | None,
    topology: graph.Topology,
    *,
    step: Callable,
    before: Callable | None = None,
    memory: Callable[[Tree], Tree] | None = None,
    model: Callable[[Tree, Tree], Tree] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    client_map: ClientMap | None = None,
    mixing: mix.Mixing | None = None,
    lost: mix.Lost = mix.own_instead,
    links: Callable[[jax.Array], jax.Array] | None = None,
    by_edge: bool = False,
) -> Algorithm:
    """Builds a method without a server out of what a peer makes of its gradient and its neighbours.

    The cohort's clients are peers, of a population of n clients and no other: client i is peer i. Absent ones are away
    (they neither train, send nor hear, and keep all they have), `steps` are the local steps of each, `weight` above 0
    means present and nothing more. What is under way from peer to peer is lost where `cohort.state`, an array [C, n] of
    bool if given, is False: row k tells what the client in slot k hears of each peer (`gossip.conditions`).

    Guarantees:
      * A peer whose pseudo-gradient is not finite does not train in that round, but communicates; it is counted under
        `"dropped"`.
      * A peer that is away keeps its model, its optimizer's state and its memory.
      * The result does not depend on the client map, the mixing, the order of clients or empty slots.

    Metrics: `"loss"`, the mean over examples trained on; `"reports"`, peers present; `"dropped"`; `"steps"`;
    `"consensus"`, the root of the mean over peers of the squared distance to their average; `"traffic"`, bytes that
    each peer sent and heard, a `core.Traffic`.

    `algorithm.params(state)` is the average of all models, `algorithm.personal(state, i)` peer i's own.

    Args:
      where: the method's name, for messages of errors.
      work: keeps the pseudo-gradient and adds `{"loss", "examples"}`; see `jfed.local`. None for methods that do not
        train.
      topology: who hears whom.
      step: `(net, x, g, optimizer state, memory) -> (x, optimizer state, memory)`, leaves [n, ...].
      before: `(net, x, memory) -> (x, z)`, what is done before gradients are taken, and where they are, z; by default
        nothing, and at x.
      memory: `params [n, ...] -> tree [n, ...]`, what a method remembers before the first round.
      model: `(x, memory) -> params`, a peer's model, leaves [n, ...] or [...]; by default x.
      optimizer: of each peer, descends its pseudo-gradient, and its state stays from round to round; by default
        `optax.sgd(1.0)`.
      client_map: how peers' work runs; by default `lanes(16)`. On a mesh `clients.stationary`.
      mixing: how they hear each other; by default `mix.automatic()`.
      lost: what replaces a message that did not come.
      links: `key -> [n, n] bool`, who of those that the topology has sends to whom in a round; by default all.
      by_edge: whether `"traffic"` tells links apart, for `ledger.by_edge`: S n numbers a round.

    Raises:
      ValueError: if what is given is no topology, or without work an optimizer or a client map; when traced, if
        messages are lost by an array of another shape.
    """
    graph.check(where, topology)
    _validate.flags(where, by_edge=by_edge)
    for name, given in (("optimizer", optimizer), ("client_map", client_map)):
        if work is None and given is not None:
            raise ValueError(f"{where}({name}=...): without work there is no training; leave it out.")
    n = graph.peers(topology)
    optimizer = optax.with_extra_args_support(optax.sgd(1.0) if optimizer is None else optimizer)
    client_map = lanes(16) if client_map is None else client_map
    mixer = (mix.automatic() if mixing is None else mixing)(topology)
    before = (lambda net, x, memory: (x, x)) if before is None else before
    model = (lambda x, memory: x) if model is None else model

    def init_fn(params: Tree) -> PeersState:
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
        everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), params)
        state = PeersState(
            params=everyone,
            optimizer=jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), jax.vmap(optimizer.init)(everyone)),
            memory=() if memory is None else memory(everyone),
            round=jnp.zeros((), jnp.int32),
        )
        return mixer.place(state)

    def round_fn(state: PeersState, cohort: Cohort, key: jax.Array) -> tuple[PeersState, dict]:
        clients, arrives = mixer.alike(by_peer(where, cohort, n))
        present = mixer.alike(clients.weight != 0)
        server_key = jax.random.fold_in(key, _streams.SERVER)
        used = None if links is None else links(jax.random.fold_in(server_key, _streams.NOBODY))
        weights = mix.weights_of(topology, state.round, present=present, arrives=arrives, links=used, lost=lost)
        weights = mixer.alike(weights)
        sizes, heard_sizes = [], {}  # bytes of a peer's messages: to all alike, and by slot

        def mix_fn(x, sent=None, speaks=None):
            sent = x if sent is None else sent
            sizes.append(mixer.nbytes(sent) // n)
            now = weights if speaks is None else mixer.alike(mix.only_of(topology, weights, mixer.alike(speaks)))
            return mixer.combine(x, sent, now, jax.random.fold_in(server_key, len(sizes)))

        def hear_fn(sent, slot):
            heard_sizes[slot] = mixer.nbytes(sent) // n
            return mixer.hear(sent, slot, state.round)

        net = Net(mix_fn, hear_fn, None, weights, present, server_key, state.round)
        x, z = before(net, state.params, state.memory)
        if work is None:
            g, sound = tree.zeros(z), present
            added = {"loss": jnp.zeros(()), "examples": jnp.zeros(()), "dropped": jnp.zeros((), jnp.int32)}
        else:
            shared = Shared((), cohort.examples, key, state.round)
            (g, sound), added = client_map(of_peers(work), shared, clients._replace(state=z))

        def descend(direction):
            updates, after = jax.vmap(lambda g, s, p: optimizer.update(g, s, p, round=state.round))(
                direction, state.optimizer, z
            )
            return tree.select(sound, updates, tree.zeros(updates)), tree.select(sound, after, state.optimizer)

        net = net._replace(descend=descend, trained=sound)
        after = step(net, x, g, state.optimizer, state.memory)
        after = mixer.apart(tree.select(present, after, (state.params, state.optimizer, state.memory)))
        new = PeersState(*after, round=state.round + 1)
        examples = added["examples"]
        traffic = _traffic(topology, weights, sum(sizes) + max(heard_sizes.values(), default=0))
        metrics = {
            "loss": jnp.where(examples > 0, added["loss"] / jnp.maximum(examples, 1), jnp.nan),
            "reports": jnp.sum(present, dtype=jnp.int32),
            "dropped": added["dropped"],
            "steps": jnp.sum(jnp.where(present, clients.steps, 0)),
            "consensus": consensus_distance(model(new.params, new.memory), average=mixer.average),
            "traffic": traffic if by_edge else traffic._replace(edges=()),
        }
        return new, metrics

    return Algorithm(
        init=init_fn,
        round=round_fn,
        params=lambda state: mixer.average(model(state.params, state.memory)),
        personal=lambda state, i: model(tree.take(state.params, i), tree.take(state.memory, i)),
    )


def adapt_then_mix(net: Net, x: Tree, g: Tree, optimizer: Tree, memory: Tree) -> tuple[Tree, Tree, Tree]:
    """The step of methods that descend, then average, and remember nothing."""
    updates, optimizer = net.descend(g)
    return net.mix(plus(x, updates)), optimizer, memory


def by_peer(where: str, cohort: Cohort, n: int) -> tuple[Cohort, jax.Array | None]:
    """The cohort's clients in the order of peers, [n], absent where the cohort has them not, and who hears whom [n, n].

    Raises:
      ValueError: if `cohort.state` is something else than an array [C, n] of flags.
    """
    fields = cohort._replace(ids=(), examples=(), state=())
    clients = tree.put(tree.zeros(tree.take(fields, 0), (n,)), cohort.ids, fields)
    clients = clients._replace(ids=jnp.arange(n, dtype=jnp.int32), examples=(), state=())
    clients = clients._replace(steps=jnp.where(clients.weight != 0, clients.steps, 0))
    if not jax.tree.leaves(cohort.state):
        return clients, None
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(cohort.state)]
    if shapes != [((cohort.ids.shape[0], n), jnp.bool_)]:
        raise ValueError(
            f"{where}: cohort.state of {shapes}: what peers hear is one array [C, {n}] of bool; see gossip.conditions."
        )
    (hears,) = jax.tree.leaves(cohort.state)
    return clients, tree.put(jnp.ones((n, n), bool), cohort.ids, hears)


def consensus_distance(params: Tree, *, average: Callable[[Tree], Tree] | None = None) -> jax.Array:
    """The root of the mean over peers of the squared distance to their average; [] float32.

    Args:
      params: leaves [n, ...].
      average: the mean over peers, where it is not to be `tree.total`'s.

    >>> print(consensus_distance(jnp.array([[1.0, 0.0], [3.0, 0.0]])))
    1.0
    """
    n = jax.tree.leaves(params)[0].shape[0]
    means = jax.tree.map(lambda s: s / n, tree.total(params)) if average is None else average(params)

    def squared(x, mean):
        return jnp.sum(jnp.square(x - mean[None]), dtype=jnp.float32)

    return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(squared, params, means))) / n)


_OPTIONS = {"optimizer", "client_map", "mixing", "lost", "by_edge"}


def allowed(where: str, options: dict, *, without: tuple[str, ...] = ()) -> dict:
    """What a method's caller may ask `decentralised` for.

    Raises:
      ValueError: if it is something else, or what the method decides.
    """
    for name in options:
        if name not in _OPTIONS - {*without}:
            choices = ", ".join(sorted(_OPTIONS - {*without}))
            raise ValueError(f"{where}({name}=...): it takes {choices}, and decides the rest itself; leave it out.")
    return options


def plus(x: Tree, *changes: Tree) -> Tree:
    """The sum, in the dtypes of x."""
    return jax.tree.map(lambda x, *c: sum(c, x).astype(x.dtype), x, *changes)


def minus(x: Tree, y: Tree) -> Tree:
    """The difference, leaf by leaf."""
    return jax.tree.map(jnp.subtract, x, y)


def of_peers(work: ClientWork) -> ClientWork:
    """The same work of a client whose own model, `client.state`, takes the global one's place."""

    def of(shared: Shared, client: Cohort) -> tuple[Shared, Cohort]:
        return shared._replace(params=client.state), client._replace(state=())

    def finish_fn(shared, client, carry):
        g, trained = work.finish(*of(shared, client), carry)
        sound = tree.all_finite(g) & (client.weight != 0) & (client.steps > 0)
        g = tree.select(sound, g, tree.zeros(g))
        trained = tree.select(sound & tree.all_finite(trained), trained, tree.zeros(trained))
        dropped = (~sound & (client.weight != 0) & (client.steps > 0)).astype(jnp.int32)
        return (g, sound), {"loss": trained["loss"], "examples": trained["examples"], "dropped": dropped}

    return ClientWork(
        work.steps,
        start=lambda shared, client: work.start(*of(shared, client)),
        step=lambda shared, client, carry, t: work.step(*of(shared, client), carry, t),
        finish=finish_fn,
    )


def _traffic(topology: graph.Topology, weights: mix.Weights, nbytes: int) -> Traffic:
    """Bytes of a round; a message that is lost was sent, and not heard."""
    source = jnp.asarray(topology.source)[weights.round % graph.period(topology)]
    me = jnp.arange(graph.peers(topology), dtype=jnp.int32)
    one = tree.number_of_bytes(nbytes) if nbytes * source.shape[0] < 2**31 else np.float32(nbytes)
    nothing = jnp.zeros((), one.dtype)
    edges = jnp.where(weights.came, one, nothing)
    up = jnp.zeros(me.shape, one.dtype).at[source].add(jnp.where(weights.sent, one, nothing))
    return Traffic(me, up, jnp.sum(edges, 0, dtype=one.dtype), edges)
