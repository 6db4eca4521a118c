"""Methods: one file each."""

from jfed.algorithms._kinds import Kind
from jfed.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from jfed.algorithms.afl import afl
from jfed.algorithms.apfl import apfl
from jfed.algorithms.baselines import centralised, local_only, pooled
from jfed.algorithms.ditto import ditto
from jfed.algorithms.downlink import DownlinkState, compressed_downlink
from jfed.algorithms.fedasync import fedasync
from jfed.algorithms.fedavg import fedavg, fedavgm, fedsgd
from jfed.algorithms.fedbuff import fedbuff
from jfed.algorithms.feddf import feddf
from jfed.algorithms.feddyn import feddyn
from jfed.algorithms.federated import FederatedState, federated
from jfed.algorithms.fedmd import fedmd
from jfed.algorithms.fednova import fednova
from jfed.algorithms.fedprox import fedprox
from jfed.algorithms.fetchsgd import fetchsgd
from jfed.algorithms.ifca import ifca
from jfed.algorithms.mime import mime, mimelite
from jfed.algorithms.partial import fedbn, fedper, fedrep, lg_fedavg, partially_local
from jfed.algorithms.perfedavg import perfedavg, perfedavg_fo, perfedavg_hf
from jfed.algorithms.pfedme import pfedme
from jfed.algorithms.qfedavg import qfedavg
from jfed.algorithms.scaffold import scaffold

__all__ = [
    "DownlinkState",
    "FederatedState",
    "Kind",
    "afl",
    "apfl",
    "centralised",
    "compressed_downlink",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedasync",
    "fedavg",
    "fedavgm",
    "fedbn",
    "fedbuff",
    "feddf",
    "feddyn",
    "federated",
    "fedmd",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "fedsgd",
    "fedyogi",
    "fetchsgd",
    "ifca",
    "lg_fedavg",
    "local_only",
    "mime",
    "mimelite",
    "partially_local",
    "perfedavg",
    "perfedavg_fo",
    "perfedavg_hf",
    "pfedme",
    "pooled",
    "qfedavg",
    "scaffold",
]
