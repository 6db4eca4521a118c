"""How peers hear each other: every peer's model becomes a weighted sum of its own and of those it hears.

A mixing maps a `Topology` to a `Mixer`, which does one round of it: as a product of matrices (`dense`), by gathering
rows (`sparse`), or by collective permutes between devices with one peer each, or a block of them (`on_mesh`). All give
the same result. What came through in a round, and with which weights, is data (`weights_of`), so links may fail and
peers leave within one compiled program. Sums are taken of differences, `x_i + sum_j w_ij (x_j - x_i)` where weights add
up to 1, so that peers who agree stay where they are to the last bit.

    weights      what messages weigh: own_instead  renormalised  nothing_instead  nothing  mass_returned  mass_replaced
    mixer        the type
    one_device   dense  sparse  automatic
    devices      on_mesh
"""

from jfed.gossip.mix.devices import on_mesh
from jfed.gossip.mix.mixer import Mixer, Mixing, column, decoded
from jfed.gossip.mix.one_device import automatic, dense, sparse
from jfed.gossip.mix.weights import (
    Coming,
    Lost,
    Weights,
    heard_by_all,
    mass_replaced,
    mass_returned,
    nothing,
    nothing_instead,
    only_of,
    own_instead,
    renormalised,
    weights_of,
)

__all__ = [
    "Coming",
    "Lost",
    "Mixer",
    "Mixing",
    "Weights",
    "automatic",
    "column",
    "decoded",
    "dense",
    "heard_by_all",
    "mass_replaced",
    "mass_returned",
    "nothing",
    "nothing_instead",
    "on_mesh",
    "only_of",
    "own_instead",
    "renormalised",
    "sparse",
    "weights_of",
]
