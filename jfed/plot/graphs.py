"""Pictures of graphs: who hears whom."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jfed.plot._canvas import COLOURS, GREY, INK, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Graph(NamedTuple):
    """Who sends to whom, as it is drawn."""

    rounds: Sequence[Sequence[tuple[int, int]]]  # in each round, which have colours of their own: from, to
    positions: Any  # [n, 2], where peers are, y upwards; of any scale
    note: str = ""  # below the name


def circle(n: int) -> np.ndarray:
    """[n, 2], positions of peers on a circle, the first at the top, clockwise.

    >>> print(circle(4).round(9) + 0.0)
    [[ 0.  1.]
     [ 1.  0.]
     [ 0. -1.]
     [-1.  0.]]
    """
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.sin(angle), np.cos(angle)], axis=1)


def plot_graphs(path: str | os.PathLike, graphs: Mapping[str, Graph], *, title: str, across: int = 6) -> None:
    """Draws graphs, a panel each: a line between two peers that hear each other, an arrow where only one hears.

    Args:
      path: of the PNG file; its folder is made if it does not exist.
      graphs: name -> graph; an edge is bent where it would cross a peer, or lie on one of an earlier round.
      title: one line.
      across: panels in a line.

    Raises:
      ValueError: if there is no graph, positions are not [n, 2], or an edge has an end that has none.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not graphs:
        raise ValueError("plot_graphs(graphs={}): needs at least one graph; give its edges and positions.")
    for name, graph in graphs.items():
        shape, ends = np.shape(graph.positions), np.array([end for edges in graph.rounds for end in edges], int)
        if len(shape) != 2 or shape[1] != 2 or (ends.size and not 0 <= ends.min() <= ends.max() < shape[0]):
            most = f", and edges go to peer {ends.max()}" if ends.size else ""
            raise ValueError(f"plot_graphs({name!r}): positions have shape {shape}{most}; give [n, 2], one for each.")
    across = min(across, len(graphs))
    down = -(-len(graphs) // across)
    most = max(len(graph.rounds) for graph in graphs.values())
    figure = Figure(figsize=(1.9 * across + 0.2, 2.3 * down + 0.8), dpi=160, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, graph) in zip(panels, graphs.items(), strict=False):
        _draw_graph(axes, name, graph)
    for axes in panels[len(graphs) :]:
        axes.set_axis_off()
    if most > 1:
        lines = [Line2D([], [], color=COLOURS[r % len(COLOURS)], label=f"round {r + 1}") for r in range(most)]
        figure.legend(handles=lines, loc="outside lower left", ncols=most, frameon=False, fontsize=9)
    save(figure, path)


def _draw_graph(axes: "Axes", name: str, graph: Graph) -> None:
    """One panel."""
    from matplotlib.patches import FancyArrowPatch

    x = np.asarray(graph.positions, float)
    middle, half = (x.max(0) + x.min(0)) / 2, max(float(np.ptp(x, axis=0).max()) / 2, 1e-9)
    x = (x - middle) / half
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(name, loc="center", fontsize=10, color=INK, pad=2)
    axes.set_xlabel(graph.note, fontsize=8, color=GREY, labelpad=1)
    size = 5.5 if len(x) <= 20 else 3.0
    drawn: dict[tuple[int, int], int] = {}
    for r, edges in enumerate(graph.rounds):
        edges = {(int(i), int(j)) for i, j in edges}
        for i, j in sorted(edges):
            if both := (j, i) in edges:
                if i > j:
                    continue
            pair = (min(i, j), max(i, j))
            bend = 0.2 * _crosses(x, i, j) + 0.14 * drawn.get(pair, 0)
            drawn[pair] = drawn.get(pair, 0) + 1
            look = {"arrowstyle": "-"} if both else {"arrowstyle": "-|>", "mutation_scale": 6}
            look |= {"color": COLOURS[r % len(COLOURS)], "linewidth": 0.9, "alpha": 0.8, "zorder": 1, "clip_on": False}
            away = {"shrinkA": size / 2, "shrinkB": size / 2, "connectionstyle": f"arc3,rad={bend}"}
            axes.add_patch(FancyArrowPatch(tuple(x[i]), tuple(x[j]), **look, **away))
    axes.plot(*x.T, "o", color=INK, markersize=size, markeredgecolor="white", markeredgewidth=0.6, zorder=2)


def _crosses(x: np.ndarray, i: int, j: int) -> bool:
    """Whether another peer lies on the straight line from one to another."""
    way = x[j] - x[i]
    length = max(float(np.hypot(*way)), 1e-9)
    along = (x - x[i]) @ way / length**2
    aside = np.abs((x - x[i]) @ np.array([-way[1], way[0]])) / length
    near = (along > 0.02) & (along < 0.98) & (aside < 0.06)
    near[[i, j]] = False
    return bool(near.any())
