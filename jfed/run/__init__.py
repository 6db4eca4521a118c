"""Running an algorithm: many rounds as one program, or one after another in your own loop; judging models; sweeps."""

from jfed.run.choose import Quickest, at_an_end, best_setting, quickest_setting, sweep_table
from jfed.run.evaluation import Scores, evaluate, evaluate_adapted, evaluate_clients, evaluate_peers
from jfed.run.rounds import Moment, iterate, scan_rounds
from jfed.run.stream import stream, stream_clients
from jfed.run.sweep import Sweep, sweep

__all__ = [
    "Moment",
    "Quickest",
    "Scores",
    "Sweep",
    "at_an_end",
    "best_setting",
    "evaluate",
    "evaluate_adapted",
    "evaluate_clients",
    "evaluate_peers",
    "iterate",
    "quickest_setting",
    "scan_rounds",
    "stream",
    "stream_clients",
    "sweep",
    "sweep_table",
]
