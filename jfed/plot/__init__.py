"""Pictures of runs: curves over rounds, how a result is spread over clients, who hears whom, and what is sent.

Drawn with matplotlib's objects, without its global state, so it works in threads and without a screen.

    plot_curves  plot_points  plot_distribution     runs
    plot_graphs  Graph  circle                      topologies
    plot_chunks  Chunks                             all-reduces
    plot_schedule                                   pipelines
"""

from jfed.plot._canvas import COLOURS
from jfed.plot.chunks import Chunks, plot_chunks
from jfed.plot.curves import plot_curves, plot_distribution, plot_points
from jfed.plot.graphs import Graph, circle, plot_graphs
from jfed.plot.schedules import plot_schedule

__all__ = [
    "COLOURS",
    "Chunks",
    "Graph",
    "circle",
    "plot_chunks",
    "plot_curves",
    "plot_distribution",
    "plot_graphs",
    "plot_points",
    "plot_schedule",
]
