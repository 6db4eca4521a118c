"""The launcher, with scripts small enough to start in a second or two."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jfed import launch

# A script that knows nothing of processes, told apart by what JAX says.
SCRIPT = """
import os, sys, time, jax, jax.numpy as jnp
from jax.experimental import multihost_utils
i, what = jax.process_index(), sys.argv[1]
open(sys.argv[2] + str(i), "w").write(f"{os.getpid()} {os.environ['NPROC']}")
print("process", i, "of", jax.process_count(), "with", jax.device_count(), "devices", __name__, sys.argv[3:])
print(multihost_utils.process_allgather(jnp.int32(i)).sum())  # both are up
if what == "fails" and i == 1:
    sys.exit(7)
if what == "raises" and i == 1:
    raise KeyError("nobody")
if what == "is killed" and i == 1:
    os.kill(os.getpid(), 9)
if what != "ends":  # the first waits for the other, which does not come
    multihost_utils.sync_global_devices("together") if i == 0 else time.sleep(600)
"""


@pytest.fixture(autouse=True)
def heard():
    """A shell starts what it runs in the background deaf to interrupts, and so would be all that these tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder, what, *arguments, processes=2):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "jfed.launch", "-n", str(processes), "--devices-per-process", "3", str(script)]
    return subprocess.Popen(
        [*command, what, str(folder / "process_"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(folder):
    return [int(path.read_text().split()[0]) for path in sorted(folder.glob("process_*"))]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unchanged_script_runs_as_one_program_of_all_processes(tmp_path):
    launched = start(tmp_path, "ends", "--rounds", "3")
    out, err = launched.communicate(timeout=120)
    assert launched.returncode == 0, err
    assert "process 0 of 2 with 6 devices __main__ ['--rounds', '3']" in out
    assert "process 1" not in out + err  # of the others nothing is shown where all went well
    threads = [int(path.read_text().split()[1]) for path in tmp_path.glob("process_*")]
    assert threads == [max(len(os.sched_getaffinity(0)) // 2, 1)] * 2


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("fails", 7, "launch: process 1 of 2 ended with exit code 7"),
        pytest.param("raises", 1, "[1] KeyError: 'nobody'", marks=pytest.mark.slow),
        pytest.param("is killed", 137, "launch: process 1 of 2 ended with signal SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_the_failure_of_one_ends_all_and_is_told(tmp_path, what, code, told):
    launched = start(tmp_path, what)
    _, err = launched.communicate(timeout=120)
    assert launched.returncode == code
    assert told in err
    assert "[1] process 1 of 2 with 6 devices" in err
    assert not any(map(alive, processes_of(tmp_path)))


@pytest.mark.slow
def test_it_runs_in_a_thread_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(3)")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(launch.run, str(script), processes=1).result() == 3


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_ends_all(tmp_path, signum):
    launched = start(tmp_path, "waits")
    deadline = time.monotonic() + 60
    while len(processes_of(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    launched.send_signal(signum)
    launched.send_signal(signum)  # as a shell or `timeout` may
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 128 + signum
    assert "launch: interrupted" in err
    assert len(processes_of(tmp_path)) == 2 and not any(map(alive, processes_of(tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0", __file__], "error: launch(processes=0): processes must be a whole number of at least 1"),
        (["-n", "2", "--devices-per-process", "0", __file__], "error: launch(devices_per_process=0)"),
        (["-n", "2", "nothing.py"], "error: launch(script='nothing.py'): there is no such file"),
    ],
)
def test_what_cannot_be_launched_is_an_error_of_one_line(capsys, arguments, message):
    assert launch.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(message) and told.count("\n") == 1
