"""Curves over rounds, points, and how a result is spread over clients."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jfed.plot._canvas import COLOURS, GREY, INK, canvas, label_ends, save

if TYPE_CHECKING:
    pass


def plot_curves(
    path: str | os.PathLike,
    curves: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    reference: Mapping[str, float] | None = None,
    expected: Mapping[str, tuple[Any, Any]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draws curves, each labelled at its end, and dashed lines to hold them against.

    Args:
      path: of the PNG file; its folder is made if it does not exist.
      curves: name -> (x, y), two sequences of equal length; a y that is None or NaN leaves a gap.
      xlabel: what is on the x axis, with its unit.
      ylabel: what is on the y axis, with its unit.
      title: one line.
      reference: name -> y of a horizontal dashed line, for example `{"centralised 85.2 %": 85.2}`.
      expected: name of a curve -> (x, y) of what it should be, dashed in the curve's colour.
      log_x: whether the x axis is logarithmic.
      log_y: whether the y axis is; a y of 0 or less then leaves a gap.

    Raises:
      ValueError: if there is no curve, an x and y differ in length, or something is expected of no curve.
    """
    if not curves:
        raise ValueError("plot_curves(curves={}): needs at least one curve; check that the run logged any rows.")
    expected = expected or {}
    if odd := set(expected) - set(curves):
        raise ValueError(
            f"plot_curves(expected={sorted(odd)}): there are no curves of these names; name some that are."
        )
    figure, axes = canvas(title, xlabel, ylabel)
    axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    reference = reference or {}
    ends = []

    def of(what, name, x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"plot_curves({what}[{name!r}]): x has shape {x.shape}, y {y.shape}; give equal lengths.")
        return x, np.where(y > 0, y, np.nan) if log_y else y

    for i, (name, (x, y)) in enumerate(curves.items()):
        x, y = of("curves", name, x, y)
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
        # Few points are shown as such; one alone would otherwise be invisible.
        marker = {"marker": "o", "markersize": 4} if len(x) <= 15 else {}
        axes.plot(x, y, color=colour, linestyle=style, linewidth=2, label=name, solid_capstyle="round", **marker)
        if name in expected:
            axes.plot(*of("expected", name, *expected[name]), color=colour, linestyle=(0, (3, 2)), linewidth=1.2)
        seen = np.flatnonzero(np.isfinite(y))
        if seen.size:
            ends.append((y[seen[-1]], name, colour))
    for name, y in reference.items():
        axes.axhline(y, color=GREY, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
        ends.append((y, name, GREY))
    axes.margins(x=0.02)
    label_ends(axes, ends)
    save(figure, path)


def plot_points(
    path: str | os.PathLike,
    groups: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
) -> None:
    """Draws named points, a colour and a marker for each group of them.

    Args:
      path: of the PNG file; its folder is made if it does not exist.
      groups: name of a group -> name of a point -> (x, y).
      xlabel: what is on the x axis, with its unit.
      ylabel: what is on the y axis, with its unit.
      title: one line.
      log_x: whether the x axis is logarithmic.

    Raises:
      ValueError: if there is no point.
    """
    if not any(groups.values()):
        raise ValueError("plot_points(groups): needs at least one point; check that there are results.")
    figure, axes = canvas(title, xlabel, ylabel)
    for i, (group, points) in enumerate((group, points) for group, points in groups.items() if points):
        x, y = np.array(list(points.values()), float).T
        axes.plot(x, y, "os^Dv"[i % 5], color=COLOURS[i % len(COLOURS)], markersize=6, label=group, zorder=3)
    if log_x:
        axes.set_xscale("log")
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9)
    _name_points(figure, axes, [(name, at) for points in groups.values() for name, at in points.items()])
    save(figure, path)


def _name_points(figure: Any, axes: Any, points: list[tuple[str, tuple[float, float]]]) -> None:
    """Writes each name beside its point, where it covers no other if there is such a place."""
    figure.draw_without_rendering()  # the scales are settled
    taken: list[Any] = []
    away = [(x, y, side) for y in (3, -8, 10, -15, 17, -22, 24, -29) for x, side in ((4, "left"), (-4, "right"))]
    for name, at in points:
        for x, y, side in away:
            label = axes.annotate(name, at, textcoords="offset points", xytext=(x, y), ha=side, fontsize=6, color=GREY)
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (x, y, side) == away[-1]:
                break
            label.remove()
        taken.append(box)


def plot_distribution(
    path: str | os.PathLike, values: Any, *, xlabel: str, title: str, bins: int | str = "auto"
) -> None:
    """Draws a histogram of one number a client, and marks the mean and the worst tenth.

    Args:
      path: of the PNG file; its folder is made if it does not exist.
      values: [C], for example each client's accuracy; higher is better; NaNs are left out.
      xlabel: what the numbers are, with their unit.
      title: one line.
      bins: how many bars, or a rule that `numpy.histogram_bin_edges` knows.

    Raises:
      ValueError: if there is no finite value.
    """
    values = np.asarray(values, float).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("plot_distribution(values=[]): needs at least one finite value; evaluate some clients first.")
    figure, axes = canvas(title, xlabel, "clients")
    values = np.sort(values)
    worst_count = max(1, len(values) // 10)
    mean, tenth = values.mean(), values[worst_count - 1]
    low, high = values.min(), values.max()
    if low == high:  # a rule would make one bar as wide as the picture
        low, high, bins = low - 0.5, high + 0.5, 11
    edges = np.histogram_bin_edges(values, bins, (low, high))
    worst, rest = values[:worst_count], values[worst_count:]
    axes.hist([worst, rest], edges, stacked=True, color=[COLOURS[1], COLOURS[0]], edgecolor="white", linewidth=0.6)
    # Room above the bars for three lines of text; clients are counted in whole numbers.
    axes.set_ylim(0, 1.32 * np.histogram(values, edges)[0].max())
    axes.yaxis.get_major_locator().set_params(integer=True)
    texts = [
        (mean, 0.985, f"mean {mean:.4g}", INK, "-", 0.8),
        (tenth, 0.92, f"worst 10 %: mean {worst.mean():.4g}\nall at most {tenth:.4g}", COLOURS[1], (0, (5, 4)), 0.28),
    ]
    for x, height, text, colour, style, turn in texts:
        axes.axvline(x, color=colour, linewidth=1.6, linestyle=style)
        # To the left of its line where there is room on that side, so that it does not leave the picture.
        left = (x - low) / (high - low) > turn
        axes.annotate(
            text,
            (x, height),
            (-6 if left else 6, 0),
            axes.get_xaxis_transform(),
            "offset points",
            color=colour,
            ha="right" if left else "left",
            va="top",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    save(figure, path)
