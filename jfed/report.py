"""The run folder, which is the truth about a run, and what is shown of it on the terminal.

    folder/config.json      the experiment's settings, and the versions and devices it ran with
    folder/metrics.jsonl    one JSON object a line, each with its "round"
    folder/summary.json     the result; there once the run is finished
    folder/checkpoints/     for `jfed.checkpoint`

Every file is written whole or a whole line at a time, so a kill costs at most the line being written.
All JSON is strict: a NaN or infinite number becomes null, in the config its name. Of many processes
only the first writes.
"""

import dataclasses
import enum
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfed import _machine
from jfed._terminal import human_bytes, human_seconds, progress, table

__all__ = [
    "Run",
    "fairness",
    "finish",
    "human_bytes",
    "human_seconds",
    "log",
    "mean_and_std",
    "open_run",
    "progress",
    "reached",
    "rewind",
    "rounds_to",
    "rows",
    "spread",
    "table",
    "worst_tenth",
]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that is open for writing; make one with `open_run`."""

    folder: Path
    config: dict[str, Any]
    writer: bool  # whether this process is the one that writes

    @property
    def checkpoints(self) -> Path:
        """The folder for `jfed.checkpoint`."""
        return self.folder / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.summary is not None


def open_run(folder: str | os.PathLike, config: Any, *, resume: bool = False, writer: bool | None = None) -> Run:
    """Starts a run in a new folder, or takes up the one that is there.

    Args:
      folder: made if it does not exist.
      config: a dict or dataclass of numbers, strings, lists and dicts.
      resume: take up the run in `folder`; where there is none, start it.
      writer: whether this process writes; by default, whether it is process 0 of `jax.distributed`.

    Returns:
      A `Run`; look at `run.finished` before any work.

    Raises:
      ValueError: if `folder` holds a run and `resume` is False, or one with another config, or something
        else; or if it cannot be written. Nothing in it is touched.
    """
    folder = Path(folder).absolute()
    config = _plain(config, "config", nonfinite=str)
    writer = jax.process_index() == 0 if writer is None else writer
    run = Run(folder, config, writer)
    if not writer:
        return run
    try:
        if (folder / "config.json").exists():
            _check_same_run(folder, config, resume)
        else:
            # A kill may have left a start that did not get as far as config.json.
            others = set(os.listdir(folder)) - {"config.json.tmp"} if folder.exists() else set()
            if others:
                raise ValueError(f"open_run({folder}): holds {min(others)} but no run; choose another --out.")
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "config.json", json.dumps({"config": config, "environment": _environment()}, indent=2))
        run.checkpoints.mkdir(exist_ok=True)
        _mend(folder / "metrics.jsonl")
    except OSError as error:
        cure = "choose another --out or change its permissions."
        raise ValueError(f"open_run({folder}): cannot be written ({error.strerror}); {cure}") from error
    return run


def log(run: Run, row: Mapping[str, Any]) -> None:
    """Appends a row, which has a "round", to the metrics, and returns when it is on disk.

    Raises:
      ValueError: if there is no whole number under "round", or a value JSON does not know.
    """
    row = _plain(row, "row")
    if isinstance(row.get("round"), bool) or not isinstance(row.get("round"), int):
        raise ValueError(f"log(row={row}): needs a whole number under 'round'; add the rounds completed.")
    if run.writer:
        with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def rows(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics of a run folder; a last line torn by a kill is left out.

    Raises:
      ValueError: if there are no metrics, or a line that is not the last is not JSON.
    """
    return [json.loads(line) for line in _lines(Path(folder))]


def rewind(run: Run, round: int) -> None:
    """Drops the rows after `round`, and a torn last line, as if the run had stopped there.

    A resumed run calls this with the step of the checkpoint it restored, or 0 if there is none; its
    metrics then end up equal, byte for byte, to those of a run that was never stopped.
    """
    if run.writer:
        kept = [line for line in _lines(run.folder) if json.loads(line)["round"] <= round]
        _write(run.folder / "metrics.jsonl", "".join(kept))


def rounds_to(rows: list[dict[str, Any]], name: str, target: float) -> float | None:
    """Rounds until the best `name` so far reaches `target`, between two rows by linear interpolation.

    This is how McMahan et al. 2017 (arXiv:1602.05629) read their curves.

    Args:
      rows: of a run, in order; ones where `name` is None count as no better.
      name: a column where more is better.
      target: its value to reach.

    Returns:
      The rounds, or None if it is never reached.

    >>> rounds_to([{"round": 1, "a": 0.5}, {"round": 2, "a": 0.3}, {"round": 3, "a": 0.9}], "a", 0.7)
    2.5
    """
    values = [math.nan if row[name] is None else row[name] for row in rows]
    return reached([row["round"] for row in rows], values, target)


def reached(at: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Where the best of `values` so far reaches `target`, between two points by linear interpolation.

    Args:
      at: rounds, seconds or bytes, rising, one for each value.
      values: more is better; NaN is no better.
      target: the value to reach.

    Returns:
      The place, or None if it is never reached.

    >>> reached([10.0, 20.0, 30.0], [0.5, 0.3, 0.9], 0.7)
    25.0
    """
    before, best = 0.0, -math.inf
    for place, value in zip(at, values, strict=True):
        if value >= target:
            share = 1.0 if best == -math.inf else (target - best) / (value - best)
            return float(before + share * (place - before))
        before, best = place, max(best, value) if value == value else best
    return None


def worst_tenth(values: Any) -> float:
    """Mean of the lowest `max(1, floor(N / 10))` of N numbers; NaNs, clients with nothing to judge, are left out.

    This is the figure of the fairness literature (Li et al. 2020, arXiv:1905.10497).

    >>> worst_tenth([0.5, 0.1, 0.9, math.nan])
    0.1
    """
    values = np.sort(np.asarray(values, float).ravel())
    values = values[np.isfinite(values)]
    return float(values[: max(1, len(values) // 10)].mean())


def mean_and_std(values: Any, digits: int = 1) -> str:
    """A cell of a table: mean and sample standard deviation; `-` if some value is not finite.

    >>> mean_and_std([83.0, 84.0, 85.0]), mean_and_std([84.0]), mean_and_std([84.0, math.nan])
    ('84.0 ± 1.0', '84.0', '-')
    """
    values = np.asarray(values, float).ravel()
    if not values.size or not np.all(np.isfinite(values)):
        return "-"
    spread = f" ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def spread(name: str, values: Any) -> dict[str, float]:
    """Mean and, of several values, sample standard deviation, as entries of a summary.

    >>> spread("accuracy", [0.5, 0.25, 0.75])
    {'accuracy': 0.5, 'accuracy_std': 0.25}
    """
    values = np.asarray(values, float).ravel()
    std = {f"{name}_std": float(values.std(ddof=1))} if values.size > 1 else {}
    return {name: float(values.mean())} | std


def fairness(values: Any) -> dict[str, float]:
    """How evenly a result is spread over clients, as the fairness literature reports it.

    `worst_tenth` and `best_tenth` are means over `max(1, floor(N / 10))` clients; the variance is over
    all N, in squared units of the values: of accuracies in per cent it is that of Li et al. 2020
    (arXiv:1905.10497), Table 1. NaNs, clients with nothing to judge, and infinities are left out.

    >>> spread = fairness([50.0, 10.0, 90.0, math.nan])
    >>> print({name: round(value, 1) for name, value in spread.items()})
    {'mean': 50.0, 'worst_tenth': 10.0, 'best_tenth': 90.0, 'variance': 1066.7}
    """
    values = np.asarray(values, float).ravel()
    values = values[np.isfinite(values)]
    return {
        "mean": float(values.mean()),
        "worst_tenth": worst_tenth(values),
        "best_tenth": -worst_tenth(-values),
        "variance": float(values.var()),
    }


def finish(run: Run, summary: Mapping[str, Any], *, show: bool = True) -> dict[str, Any]:
    """Writes the summary and prints it, one line of JSON: the last line of an experiment's output.

    With `show=False`, for a run that is part of a larger one, it is not printed. For a run that was
    finished before, `finish(run, run.summary)` prints the same line again. Returns what it wrote, or
    would have, were this process the writer.
    """
    summary = _plain(summary, "summary")
    if run.writer:
        text = json.dumps(summary, allow_nan=False) + "\n"
        _write(run.folder / "summary.json", text)
        if show:
            print(text, end="", flush=True)
    return summary


def _check_same_run(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Raises a `ValueError` unless the run in `folder` may be resumed with `config`."""
    if not resume:
        raise ValueError(f"open_run({folder}): holds a run already; continue it with --resume or choose another --out.")
    try:
        held = _flat(json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"open_run({folder}): config.json is damaged; choose another --out.") from error
    given = _flat(config)
    names = [name for name in {**held, **given} if held.get(name, "absent") != given.get(name, "absent")]
    if names:
        changes = ", ".join(f"{n} was {held.get(n, 'absent')!r}, is {given.get(n, 'absent')!r}" for n in names)
        raise ValueError(f"open_run({folder}): another config ({changes}); use the old one or choose another --out.")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _environment() -> dict[str, Any]:
    """What, besides the config, a result may depend on."""
    return {
        "jfed": _machine.version(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def _plain(value: Any, name: str, nonfinite: Callable[[float], Any] = lambda _: None) -> Any:
    """`value` as strict JSON has it: no numpy, jax, tuples, NaN; `name` is for the error."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}[{key!r}]", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, jax.Array | np.ndarray | np.generic) and np.asarray(value).dtype.kind != "O":
        return _plain(np.asarray(value).tolist(), name, nonfinite)
    raise ValueError(f"{name}={value!r}: a {type(value).__name__} is not JSON; give numbers, strings, lists or dicts.")


def _lines(folder: Path) -> list[str]:
    """The whole lines of the metrics, each found to be an object of JSON."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"rows({folder}): holds no metrics.jsonl; give the folder of a run.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)["round"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"rows({folder}): line {number} of metrics.jsonl is damaged; remove it.") from error
    return [line + "\n" for line in lines]


def _mend(path: Path) -> None:
    """Makes sure of a file that ends with a whole line, so that the next one is not glued to a torn one."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _write(path: Path, text: str) -> None:
    """Puts `text` in place of the file at `path`, in one step and through to the disk."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
