"""Training over devices: data-parallel, with sharded optimizers, seldom synchronised, or asynchronous.

Every method is an `Algorithm` whose round is a step (or, seldom synchronised, several), with a batch in the cohort's
place, so `jfed.run` drives it as it does federated ones.

    data_parallel, batches    the model on every worker, gradients averaged by any all-reduce
    zero1, zero2              the same with a share of the optimizer's state on each
    local_sgd, diloco         many local steps between two averages
    asynchronous              a parameter server steps by every gradient that arrives, on a simulated clock
    simulated, recorded       who arrives when: by speeds that are drawn, or as a `Trace` says
    scale_by_age, delay_compensation, adaptive_delay_compensation       what is done about gradients that are old
    serve, work               the same parameter server and its workers, as real processes

Workers are the devices of a mesh, in one process or many, or a number of them simulated on one device.
"""

from jfed.parallel.arrivals import Arrivals, Event, Trace, recorded, simulated, trace
from jfed.parallel.asynchronous import asynchronous, random_batch
from jfed.parallel.corrections import adaptive_delay_compensation, delay_compensation, per_age, scale_by_age
from jfed.parallel.data import batches, data_parallel
from jfed.parallel.diloco import diloco, local_sgd
from jfed.parallel.parameter_server import Served, serve, work
from jfed.parallel.zero import zero1, zero2

__all__ = [
    "Arrivals",
    "Event",
    "Served",
    "Trace",
    "adaptive_delay_compensation",
    "asynchronous",
    "batches",
    "data_parallel",
    "delay_compensation",
    "diloco",
    "local_sgd",
    "per_age",
    "random_batch",
    "recorded",
    "scale_by_age",
    "serve",
    "simulated",
    "trace",
    "work",
    "zero1",
    "zero2",
]
