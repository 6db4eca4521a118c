"""What every experiment script shares: its command line, its seeds, its folders.

out/config.json  out/summary.json            the experiment: means over seeds
out/seed_0/ ...                              one run folder a seed (`jfed.report`)
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfed import _validate, report


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every experiment; its own settings are the fields that a subclass adds."""

    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: bool = False
    """Take up the run in the folder `out`."""
    seeds: int = 1
    """Repeat with this many seeds and report means."""
    smoke: bool = False
    """A few seconds on embedded data, to see that everything works."""


def cli(main: Callable[[Any], None], options: type[Options], *, smoke: dict[str, Any]) -> None:
    """Reads the command line into `options` and calls `main` with it.

    A `ValueError` or a missing file ends the script with its one line; JFED_TRACEBACK=1 shows where
    it was raised.

    Args:
      main: does the work.
      options: a frozen dataclass derived from `Options`.
      smoke: the settings that `--smoke` replaces.
    """
    import tyro

    chosen = tyro.cli(options, description=sys.modules[options.__module__].__doc__)
    if chosen.smoke:
        chosen = dataclasses.replace(chosen, **smoke)
    try:
        main(chosen)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("JFED_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


def over_seeds(
    name: str, options: Options, one_seed: Callable[[report.Run, jax.Array], dict[str, Any]]
) -> tuple[report.Run, dict[str, Any]]:
    """Runs `one_seed` for every seed, each in a folder of its own, skipping those already finished.

    Args:
      name: of the experiment; names the default folder.
      options: of the experiment; all but `out` and `resume` must agree when a run is resumed.
      one_seed: given its open run folder and its key, does the work and returns its summary.

    Returns:
      `(run, summary)`: the experiment's own folder, and over seeds the mean of every number (and,
      under `<name>_std`, its sample standard deviation if there are several seeds). Hand both to
      `report.finish` when everything else is printed.

    Raises:
      ValueError: if `seeds` is not a whole number of at least 1, or as in `report.open_run`.
    """
    _validate.at_least_one(name, "seeds", options.seeds, "1 runs once")
    out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}" if options.out is None else options.out
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "resume")}
    whole = report.open_run(out, settings, resume=options.resume)
    summaries = []
    for seed in range(options.seeds):
        run = report.open_run(whole.folder / f"seed_{seed}", settings | {"seed": seed}, resume=True)
        if not run.finished:
            report.finish(run, one_seed(run, jax.random.key(seed)), show=False)
        summaries.append(run.summary)
    return whole, _mean(summaries)


def _mean(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    if len(summaries) == 1:
        return summaries[0]
    mean: dict[str, Any] = {"seeds": len(summaries)}
    for name in summaries[0]:
        values = [s[name] for s in summaries]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            mean[name] = float(np.mean(values))
            mean[f"{name}_std"] = float(np.std(values, ddof=1))
        else:  # a word, or a number that some seed did not reach
            mean[name] = values[0] if all(v == values[0] for v in values) else None
    return mean
