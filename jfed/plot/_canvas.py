"""The style that all pictures share."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), "Color Universal Design": told apart with any colour vision. Yellow, too faint on
# white, is left out; black comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY = "#222222", "#6B6B6B"


def canvas(title: str, xlabel: str, ylabel: str) -> tuple["Figure", "Axes"]:
    """An empty picture in the kit's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.3), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.set_xlabel(xlabel, fontsize=11, color=INK)
    axes.set_ylabel(ylabel, fontsize=11, color=INK)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    axes.tick_params(colors=GREY, labelsize=10, length=3)
    return figure, axes


def label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Writes names to the right of the axes, at the height of each (y, name, colour), moved apart where needed."""
    gap = 0.062  # of the height of the axes: a line of text
    (left, _), _ = axes.get_xlim(), axes.get_ylim()  # which settles the scales
    heights = [(axes.transScale + axes.transLimits).transform((left, y))[1] for y, _, _ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], placed[-1] + gap) if placed else heights[i])
    # Pushed up from below they may stand too high as a whole: settle clusters around their own middle.
    for _ in range(200):
        for k in range(len(placed)):
            placed[k] = min(1.0, placed[k] + 0.1 * (heights[order[k]] - placed[k]))
        for k in range(len(placed) - 1):
            short = gap - (placed[k + 1] - placed[k])
            if short > 0:
                placed[k], placed[k + 1] = placed[k] - short / 2, placed[k + 1] + short / 2
    for height, i in zip(placed, order, strict=True):
        _, name, colour = ends[i]
        axes.annotate(
            name, (1, height), (6, 0), "axes fraction", "offset points", color=colour, va="center", fontsize=10
        )


def save(figure: "Figure", path: str | os.PathLike) -> None:
    import jax

    if jax.process_index():  # of many processes only the first writes
        return
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
