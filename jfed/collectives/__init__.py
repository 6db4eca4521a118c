"""All-reduces made of messages from device to device, what each costs in theory, and what it costs in fact.

Every one is called as `ring_all_reduce(x, axis_name)` and gives what `lax.psum(x, axis_name)` does, so training takes
it as an argument. One text runs under `shard_map` on devices of any number of processes, and under
`vmap(axis_name=)` on one device. Leaves of one dtype are put into one vector, a copy, and summed in that dtype: more
than 256 ones in bfloat16 may come out as 256.

Gradients pass through all but the compressed: that of a sum over devices is again one. Under `shard_map` with
`check_vma=True`, results are typed as varying, so they cannot leave by `out_specs=P()`, and a gradient with respect to
what is replicated is summed by JAX as well: take it with respect to `lax.pcast(w, axis_name, to="varying")`.

    ring  direct  servers  butterfly  tree  grid    algorithms
    compressed                                       all-reduces that send messages of `jfed.compress`
    cost  count                                      bytes and rounds: by theory, and in a program
    network                                          bytes by link and seconds, on a network that is described
    lint                                             what goes wrong in programs of many devices

Letters: n devices, d numbers, k bytes of the vector.
"""

from jfed.collectives import compressed, cost, count, lint, network
from jfed.collectives.butterfly import (
    doubling_all_gather,
    doubling_all_reduce,
    halving_doubling_all_reduce,
    halving_reduce_scatter,
)
from jfed.collectives.direct import direct_all_gather, direct_reduce_scatter, one_shot_all_reduce, two_shot_all_reduce
from jfed.collectives.grid import hierarchical_all_reduce, torus_all_reduce
from jfed.collectives.ring import bidirectional_ring_all_reduce, ring_all_gather, ring_all_reduce, ring_reduce_scatter
from jfed.collectives.servers import (
    dedicated_servers_all_reduce,
    parameter_server_all_reduce,
    sharded_servers_all_reduce,
)
from jfed.collectives.tree import tree_all_reduce

__all__ = [
    "bidirectional_ring_all_reduce",
    "compressed",
    "cost",
    "count",
    "dedicated_servers_all_reduce",
    "direct_all_gather",
    "direct_reduce_scatter",
    "doubling_all_gather",
    "doubling_all_reduce",
    "halving_doubling_all_reduce",
    "halving_reduce_scatter",
    "hierarchical_all_reduce",
    "lint",
    "network",
    "one_shot_all_reduce",
    "parameter_server_all_reduce",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_reduce_scatter",
    "sharded_servers_all_reduce",
    "torus_all_reduce",
    "tree_all_reduce",
    "two_shot_all_reduce",
]
