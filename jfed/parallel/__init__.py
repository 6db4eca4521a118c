"""Training over devices: data-parallel, with sharded optimizers, seldom synchronised, or asynchronous.

Every method is an `Algorithm` whose round is a step (or, seldom synchronised, several), with a batch in the cohort's
place, so `jfed.run` drives it as it does federated ones.

    data_parallel, batches    the model on every worker, gradients averaged by any all-reduce
    zero1, zero2              the same with a share of the optimizer's state on each
    local_sgd, diloco         many local steps between two averages

Workers are the devices of a mesh, in one process or many, or a number of them simulated on one device.
"""

from jfed.parallel.data import batches, data_parallel
from jfed.parallel.diloco import diloco, local_sgd
from jfed.parallel.zero import zero1, zero2

__all__ = ["batches", "data_parallel", "diloco", "local_sgd", "zero1", "zero2"]
