"""Runs a script as several local processes that form one JAX program.

    python -m jfed.launch -n 4 script.py --its --own arguments

The script stays as it is: before it starts, each process joins the others by
`jax.distributed.initialize`, so `jax.devices()` and `jfed.mesh.make()` span all of them. This is how a
program for many hosts is rehearsed, and run, on the CPU cores of one machine; accelerators of one
machine need no second process. Slurm, Kubernetes and Cloud TPU start processes themselves.

Each process computes with its share of the cores as threads: N pools of all cores each would fight.
"""

import argparse
import contextlib
import os
import queue
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from jfed import _validate

_GRACE = 3.0  # seconds between asking a process to end and ending it
_SHOWN = 40  # lines of a failed process


def run(script: str, arguments: Sequence[str] = (), *, processes: int, devices_per_process: int = 1) -> int:
    """Runs a script in several processes on this machine's CPU and waits for all of them.

    The first process has this one's standard input and output. Of the others, output is kept, and its end
    shown on standard error, each line with the process's number, if one of them fails. When one fails,
    or this process is interrupted or told to end (if this is its main thread), the others are ended.

    Args:
      script: path of a Python script.
      arguments: handed to the script.
      processes: how many, all on this machine.
      devices_per_process: virtual CPU devices each process has.

    Returns:
      0, or the exit code of the process that failed first, 128 + n if signal n ended it or this process.

    Raises:
      ValueError: if a number is not a whole number of at least 1, or there is no such script.
    """
    for name, value in (("processes", processes), ("devices_per_process", devices_per_process)):
        _validate.at_least_one("launch", name, value, "2 is a rehearsal")
    if not Path(script).is_file():
        raise ValueError(f"launch(script={script!r}): there is no such file; give the path of a Python script.")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{flags} --xla_force_host_platform_device_count={devices_per_process}".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # NPROC is how many threads XLA:CPU computes with. Cores themselves are not dealt out: on a machine that others
    # use too, a process bound to a busy core holds up all.
    env = {"NPROC": str(max(cores // processes, 1))} | os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    children: list[subprocess.Popen] = []
    in_charge = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM) if in_charge}
    if in_charge:
        signal.signal(signal.SIGTERM, _interrupted)
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        outputs = [{}] + [{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT} for log in logs]
        try:
            for i, output in enumerate(outputs):
                command = [sys.executable, "-m", "jfed.launch", "--child", address, str(processes), str(i)]
                children.append(subprocess.Popen([*command, script, *arguments], env=env, **output))
            failed = _first_failure(children)
        except KeyboardInterrupt as told:
            print(f"launch: interrupted; ending {processes} processes.", file=sys.stderr)
            return 128 + getattr(told, "signum", signal.SIGINT)
        finally:
            for signum in before:  # a second signal must not leave children behind; _end is soon over
                signal.signal(signum, signal.SIG_IGN)
            _end(children)
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if failed is None:
            return 0
        _show(logs)
    code = children[failed].returncode
    reason = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    print(f"launch: process {failed} of {processes} ended with {reason}; the others were ended.", file=sys.stderr)
    return code if code > 0 else 128 - code


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jfed.launch", description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many, all on this machine")
    parser.add_argument("--devices-per-process", type=int, default=1, help="virtual CPU devices of each (default 1)")
    parser.add_argument("script", help="Python script to run in each")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the script")
    chosen = parser.parse_args(argv)
    try:
        return run(
            chosen.script,
            chosen.arguments,
            processes=chosen.processes,
            devices_per_process=chosen.devices_per_process,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class _Told(KeyboardInterrupt):
    signum = signal.SIGTERM


def _interrupted(signum, frame):
    raise _Told


def _first_failure(children: list[subprocess.Popen]) -> int | None:
    """Waits until all children have ended well, or one has not; returns which.

    The others may fail as soon as it is gone, so each is waited for by a thread of its own.
    """
    ended: queue.SimpleQueue = queue.SimpleQueue()
    for i, child in enumerate(children):
        threading.Thread(target=lambda i=i, child=child: ended.put((i, child.wait())), daemon=True).start()
    for _ in children:
        i, code = ended.get()
        if code:
            return i
    return None


def _end(children: list[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _GRACE
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _show(logs: list) -> None:
    for i, log in enumerate(logs, 1):
        log.seek(0)
        for line in log.read().decode(errors="replace").splitlines()[-_SHOWN:]:
            print(f"[{i}] {line}", file=sys.stderr)


def _child(address: str, processes: int, index: int, script: str, arguments: list[str]) -> None:
    """Joins the others, runs the script as if Python had been started with it, and leaves with them."""
    import jax

    jax.distributed.initialize(address, num_processes=processes, process_id=index)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX catches it, to save before a preemption; here it ends
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code:
        # Not sys.exit: on the way out JAX would wait for the others, who may wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    jax.distributed.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:])
    else:
        sys.exit(main(sys.argv[1:]))
