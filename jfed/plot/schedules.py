"""Pictures of pipelines: which stage does what in each tick."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jfed.plot._canvas import COLOURS, GREY, INK, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK)
    grid = figure.subplots(len(tables), squeeze=False, sharex=True, height_ratios=lines)[:, 0]
    for axes, (name, three) in zip(grid, tables.items(), strict=True):
        _draw_schedule(axes, name, three, lasts, 1.0 if ends < 80 else 80 / ends)
    grid[0].set_xlim(0, ends)
    grid[-1].set_xlabel("time", fontsize=10, color=INK)
    seen = sorted({int(op) for three in tables.values() for op in np.unique(three[0])} - {0})
    patches = [Patch(facecolor=COLOURS[op - 1], label=names[op]) for op in seen]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=9)
    save(figure, path)


def _draw_schedule(axes: "Axes", name: str, tables: Sequence[Any], lasts: Any, scale: float) -> None:
    """One panel: a box for each op, and a grey line where a device is idle."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    op, chunk, microbatch = tables
    begins = np.concatenate([[0.0], lasts[op].max(axis=1).cumsum()])
    axes.set_title(name, loc="left", fontsize=10, color=INK, pad=3)
    axes.set(ylim=(op.shape[1] - 0.5, -0.5), yticks=range(op.shape[1]), ylabel="device")
    axes.tick_params(colors=GREY, labelsize=8, length=0)
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
        ink = "white" if pale < 0.2 else INK
        look = {"fontsize": 7 * scale, "color": ink, "ha": "center", "va": "center_baseline", "zorder": 3}
        axes.text(*at, str(microbatch[tick, device] + 1), **look)
