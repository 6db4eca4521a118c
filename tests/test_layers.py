"""Who may import whom. A room not named here fails the first test: give it a floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "jfed"
GROUND = {"core", "tree", "mesh", "shuffle", "_axis", "_fusion", "_machine", "_noise", "_streams", "_validate"}
FIRST = {"aggregate", "availability", "clients", "compress", "local", "sampling"}
TOP = {"run", "experiment", "checkpoint", "report", "ledger", "plot", "launch", "_leaves", "_terminal"}
MAY_IMPORT = (
    {room: GROUND | {room} for room in GROUND | FIRST}
    | {"collectives": GROUND | {"compress", "collectives"}}
    | {room: GROUND | FIRST | {"collectives", room} for room in ("algorithms", "gossip", "parallel")}
    | {room: GROUND | {room} for room in ("data", "models")}
    | {
        room: GROUND | FIRST | TOP | {"algorithms", "collectives", "gossip", "parallel", "data", "models"}
        for room in TOP
    }
)
FILES = sorted(path for path in HOUSE.rglob("*.py") if path != HOUSE / "__init__.py")
files = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(HOUSE)) for path in FILES])


def room_of(path):
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def imported(path):
    """Dotted names of all modules a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: import from jfed, not relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@files
def test_a_room_imports_only_rooms_below_it(path):
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("jfed.")}
    assert rooms <= MAY_IMPORT[room_of(path)]


@files
def test_the_lower_floors_need_only_jax_optax_and_numpy(path):
    if room_of(path) in GROUND | FIRST | {"algorithms", "collectives", "gossip", "parallel"}:
        outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert outside <= {"jfed", "jax", "optax", "numpy"}


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_scripts_use_public_names_only(folder):
    for path in (HOUSE.parent / folder).glob("*.py"):
        parts = {part for name in imported(path) if name.startswith("jfed") for part in name.split(".")}
        assert not [part for part in parts if part.startswith("_")], path.name


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_jfed_starts_no_backend():
    code = (
        "import jfed, jfed.run, jfed.algorithms, jfed.models, jfed.data, jax._src.xla_bridge as b; print(b._backends)"
    )
    assert fresh(code) == "{}"


def test_importing_jfed_is_quick():
    code = (
        "import time, jax, optax, flax; t = time.process_time();"
        "import jfed, jfed.run, jfed.algorithms, jfed.models, jfed.data, jfed.sampling;"
        "print(time.process_time() - t)"
    )
    assert min(float(fresh(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("heavy", ["orbax.checkpoint", "matplotlib", "h5py", "rich", "tyro", "flax.nnx"])
def test_importing_jfed_leaves_heavy_packages_alone(heavy):
    code = "import sys, jax, optax; import jfed, jfed.run, jfed.algorithms, jfed.models, jfed.data; print(*sys.modules)"
    assert heavy not in fresh(code).split()
