"""What a run shows on the terminal: progress, tables, numbers a person can read."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jfed import _validate


@contextlib.contextmanager
def progress(
    total: int, description: str, *, start: int = 0, unit: str = "rounds", seconds: float = 10.0, writer: bool = True
) -> Iterator[Callable[..., None]]:
    """Shows how far a loop is, on stderr: a live bar on a terminal, elsewhere a plain line now and then.

    Yields `advance(n=1, **metrics)`. Metrics may be arrays on a device: they are fetched only when
    shown, so that dispatch stays ahead.

    Args:
      total: how many units make the whole.
      description: a word or two.
      start: units done before, as in a resumed run; they do not count for the rate.
      unit: what is counted.
      seconds: between plain lines.
      writer: False shows nothing; pass `run.writer`.

    >>> with progress(200, "FedAvg", writer=False) as advance:
    ...     advance(10, loss=0.31)
    """
    _validate.positive("progress", "total", total, "give the number of rounds")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    live = writer and (console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    bar = Progress(*columns, console=console) if live else None
    task = bar.add_task(description, total=total, completed=start, status="") if bar else None
    done, shown = start, -math.inf
    seen = deque([(time.monotonic(), start)], maxlen=50)  # recent times, for a rate that follows changes

    def advance(n: int = 1, **metrics: Any) -> None:
        nonlocal done, shown
        done, now = done + n, time.monotonic()
        seen.append((now, done))
        if not writer or (now - shown < (0.1 if bar else seconds) and done < total):
            return
        shown = now
        rate = (done - seen[0][1]) / max(now - seen[0][0], 1e-9)
        left = f"{human_seconds((total - done) / rate)} left" if rate > 0 and done < total else ""
        texts = [f"{rate:.3g} {unit}/s", left, *(f"{name} {_cell(value)}" for name, value in metrics.items())]
        status = " · ".join(filter(None, texts))
        if bar:
            bar.update(task, completed=done, status=status)
        else:
            console.print(f"{description} {done}/{total} {unit} · {status}", highlight=False, soft_wrap=True)

    with bar or contextlib.nullcontext():
        yield advance


def table(title: str, rows: list[Mapping[str, Any]]) -> str:
    """A table as text, its columns the keys in order of appearance; numbers to four digits.

    >>> print(table("Uplink", [{"method": "FedAvg", "sent": "7.0 MB"}, {"method": "top-k", "accuracy": 0.85}]))
    Uplink
      method   sent     accuracy
     ────────────────────────────
      FedAvg   7.0 MB   –
      top-k    –        0.85
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(not isinstance(row.get(name, 0.0), str) for row in rows) and all(name in row for row in rows)
        grid.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(_cell(row.get(name)) for name in names))
    console = Console(width=10_000, color_system=None, force_terminal=False, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def human_bytes(n: float) -> str:
    """Bytes in decimal units.

    >>> human_bytes(999), human_bytes(7_000_000), human_bytes(999_999)
    ('999 B', '7.0 MB', '1.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < (999.5 if unit == "B" else 999.95) or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """A duration in the units one would say it in.

    >>> [human_seconds(s) for s in (0.0032, 12.34, 125, 7380)]
    ['3.2 ms', '12.3 s', '2 min 05 s', '2 h 03 min']
    """
    if seconds < 0.99995:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _cell(value: Any) -> str:
    """A value as a person reads it: numbers, arrays of one number included, to four digits."""
    if value is None:
        return "–"
    if isinstance(value, str | bool | int):
        return str(value)
    return f"{float(value):.4g}"
