"""Two real processes of four devices train over every mesh as one device does."""

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
def found():
    """What both processes say of all cases; started once, as starting takes longer than a case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}"}
    together = [
        subprocess.Popen(
            [sys.executable, str(HERE / "meshes_of_processes.py"), port, str(i), *CASES],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], "\n".join(text[-3000:] for text in said)
    rows = [line.split()[1:] for text in said for line in text.splitlines() if line.startswith("case ")]
    return [(name, float(worst), int(programs)) for name, worst, programs in rows]


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_two_processes_is_one_devices(name, found):
    of_both = [row for row in found if row[0] == name]
    assert len(of_both) == 2
    assert all(worst < 1e-5 and programs == 1 for _, worst, programs in of_both)
