"""Peers as processes: their environments, how they are talked to, what becomes of one that fails.

A peer that has nothing to do is stopped by a signal, so that its polling and spinning take nothing from
the one whose turn it is.
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ENVIRONMENTS = {
    "fedjax": ("fedjax==0.0.17", "jax==0.5.3", "jaxlib==0.5.3"),
    "pfl": ("pfl==0.6.0", "torch==2.13.0"),
    "flower": ("flwr[simulation]==1.42.0", "torch==2.13.0", "numpy==2.4.6"),
    "torch": ("torch==2.13.0", "numpy==2.4.6"),
}
"""What pip installs into each environment."""

SETTINGS = {
    "PYTHONPATH": str(HERE.parents[1]),
    # Threads that spin while they wait take the core from those that work.
    "OMP_WAIT_POLICY": "passive",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Failed(Exception):
    """A peer that crashed, hung or could not be set up; its text is one line."""


class Process(NamedTuple):
    """A running peer, in a process group of its own."""

    popen: subprocess.Popen
    log: Path  # its stderr
    patience: float  # seconds it may be silent


def start(script: str, environment: str | None, spec: dict[str, Any], folder: Path, *, venvs: Path, patience: float):
    """Starts `peers/<script>.py` and waits until it has its arrays.

    Args:
      script: its name.
      environment: a key of `ENVIRONMENTS`; None for this interpreter.
      spec: what the peer is to read, see `protocol.load`.
      folder: for its files; must not exist.
      venvs: where environments are, or are made.
      patience: seconds until a silent peer counts as hung.

    Returns:
      A `Process`.

    Raises:
      Failed: if the environment cannot be made or the peer does not start.
    """
    python = _python_of(environment, venvs)
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(spec))
    with open(folder / "stderr.txt", "w") as log:
        popen = subprocess.Popen(
            [str(python), str(HERE / f"{script}.py"), str(folder / "spec.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | SETTINGS,
            text=True,
            cwd=folder,
            start_new_session=True,
        )
    process = Process(popen, folder / "stderr.txt", patience)
    _hear(process)
    return process


def ask(process: Process, command: str) -> dict:
    """Wakes a peer, sends a command, and stops the peer once it has answered.

    Raises:
      Failed: if it dies or stays silent.
    """
    _signal(process, signal.SIGCONT)
    try:
        print(command, file=process.popen.stdin, flush=True)
    except OSError:
        pass  # it is dead: the answer that does not come says so
    return _hear(process)


def kill(process: Process) -> None:
    """Ends a peer and all it started."""
    _signal(process, signal.SIGKILL)
    process.popen.wait()


def _hear(process: Process) -> dict:
    with selectors.DefaultSelector() as selector:
        selector.register(process.popen.stdout, selectors.EVENT_READ)
        heard = selector.select(process.patience)
    line = process.popen.stdout.readline() if heard else ""
    if not line:
        kill(process)
        said = process.log.read_text(errors="replace")
        raise Failed(_last_error(said) if heard else f"silent for {process.patience:.0f} s")
    _signal(process, signal.SIGSTOP)
    return json.loads(line)


def _signal(process: Process, number: int) -> None:
    try:
        os.killpg(process.popen.pid, number)
    except ProcessLookupError:
        pass


def _last_error(said: str) -> str:
    """The line of a log that names the last error, or else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["ended without a word"]
    named = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    return (named or lines)[-1][:120]


def _python_of(environment: str | None, venvs: Path) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    if environment is None:
        return Path(sys.executable)
    place = venvs.absolute() / environment
    python = place / "bin" / "python"
    if not (place / "pyvenv.cfg").is_file():
        print(f"making {place} with {', '.join(ENVIRONMENTS[environment])}", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[environment]]
        done = subprocess.run(install, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            (place / "pyvenv.cfg").unlink()  # so that the next run tries again
            raise Failed(_last_error(done.stderr))
    return python
