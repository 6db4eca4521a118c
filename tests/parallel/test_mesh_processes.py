"""Two real processes of four devices train over every mesh as one device does."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import meshes
import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mesh processes")]
CASES = [name for name, (_, axes, _) in meshes.CASES.items() if axes != {"data": 1}]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes say of all cases; started once, as starting takes longer than a case."""
    folder = tmp_path_factory.mktemp("said")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}"}
    command, here = [sys.executable, str(HERE / "meshes_of_processes.py"), port], []
    with contextlib.ExitStack() as files:
        for i in range(2):
            file = files.enter_context(open(folder / f"{i}.txt", "w"))
            here.append(subprocess.Popen([*command, str(i), *CASES], env=env, stdout=file, stderr=subprocess.STDOUT))
        try:
            for process in here:
                process.wait(timeout=1200)
        finally:
            for process in here:
                process.kill()
                process.wait()
    said = [(folder / f"{i}.txt").read_text() for i in range(2)]
    assert [process.returncode for process in here] == [0, 0], "\n".join(text[-3000:] for text in said)
    rows = [line.split()[1:] for text in said for line in text.splitlines() if line.startswith("case ")]
    return [(name, float(worst), int(programs)) for name, worst, programs in rows]


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_two_processes_is_one_devices(name, found):
    of_both = [row for row in found if row[0] == name]
    assert len(of_both) == 2
    assert all(worst < 1e-5 and programs == 1 for _, worst, programs in of_both)
