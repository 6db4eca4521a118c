"""What a sweep found: its best setting, its quickest, and a table of all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jfed import report
from jfed.run.sweep import Sweep


def best_setting(result: Sweep, metric: str, *, order: Callable = max) -> dict[str, float]:
    """The setting whose mean over seeds of the final `metric` is best; one that is not finite never is.

    Args:
      result: from `sweep`.
      metric: one that was judged.
      order: `max` if more is better, `min` if less is.

    Raises:
      ValueError: if there is no such metric, if `order` is neither, or if no setting ended finite.
    """
    best = _best("best_setting", result, metric, order)
    if best is None:
        raise ValueError(f"best_setting({metric!r}): no setting ended finite; sweep lower learning rates.")
    return result.settings[best]


class Quickest(NamedTuple):
    """The setting that took the least to reach a target."""

    setting: dict[str, float]
    index: int  # of it in the sweep's settings
    reached: list[float | None]  # for each seed, where it reached the target; None if it did not


def quickest_setting(result: Sweep, metric: str, target: float, *, at: str | None = None) -> Quickest:
    """The setting by which most seeds reach a target and, of several such, the soonest on average.

    A seed that does not reach it counts as long as it ran; if none does by any setting, the best at the end is chosen.

    Args:
      result: from `sweep`.
      metric: one that was judged, of which more is better.
      target: its value to reach; between two points of a curve as `report.reached` has it.
      at: a metric that was judged and rises, such as seconds, to go by in place of rounds.

    Raises:
      ValueError: if there is no such metric.

    >>> curves = {"accuracy": np.array([[[0.25, 0.5]], [[0.5, 1.0]]])}
    >>> result = Sweep([{"mu": 0.0}, {"mu": 0.1}], np.array([10, 20]), curves, (), 1)
    >>> quickest_setting(result, "accuracy", 0.75)
    Quickest(setting={'mu': 0.1}, index=1, reached=[15.0])
    """
    for name in (metric,) if at is None else (metric, at):
        _judged("quickest_setting", result, name)
    values = result.curves[metric]  # [settings, seeds, points]
    places = np.broadcast_to(result.rounds, values.shape) if at is None else result.curves[at]
    reached = [
        [report.reached(*curve, target) for curve in zip(*of_setting, strict=True)]
        for of_setting in zip(places, values, strict=True)
    ]

    def rank(i: int) -> tuple[float, ...]:
        counted = [end if r is None else r for r, end in zip(reached[i], places[i, :, -1], strict=True)]
        final = values[i, :, -1].mean()
        return sum(r is None for r in reached[i]), float(np.mean(counted)), -final if np.isfinite(final) else np.inf

    best = min(range(len(values)), key=rank)
    return Quickest(result.settings[best], best, reached[best])


def at_an_end(result: Sweep, setting: dict[str, float]) -> list[str]:
    """Hyperparameters of a setting at the lowest or highest of the values tried: a better one may lie beyond.

    >>> at_an_end(Sweep([{"mu": m, "rate": 0.1} for m in (0.0, 0.1, 0.2)], (), {}, (), 1), {"mu": 0.2, "rate": 0.1})
    ['mu']
    """
    tried = {name: {one[name] for one in result.settings} for name in setting}
    ends = {name: (min(values), max(values)) for name, values in tried.items() if len(values) > 1}
    return [name for name, value in setting.items() if value in ends.get(name, ())]


def sweep_table(result: Sweep, metric: str, *, order: Callable = max, title: str = "Sweep") -> str:
    """A table, one row a setting: mean over seeds of every final metric and, of several seeds, its deviation.

    The deviation is the sample standard deviation, under `<name>_std`. The setting that is best by
    `metric` is marked with a star.

    Args:
      result: from `sweep`.
      metric: the one that decides.
      order: `max` if more of it is better, `min` if less is.
      title: of the table.

    Raises:
      ValueError: if there is no such metric, or `order` is neither.

    >>> curves = {"accuracy": np.array([[[0.5], [0.7]], [[0.8], [0.9]]])}
    >>> result = Sweep([{"mu": 0.0}, {"mu": 0.1}], np.array([10]), curves, (), 1)
    >>> print(sweep_table(result, "accuracy"))
    Sweep
       mu   accuracy   accuracy_std   best
     ──────────────────────────────────────
        0        0.6         0.1414
      0.1       0.85        0.07071   *
    """
    best = _best("sweep_table", result, metric, order)
    rows = []
    for i, setting in enumerate(result.settings):
        row: dict[str, Any] = dict(setting)
        for name, curve in result.curves.items():
            final = curve[i, :, -1]
            row[name] = float(np.mean(final))
            if len(final) > 1:
                row[f"{name}_std"] = float(np.std(final, ddof=1))
        rows.append(row | {"best": "*" if i == best else ""})
    return report.table(title, rows)


def _best(where: str, result: Sweep, metric: str, order: Callable) -> int | None:
    _judged(where, result, metric)
    if order not in (max, min):
        raise ValueError(f"{where}(order={order!r}): order must be max or min; max if more of it is better.")
    means = result.curves[metric][:, :, -1].mean(1)
    sound = [i for i, mean in enumerate(means) if np.isfinite(mean)]
    return order(sound, key=lambda i: means[i]) if sound else None


def _judged(where: str, result: Sweep, metric: str) -> None:
    if metric not in result.curves:
        raise ValueError(f"{where}(metric={metric!r}): judged were {sorted(result.curves)}; name one of them.")
