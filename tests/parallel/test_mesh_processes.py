"""Two real processes of four devices train over every mesh as one device does."""

import json
from pathlib import Path

import meshes
import pytest
import together

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mesh processes")]
CASES = [name for name, (_, axes, _) in meshes.CASES.items() if axes != {"data": 1}]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes say of all cases; started once, as starting takes longer than a case."""
    folder = tmp_path_factory.mktemp("said")
    together.two_processes(HERE / "meshes_of_processes.py", folder, *CASES, devices_per_process=4, timeout=1200)
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_two_processes_is_one_devices(name, found):
    for worst, programs in (of_process[name] for of_process in found):
        assert worst < 1e-5 and programs == 1
