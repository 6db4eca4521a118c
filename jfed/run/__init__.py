"""Running an algorithm: many rounds as one program, or one after another in your own loop; judging models."""

from jfed.run.evaluation import evaluate, evaluate_clients
from jfed.run.rounds import Moment, iterate, scan_rounds

__all__ = ["Moment", "evaluate", "evaluate_clients", "iterate", "scan_rounds"]
