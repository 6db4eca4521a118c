import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import SIZES, examples_of

from jfed import data

CLIENTS = [examples_of(i) for i in range(len(SIZES))]
WHOLE = jax.tree.map(lambda *x: np.concatenate(x), *CLIENTS)


def same(source, clients):
    assert source.size.dtype == np.int32 and source.size.tolist() == [len(c["y"]) for c in clients]
    for i, examples in enumerate(clients):
        for name, leaf in examples.items():
            np.testing.assert_array_equal(source.load(i)[name], leaf)
            assert source.row[name] == jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def test_every_source_gives_each_client_its_own_rows(tmp_path):
    same(data.on_host(WHOLE, SIZES), CLIENTS)
    same(data.from_loader(SIZES, examples_of), CLIENTS)
    same(data.save_memory_mapped(tmp_path, iter(CLIENTS)), CLIENTS)
    same(data.memory_mapped(tmp_path), CLIENTS)


def test_arrays_on_the_host_are_not_copied():
    assert np.shares_memory(data.on_host(WHOLE, SIZES).load(3)["x"], WHOLE["x"])


def test_files_are_mapped_and_not_read(tmp_path):
    rows = data.save_memory_mapped(tmp_path, iter(CLIENTS)).load(3)["x"]
    while not isinstance(rows, np.memmap):
        rows = rows.base
    assert rows.mode == "r"


def test_clients_are_written_one_at_a_time(tmp_path):
    held = []

    def arriving():
        for n in (2, 1, 3):
            rows = np.full((n, 2), n)
            held.append(weakref.ref(rows))
            yield {"x": rows}
            assert sum(ref() is not None for ref in held) == 1
            del rows

    assert data.save_memory_mapped(tmp_path, arriving()).size.tolist() == [2, 1, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool", "uint64"])
def test_files_keep_every_dtype(tmp_path, dtype):
    values = np.arange(6).reshape(3, 2).astype(jnp.dtype(dtype))
    source = data.save_memory_mapped(tmp_path, [values[:1], values[1:]])
    assert source.row.dtype == values.dtype
    np.testing.assert_array_equal(source.load(1), values[1:])


def test_leaves_may_lie_in_nested_dicts(tmp_path):
    tree = {"a": {"b": np.arange(2), "c": np.ones((2, 3))}, "d": np.zeros(2, bool)}
    source = data.save_memory_mapped(tmp_path, [tree])
    assert jax.tree.structure(source.load(0)) == jax.tree.structure(tree)
    np.testing.assert_array_equal(source.load(0)["a"]["c"], tree["a"]["c"])


def test_a_client_may_have_no_rows(tmp_path):
    clients = [{"y": np.arange(0)}, {"y": np.arange(2)}]
    same(data.save_memory_mapped(tmp_path, clients), clients)
    same(data.on_host({"y": np.arange(2)}, [0, 2]), clients)
    loaded = []
    data.from_loader([0, 2], lambda i: loaded.append(i) or clients[i])
    assert loaded == [1]


def damaged(what):
    """A folder of three clients of which something is wrong."""

    def make(folder):
        data.save_memory_mapped(folder, [{"x": np.ones((n, 2), np.float32)} for n in (1, 2, 3)])
        what(folder)
        return data.memory_mapped(folder)

    return make


def manifest(**changes):
    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damaged(change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (data.memory_mapped, r"manifest.json is missing; write the folder anew"),
        (damaged(lambda f: (f / "leaf_0.npy").unlink()), r"leaf_0.npy is missing"),
        (damaged(lambda f: (f / "leaf_0.npy").write_bytes((f / "leaf_0.npy").read_bytes()[:-1])), r"mmap length"),
        (damaged(lambda f: np.save(f / "leaf_0.npy", np.ones((6, 3)))), r"holds float64\[6, 3\], the manifest"),
        (damaged(lambda f: np.save(f / "size.npy", np.array([1, 2]))), r"size.npy sums to 3, the manifest has 6 rows"),
        (
            damaged(lambda f: (f / "manifest.json").write_text('{"format": 1')),
            r"memory_mapped\(.*write the folder anew",
        ),
        (manifest(format=2), r"its format is 2, this version reads 1"),
        (manifest(leaves=[{}]), r"memory_mapped\(.*write the folder anew"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_not_written_to_its_end_is_refused(tmp_path):
    def breaking_off():
        yield {"x": np.ones(2)}
        raise RuntimeError("the line went dead")

    with pytest.raises(RuntimeError, match="the line went dead"):
        data.save_memory_mapped(tmp_path, breaking_off())
    with pytest.raises(ValueError, match="manifest.json is missing"):
        data.memory_mapped(tmp_path)
    with pytest.raises(ValueError, match=r"the folder holds leaf_0.npy; choose an empty"):
        data.save_memory_mapped(tmp_path, iter(CLIENTS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: data.on_host(WHOLE, SIZES[:-1]), r"on_host\(size\): sizes sum to 58 but leaf .* has shape \[68"),
        (lambda f: data.on_host({}, [1]), r"on_host\(size\): sizes sum to 1 but leaf examples has shape \[\]"),
        (lambda f: data.on_host(WHOLE, [69, -1]), r"client 1 has -1 rows"),
        (lambda f: data.on_host(WHOLE, [68.0]), r"on_host\(size=float64\[1\]\): size must be integers"),
        (lambda f: data.on_host({"x": np.array(["a"])}, [1]), r"leaf \['x'\] holds <U1, not numbers"),
        (lambda f: data.from_loader([2**31], None), r"client 0 has 2147483648 rows, more than int32"),
        (lambda f: data.from_loader([0, 0], None), r"from_loader\(size\): no client has rows"),
        (
            lambda f: data.from_loader([2], lambda i: {"x": np.ones((3, 4))}),
            r"from_loader\(client 0\): leaf \['x'\] is float64\[3, 4\], expected float64\[2, 4\]",
        ),
        (lambda f: data.from_loader([2], lambda i: {}), r"from_loader\(client 0\): a client must be a tree of arrays"),
        (lambda f: data.save_memory_mapped(f, []), r"there must be a client"),
        (lambda f: data.save_memory_mapped(f, [[np.ones(1)]]), r"leaf \[0\] is not in a dict under a name"),
        (
            lambda f: data.save_memory_mapped(f, [{"x": np.ones(1)}, {"y": np.ones(1)}]),
            r"save_memory_mapped\(client 1\): its structure .* is not the first client's",
        ),
        (
            lambda f: data.save_memory_mapped(f, [{"x": np.ones(1)}, {"x": np.ones((1, 2))}]),
            r"save_memory_mapped\(client 1\): leaf \['x'\] is float64\[1, 2\], expected float64\[1\]",
        ),
    ],
)
def test_what_is_no_population_is_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_loader_is_its_own_and_names_the_client():
    def load(i):
        raise ConnectionError("no route")

    with pytest.raises(ConnectionError, match="no route") as caught:
        data.from_loader([0, 3], load)
    assert caught.value.__notes__ == ["This was raised while loading client 1."]
