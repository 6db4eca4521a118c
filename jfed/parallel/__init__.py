"""Training over devices: data-parallel, model-parallel in every way, seldom synchronised, or asynchronous.

Every method is an `Algorithm` whose round is a step (or, seldom synchronised, several), with a batch in the cohort's
place, so `jfed.run` drives it as it does federated ones.

    data_parallel, batches    the model on every worker, gradients averaged by any all-reduce
    zero1, zero2              the same with a share of the optimizer's state on each
    local_sgd, diloco         many local steps between two averages

    on_mesh                   a layered model over any mesh: data, pipe, tensor, sequence, expert, parameters cut or not
    transformer               such a model; `mixture_of_experts` for its feed-forward net
    schedules                 pipelines as tables: naive, GPipe, 1F1B in two forms, interleaved, ZB-H1, your own
    pipedream                 a pipeline that learns from every microbatch at once, with weight stashing
    hybrid                    convolutions data-parallel, dense layers model-parallel, in three schemes
    split_model               a federated cohort each of whose clients is several devices
    conjugate, tensor, networks, layered    what such models are made of

    asynchronous              a parameter server steps by every gradient that arrives, on a simulated clock
    simulated, recorded       who arrives when: by speeds that are drawn, or as a `Trace` says
    scale_by_age, delay_compensation, adaptive_delay_compensation       what is done about gradients that are old
    serve, work               the same parameter server and its workers, as real processes

Workers are the devices of a mesh, in one process or many; of the first and last group, also a number of them simulated
on one device.
"""

from jfed.parallel import conjugate, layered, networks, schedules, tensor
from jfed.parallel._specs import specs_like
from jfed.parallel.arrivals import Arrivals, Event, Trace, recorded, simulated, trace
from jfed.parallel.asynchronous import asynchronous, random_batch
from jfed.parallel.attention import all_to_all_attention, causal_attention, ring_attention, zigzag_attention
from jfed.parallel.cohort import on_parts, put, split_model
from jfed.parallel.corrections import adaptive_delay_compensation, delay_compensation, per_age, scale_by_age
from jfed.parallel.data import batches, data_parallel
from jfed.parallel.diloco import diloco, local_sgd
from jfed.parallel.experts import FeedForward, mixture_of_experts
from jfed.parallel.hybrid import (
    HybridModel,
    alexnet,
    assemble_all,
    dense_layers,
    hybrid,
    hybrid_variable_batch,
    in_parts,
    in_turns,
)
from jfed.parallel.layered import Axes, Functions, Layered, Parts
from jfed.parallel.parameter_server import Served, serve, work
from jfed.parallel.pipedream import pipedream
from jfed.parallel.sharded import MeshState, on_mesh
from jfed.parallel.transformer import transformer
from jfed.parallel.zero import zero1, zero2

__all__ = [
    "Arrivals",
    "Axes",
    "Event",
    "FeedForward",
    "Functions",
    "HybridModel",
    "Layered",
    "MeshState",
    "Parts",
    "Served",
    "Trace",
    "adaptive_delay_compensation",
    "alexnet",
    "all_to_all_attention",
    "assemble_all",
    "asynchronous",
    "batches",
    "causal_attention",
    "conjugate",
    "data_parallel",
    "delay_compensation",
    "dense_layers",
    "diloco",
    "hybrid",
    "hybrid_variable_batch",
    "in_parts",
    "in_turns",
    "layered",
    "local_sgd",
    "mixture_of_experts",
    "networks",
    "on_mesh",
    "on_parts",
    "per_age",
    "pipedream",
    "put",
    "random_batch",
    "recorded",
    "ring_attention",
    "scale_by_age",
    "schedules",
    "serve",
    "simulated",
    "specs_like",
    "split_model",
    "tensor",
    "trace",
    "transformer",
    "work",
    "zero1",
    "zero2",
    "zigzag_attention",
]
