"""Running an algorithm: many rounds as one program, or one after another in your own loop; judging models; sweeps."""

from jfed.run.evaluation import evaluate, evaluate_adapted, evaluate_clients
from jfed.run.rounds import Moment, iterate, scan_rounds
from jfed.run.stream import stream, stream_clients
from jfed.run.sweep import Sweep, best_setting, sweep, sweep_table

__all__ = [
    "Moment",
    "Sweep",
    "best_setting",
    "evaluate",
    "evaluate_adapted",
    "evaluate_clients",
    "iterate",
    "scan_rounds",
    "stream",
    "stream_clients",
    "sweep",
    "sweep_table",
]
