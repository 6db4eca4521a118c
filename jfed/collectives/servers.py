"""Parameter servers: workers send to few, who add up and send back.

A server may be a worker too, or hold no data and only serve. With s servers each adds up a chunk of the vector,
which is parallel parameter sharing: k bytes up and k down for a worker, k n / s each way for a server (Li et al. 2014,
Scaling Distributed Machine Learning with the Parameter Server, OSDI).

Letters: n workers, s servers, k bytes of the vector.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jfed._axis import among, cut, permute, uncut, vary
from jfed.collectives._call import Axis, named, over_vectors
from jfed.core import Tree


def parameter_server_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices, added up by the first of them: all send to it, and it sends to all.

    Sent: k bytes by a worker, k (n - 1) by the server, in 2 rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.

    >>> jax.vmap(lambda x: parameter_server_all_reduce(x, "devices"), axis_name="devices")(jnp.array([1, 2, 4]))
    Array([7, 7, 7], dtype=int32)
    """
    return named(_parameter_server_all_reduce, axis_name)(x)


def sharded_servers_all_reduce(x: Tree, axis_name: Axis, *, servers: int | None = None) -> Tree:
    """The sum over devices, each of the first s of which adds up a chunk.

    Sent: k bytes by a worker that does not serve, k (n + s - 2) / s by one that does, in 2 rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.
      servers: s, by default 2 if there are as many devices; with n it is `two_shot_all_reduce`.

    Returns:
      As `ring_all_reduce`.

    Raises:
      ValueError: when traced, if `servers` is not a whole number from 1 to n.
    """
    return named(_sharded_servers_all_reduce, axis_name, servers=servers)(x)


def dedicated_servers_all_reduce(x: Tree, axis_name: Axis, *, servers: int = 1) -> Tree:
    """The sum over workers, added up by the last s devices of the axis, which hold no data.

    Sent: k bytes by a worker, k n / s by a server, in 2 rounds.

    Args:
      x: as in `ring_all_reduce`; that of the servers is not looked at.
      axis_name: of n workers and, behind them, s servers.
      servers: s, at most n.

    Returns:
      The sum over workers, the same bits on all of them; on servers zeros.

    Raises:
      ValueError: when traced, if `servers` is not a whole number from 1 to half of the axis.

    >>> jax.vmap(lambda x: dedicated_servers_all_reduce(x, "all"), axis_name="all")(jnp.array([1, 2, 4]))
    Array([3, 3, 0], dtype=int32)
    """
    return named(_dedicated_servers_all_reduce, axis_name, servers=servers)(x)


def _parameter_server_all_reduce(x, axis_name):
    return over_vectors(lambda v, n: _served(v, axis_name, _among_workers(n, 1), 1), x, axis_name)


def _sharded_servers_all_reduce(x, axis_name, servers):
    n = lax.axis_size(axis_name)
    servers = min(2, n) if servers is None else servers
    at_most("sharded_servers_all_reduce", servers, n, f"the axis has {n} devices")
    return over_vectors(lambda v, n: _served(v, axis_name, _among_workers(n, servers), servers), x, axis_name)


def _dedicated_servers_all_reduce(x, axis_name, servers):
    devices = lax.axis_size(axis_name)
    at_most("dedicated_servers_all_reduce", servers, devices // 2, f"of {devices} devices as many must be workers")
    workers = devices - servers

    def sum_vector(v, n):
        # In each turn another worker for each server.
        turns = [{(j + d) % workers: (j, workers + j) for j in range(servers)} for d in range(workers)]
        working = among(range(workers), axis_name)
        v = jnp.where(working, v, jnp.zeros_like(v))
        return jnp.where(working, _served(v, axis_name, turns, servers), jnp.zeros_like(v))

    return over_vectors(sum_vector, x, axis_name)


def _among_workers(n: int, servers: int) -> list[dict[int, tuple[int, int]]]:
    """Turns of `_served` in which server j is device j."""
    return [{(j - d) % n: (j, j) for j in range(servers)} for d in range(n)]


def _served(v: jax.Array, axis_name: Axis, turns: list[dict[int, tuple[int, int]]], servers: int) -> jax.Array:
    """Every worker's chunk j to the server of it, and their sum back.

    Args:
      v: [d].
      axis_name: of all devices.
      turns: each maps workers to `(chunk, device of its server)`; one may be a worker itself.
      servers: s, chunks.
    """
    me, chunks = lax.axis_index(axis_name), cut(v, servers)
    total, whole = jnp.zeros_like(chunks[0]), jnp.zeros_like(v, shape=(servers + 1, chunks.shape[1]))
    total, whole = vary(total, axis_name), vary(whole, axis_name)
    chunk_of = []
    for turn in turns:
        number = [turn.get(i, (servers, i))[0] for i in range(lax.axis_size(axis_name))]  # s: none in this turn
        chunk_of.append(jnp.asarray(number)[me])
        own = lax.dynamic_index_in_dim(chunks, jnp.minimum(chunk_of[-1], servers - 1), keepdims=False)
        total = total + _moved(own, axis_name, [(worker, device) for worker, (_, device) in turn.items()])
    for number, turn in zip(chunk_of, turns, strict=True):
        came = _moved(total, axis_name, [(device, worker) for worker, (_, device) in turn.items()])
        whole = lax.dynamic_update_index_in_dim(whole, came, number, 0)
    return uncut(whole[:servers], v.size)


def _moved(x: jax.Array, axis_name: Axis, pairs: list[tuple[int, int]]) -> jax.Array:
    """`permute`, where a device keeps what it would send to itself."""
    kept = [a for a, b in pairs if a == b]
    came = permute(x, axis_name, [(a, b) for a, b in pairs if a != b])
    return jnp.where(among(kept, axis_name), x, came) if kept else came


def at_most(where: str, servers: int, most: int, why: str) -> None:
    """Raises a `ValueError` if there are more servers than there may be."""
    if servers > most:
        raise ValueError(f"{where}(servers={servers}): {why}; take at most {most}.")
