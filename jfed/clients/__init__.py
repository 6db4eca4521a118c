"""Client maps: how the work of one client is run for a whole cohort.

`vectorised` trains all clients side by side until the longest is done; `lanes` keeps a fixed number
of model copies alive; `sharded` deals clients to the devices of a mesh and runs either of the two on
each; `dealt` does so where each device has only its own clients' examples. A round's result does not
depend on which is used, up to the order of float additions.
"""

from jfed.clients.dealt import dealt
from jfed.clients.lanes import lanes
from jfed.clients.sharded import sharded
from jfed.clients.stationary import stationary
from jfed.clients.vectorised import vectorised
from jfed.clients.width import Explanation, explain

__all__ = ["Explanation", "explain", "dealt", "lanes", "sharded", "stationary", "vectorised"]
