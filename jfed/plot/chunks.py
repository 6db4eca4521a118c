"""Pictures of an all-reduce: whose parts each device holds after every hop."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jfed.plot._canvas import COLOURS, GREY, INK, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Chunks(NamedTuple):
    """What n devices hold of m chunks after a step, and the messages that made it so."""

    counts: Any  # [n, m] int, how many devices' parts are summed in it; 0 where a device has nothing
    words: Sequence[Sequence[str]]  # [n, m], written in the cell
    messages: Sequence[tuple[int, int, int]]  # of the step: from, to, chunk


def plot_chunks(path: str | os.PathLike, phases: Mapping[str, Mapping[str, Chunks]], *, title: str) -> None:
    """Draws what devices hold chunk by chunk, a panel for each step, with an arrow for each message.

    Args:
      path: of the PNG file; its folder is made if it does not exist.
      phases: name of a phase, which begins a new line of panels -> name of a step -> what is held after it.
      title: one line.

    Raises:
      ValueError: if there is no step, or the counts and words of one are no tables of one shape.
    """
    from matplotlib.figure import Figure

    titled = [[(f"{phase}: {name}", step) for name, step in named.items()] for phase, named in phases.items()]
    steps = [panel for panels in titled for panel in panels]
    if not steps:
        raise ValueError("plot_chunks(phases={}): needs at least one step; check that something was sent.")
    for name, step in steps:
        if np.ndim(step.counts) != 2 or np.shape(step.counts) != np.shape(step.words):
            shapes = f"{np.shape(step.counts)} and {np.shape(step.words)}"
            raise ValueError(
                f"plot_chunks({name!r}): counts and words have shapes {shapes}; give one of each a device and chunk."
            )
    wide = min(4, max(map(len, titled)))
    lines = [panels[i : i + wide] for panels in titled for i in range(0, len(panels), wide)]
    high, across = (max(np.shape(step.counts)[i] for _, step in steps) for i in (0, 1))
    most = max(np.max(step.counts) for _, step in steps)
    size = (wide * (0.56 * across + 0.5) + 0.4, len(lines) * (0.56 * high + 0.8) + 1.1)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK)
    grid = figure.subplots(len(lines), wide, squeeze=False)
    for line, row in zip(lines, grid, strict=True):
        for axes in row[len(line) :]:
            axes.set_axis_off()
        for axes, (name, step) in zip(row, line, strict=False):
            _draw_chunks(axes, name, step, most)
        row[0].set_ylabel("device", fontsize=10, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("chunk", fontsize=10, color=INK)
    _chunks_legend(figure, int(most))
    save(figure, path)


def _draw_chunks(axes: "Axes", name: str, step: Chunks, most: int) -> None:
    """One panel: a cell for each device and chunk, and arrows."""
    from matplotlib.patches import FancyArrowPatch, Rectangle
    from matplotlib.path import Path as Line

    n, m = np.shape(step.counts)
    wide, high, middle = 0.76, 0.6, 0.5  # of a cell; where arrows go round
    axes.set(xlim=(-0.5, m - 0.36), ylim=(n - 0.5, -0.5), aspect="equal", xticks=range(m), yticks=range(n))
    axes.set_title(name, loc="left", fontsize=10, color=INK, pad=5)
    axes.tick_params(colors=GREY, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    came = {(to, chunk) for _, to, chunk in step.messages}
    for (device, chunk), count in np.ndenumerate(step.counts):
        edge = COLOURS[1] if (device, chunk) in came else "#B0B0B0"
        corner = (chunk - wide / 2, device - high / 2)
        look = {"facecolor": _shade(count, most), "edgecolor": edge, "linewidth": 1.6 if edge == COLOURS[1] else 0.7}
        axes.add_patch(Rectangle(corner, wide, high, **look))
        word = step.words[device][chunk]
        ink = "white" if count > 0.55 * most else INK
        axes.text(chunk, device, word, ha="center", va="center_baseline", fontsize=9 - max(0, len(word) - 4), color=ink)
    for sender, receiver, chunk in step.messages:
        if abs(sender - receiver) == 1:  # straight to the next cell
            way = np.sign(receiver - sender) * high / 2
            points = [(chunk, sender + way), (chunk, receiver - way)]
        else:  # beside the cells between
            out, side = chunk + wide / 2, chunk + middle
            points = [(out, sender), (side, sender), (side, receiver), (out, receiver)]
        look = {"color": COLOURS[1], "linewidth": 1.3, "arrowstyle": "-|>", "mutation_scale": 8, "joinstyle": "miter"}
        axes.add_patch(FancyArrowPatch(path=Line(points), shrinkA=0, shrinkB=0, **look))


def _chunks_legend(figure: "Figure", most: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_shade(i, most), edgecolor="#B0B0B0", label=str(i)) for i in range(1, most + 1)]
    patches.append(Line2D([], [], color=COLOURS[1], marker=">", markersize=5, label="sent in this step"))
    figure.legend(
        handles=patches,
        title="devices whose parts are summed, named in the cell",
        loc="outside lower left",
        ncols=len(patches),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        alignment="left",
    )


def _shade(count: int, most: int) -> tuple[float, ...]:
    """White for nothing, the first colour for all."""
    from matplotlib.colors import to_rgb

    share = float(count) / max(float(most), 1.0)
    return tuple(1 - share * (1 - c) for c in to_rgb(COLOURS[0]))
