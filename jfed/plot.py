"""Pictures of runs: curves over rounds, how a result is spread over clients, who hears whom, and what is sent.

Drawn with matplotlib's objects, without its global state, so it works in threads and without a screen.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), "Color Universal Design": told apart with any colour vision. Yellow, too faint on
# white, is left out; black comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _GREY = "#222222", "#6B6B6B"


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
    figure, axes = _canvas(title, xlabel, ylabel)
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
        axes.axhline(y, color=_GREY, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
        ends.append((y, name, _GREY))
    axes.margins(x=0.02)
    _label_ends(axes, ends)
    _save(figure, path)


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
    figure, axes = _canvas(title, xlabel, ylabel)
    for i, (group, points) in enumerate((group, points) for group, points in groups.items() if points):
        x, y = np.array(list(points.values()), float).T
        axes.plot(x, y, "os^Dv"[i % 5], color=COLOURS[i % len(COLOURS)], markersize=6, label=group, zorder=3)
    if log_x:
        axes.set_xscale("log")
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9)
    _name_points(figure, axes, [(name, at) for points in groups.values() for name, at in points.items()])
    _save(figure, path)


def _name_points(figure: Any, axes: Any, points: list[tuple[str, tuple[float, float]]]) -> None:
    """Writes each name beside its point, where it covers no other if there is such a place."""
    figure.draw_without_rendering()  # the scales are settled
    taken: list[Any] = []
    away = [(x, y, side) for y in (3, -8, 10, -15, 17, -22, 24, -29) for x, side in ((4, "left"), (-4, "right"))]
    for name, at in points:
        for x, y, side in away:
            label = axes.annotate(name, at, textcoords="offset points", xytext=(x, y), ha=side, fontsize=6, color=_GREY)
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
    figure, axes = _canvas(title, xlabel, "clients")
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
        (mean, 0.985, f"mean {mean:.4g}", _INK, "-", 0.8),
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
    _save(figure, path)


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
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, graph) in zip(panels, graphs.items(), strict=False):
        _draw_graph(axes, name, graph)
    for axes in panels[len(graphs) :]:
        axes.set_axis_off()
    if most > 1:
        lines = [Line2D([], [], color=COLOURS[r % len(COLOURS)], label=f"round {r + 1}") for r in range(most)]
        figure.legend(handles=lines, loc="outside lower left", ncols=most, frameon=False, fontsize=9)
    _save(figure, path)


def _draw_graph(axes: "Axes", name: str, graph: Graph) -> None:
    """One panel."""
    from matplotlib.patches import FancyArrowPatch

    x = np.asarray(graph.positions, float)
    middle, half = (x.max(0) + x.min(0)) / 2, max(float(np.ptp(x, axis=0).max()) / 2, 1e-9)
    x = (x - middle) / half
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(name, loc="center", fontsize=10, color=_INK, pad=2)
    axes.set_xlabel(graph.note, fontsize=8, color=_GREY, labelpad=1)
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
    axes.plot(*x.T, "o", color=_INK, markersize=size, markeredgecolor="white", markeredgewidth=0.6, zorder=2)


def _crosses(x: np.ndarray, i: int, j: int) -> bool:
    """Whether another peer lies on the straight line from one to another."""
    way = x[j] - x[i]
    length = max(float(np.hypot(*way)), 1e-9)
    along = (x - x[i]) @ way / length**2
    aside = np.abs((x - x[i]) @ np.array([-way[1], way[0]])) / length
    near = (along > 0.02) & (along < 0.98) & (aside < 0.06)
    near[[i, j]] = False
    return bool(near.any())


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
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK)
    grid = figure.subplots(len(lines), wide, squeeze=False)
    for line, row in zip(lines, grid, strict=True):
        for axes in row[len(line) :]:
            axes.set_axis_off()
        for axes, (name, step) in zip(row, line, strict=False):
            _draw_chunks(axes, name, step, most)
        row[0].set_ylabel("device", fontsize=10, color=_INK)
    for axes in grid[-1]:
        axes.set_xlabel("chunk", fontsize=10, color=_INK)
    _chunks_legend(figure, int(most))
    _save(figure, path)


def _draw_chunks(axes: "Axes", name: str, step: Chunks, most: int) -> None:
    """One panel: a cell for each device and chunk, and arrows."""
    from matplotlib.patches import FancyArrowPatch, Rectangle
    from matplotlib.path import Path as Line

    n, m = np.shape(step.counts)
    wide, high, middle = 0.76, 0.6, 0.5  # of a cell; where arrows go round
    axes.set(xlim=(-0.5, m - 0.36), ylim=(n - 0.5, -0.5), aspect="equal", xticks=range(m), yticks=range(n))
    axes.set_title(name, loc="left", fontsize=10, color=_INK, pad=5)
    axes.tick_params(colors=_GREY, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    came = {(to, chunk) for _, to, chunk in step.messages}
    for (device, chunk), count in np.ndenumerate(step.counts):
        edge = COLOURS[1] if (device, chunk) in came else "#B0B0B0"
        corner = (chunk - wide / 2, device - high / 2)
        look = {"facecolor": _shade(count, most), "edgecolor": edge, "linewidth": 1.6 if edge == COLOURS[1] else 0.7}
        axes.add_patch(Rectangle(corner, wide, high, **look))
        word = step.words[device][chunk]
        ink = "white" if count > 0.55 * most else _INK
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


def plot_schedule(
    path: str | os.PathLike,
    schedules: Mapping[str, tuple[Any, Any, Any]],
    *,
    title: str,
    names: Sequence[str] = ("idle", "forward", "backward", "input gradient", "weight gradient"),
    lasts: Sequence[float] = (0.0, 1.0, 1.0, 1.0, 1.0),
) -> None:
    """Draws what devices do in each tick: a panel for each schedule, a line for each device, microbatches as numbers.

    Args:
      path: of the PNG file; its folder is made if it does not exist.
      schedules: name -> (op, chunk, microbatch), each [ticks, devices]; op 0 is idle. Later chunks are paler.
      title: one line.
      names: of the ops, by number.
      lasts: how long each op takes; a tick lasts as long as its slowest.

    Raises:
      ValueError: if there is no schedule, tables of one differ in shape, or an op has no name or no length of time.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not schedules:
        raise ValueError("plot_schedule(schedules={}): needs at least one schedule; give its three tables.")
    if len(names) != len(lasts):
        raise ValueError(f"plot_schedule(lasts={tuple(lasts)}): one for each of the {len(names)} names; give as many.")
    tables = {name: [np.asarray(table, int) for table in three] for name, three in schedules.items()}
    for name, three in tables.items():
        shapes = [table.shape for table in three]
        if len(three) != 3 or len(shapes[0]) != 2 or len(set(shapes)) > 1 or not three[0].size:
            raise ValueError(f"plot_schedule({name!r}: shapes {shapes}): must be three tables of a shape; see Args.")
        if three[0].min() < 0 or three[0].max() >= len(names):
            raise ValueError(f"plot_schedule({name!r}: op {three[0].max()}): must be 0 to {len(names) - 1}; name more.")
    lasts = np.asarray(lasts, float)
    ends = max(lasts[op].max(axis=1).sum() for op, _, _ in tables.values())
    lines = [op.shape[1] for op, _, _ in tables.values()]
    size = (float(np.clip(0.2 * ends + 1, 6, 16)), sum(0.24 * n + 0.42 for n in lines) + 0.9)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK)
    grid = figure.subplots(len(tables), squeeze=False, sharex=True, height_ratios=lines)[:, 0]
    for axes, (name, three) in zip(grid, tables.items(), strict=True):
        _draw_schedule(axes, name, three, lasts, 1.0 if ends < 80 else 80 / ends)
    grid[0].set_xlim(0, ends)
    grid[-1].set_xlabel("time", fontsize=10, color=_INK)
    seen = sorted({int(op) for three in tables.values() for op in np.unique(three[0])} - {0})
    patches = [Patch(facecolor=COLOURS[op - 1], label=names[op]) for op in seen]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=9)
    _save(figure, path)


def _draw_schedule(axes: "Axes", name: str, tables: Sequence[Any], lasts: Any, scale: float) -> None:
    """One panel: a box for each op, and a grey line where a device is idle."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    op, chunk, microbatch = tables
    begins = np.concatenate([[0.0], lasts[op].max(axis=1).cumsum()])
    axes.set_title(name, loc="left", fontsize=10, color=_INK, pad=3)
    axes.set(ylim=(op.shape[1] - 0.5, -0.5), yticks=range(op.shape[1]), ylabel="device")
    axes.tick_params(colors=_GREY, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    for device in range(op.shape[1]):
        axes.plot([0, begins[-1]], [device] * 2, color="#D5D5D5", linewidth=1, zorder=1)
    for (tick, device), kind in np.ndenumerate(op):
        if kind == 0:
            continue
        pale = 0.45 * chunk[tick, device] / max(1, chunk.max())
        colour = tuple(c + pale * (1 - c) for c in to_rgb(COLOURS[kind - 1]))
        corner, wide = (begins[tick], device - 0.42), lasts[kind]
        axes.add_patch(Rectangle(corner, wide, 0.84, facecolor=colour, edgecolor="white", linewidth=0.5, zorder=2))
        at = (begins[tick] + wide / 2, device)
        ink = "white" if pale < 0.2 else _INK
        look = {"fontsize": 7 * scale, "color": ink, "ha": "center", "va": "center_baseline", "zorder": 3}
        axes.text(*at, str(microbatch[tick, device] + 1), **look)


def _canvas(title: str, xlabel: str, ylabel: str) -> tuple["Figure", "Axes"]:
    """An empty picture in the kit's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.3), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    axes.set_xlabel(xlabel, fontsize=11, color=_INK)
    axes.set_ylabel(ylabel, fontsize=11, color=_INK)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B0B0B0")
    axes.tick_params(colors=_GREY, labelsize=10, length=3)
    return figure, axes


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
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


def _save(figure: "Figure", path: str | os.PathLike) -> None:
    import jax

    if jax.process_index():  # of many processes only the first writes
        return
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
