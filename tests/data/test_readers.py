"""Every format is written small, by another writer where there is one, and read back; damage is a clear error."""

import gzip
import json
import lzma
import pickle
import sqlite3
import struct
import subprocess
import sys
import textwrap
import zlib
from contextlib import closing

import flax.serialization
import msgpack
import numpy as np
import pytest

from jfed.data import cifar, federated, readers, sqlite
from jfed.data._tfexample import parse_example
from jfed.data.population import client


def idx(array, code=8):
    head = struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


# IDX


@pytest.mark.parametrize(("code", "dtype"), [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4"), (14, "f8")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_an_idx_file_of_any_type_reads_back_in_the_machines_byte_order(tmp_path, code, dtype, pack):
    array = np.arange(-3, 3).astype(dtype).reshape(2, 3)
    path = tmp_path / "some-idx"
    path.write_bytes(pack(idx(array, code)))
    read = readers.read_idx(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype(dtype) and read.dtype.isnative


WHOLE = idx(IMAGES)
HUGE = struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 2**31)
HOLLOW = struct.pack(">4B4I", 0, 0, 8, 4, 0, 2**31, 2**31, 2**31)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
        (WHOLE[:9], "ends inside its header"),
        (WHOLE[:-1], "more than the file can hold|but .* follow"),
        (WHOLE + b"\0", "bytes left over"),
        (HUGE + bytes(99), "more than the file can hold"),
        (HOLLOW, "no entries, but sides that no array can have"),
        (gzip.compress(HOLLOW, mtime=0), "no entries, but sides that no array can have"),
        (gzip.compress(HUGE + bytes(99), mtime=0), "more than the file can hold"),
        (gzip.compress(WHOLE, mtime=0)[:-12], "cut short or damaged"),
        (gzip.compress(WHOLE, mtime=0)[:-8] + bytes(8), "cut short or damaged"),
        (gzip.compress(WHOLE[:-1], mtime=0), "but 23 follow"),
        (b"\x1f\x8bnonsense", "cut short or damaged"),
    ],
)
def test_a_damaged_idx_file_is_one_line_that_names_it(tmp_path, content, told):
    path = tmp_path / "broken-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        readers.read_idx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_idx_file_of_no_images_is_an_empty_array(tmp_path):
    (tmp_path / "none-idx").write_bytes(idx(IMAGES[:0]))
    assert readers.read_idx(tmp_path / "none-idx").shape == (0, 3, 4)


# CIFAR


def python2_batch(images, labels):
    """A batch as Python 2 pickled it: str is bytes, and numpy lives where it lived then."""

    def text(b):
        return b"T" + struct.pack("<I", len(b)) + b

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01K" + bytes([len(images)]) + b"M\x00\x0c\x86cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(images.tobytes()) + b"tb"
    )
    items = b"".join(b"K" + bytes([label]) for label in labels)
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + items + b"eu."


PIXELS = np.arange(2 * 3072, dtype=np.uint32).reshape(2, 3072).astype(np.uint8)


def test_cifar_10_as_python_2_pickled_it_reads_back(tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(python2_batch(PIXELS + np.uint8(i), [i, 9]))
    (tmp_path / "test_batch").write_bytes(python2_batch(PIXELS, [0, 4]))
    train, test = cifar.read_cifar(tmp_path)
    assert train["x"].shape == (10, 32, 32, 3) and train["x"].dtype == np.uint8 and train["y"].dtype == np.int32
    assert train["y"].tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9] and test["y"].tolist() == [0, 4]
    for channel in range(3):
        np.testing.assert_array_equal(test["x"][1, :, :, channel].ravel(), PIXELS[1, 1024 * channel :][:1024])


def test_cifar_100_pickled_by_python_3_reads_back_with_its_superclasses(tmp_path):
    for name in ("train", "test"):
        batch = {b"data": PIXELS, b"fine_labels": [99, 3], b"coarse_labels": [19, 0], b"filenames": [b"a", b"b"]}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    train, _ = cifar.read_cifar(tmp_path)
    assert train["y"].tolist() == [99, 3] and train["coarse"].tolist() == [19, 0]
    np.testing.assert_array_equal(train["x"].transpose(0, 3, 1, 2).reshape(2, -1), PIXELS)


@pytest.mark.parametrize("left_out", cifar.CIFAR_10_FILES)
def test_cifar_10_short_of_a_batch_is_refused_by_name(tmp_path, left_out):
    for name in {*cifar.CIFAR_10_FILES} - {left_out}:
        (tmp_path / name).write_bytes(python2_batch(PIXELS, [1, 9]))
    with pytest.raises(FileNotFoundError, match=f"has no {left_out}; it must hold data_batch_1, .*unpack"):
        cifar.read_cifar(tmp_path)


def test_cifar_10_with_a_sixth_batch_is_refused_by_name(tmp_path):
    for name in (*cifar.CIFAR_10_FILES, "data_batch_6"):
        (tmp_path / name).write_bytes(python2_batch(PIXELS, [1, 9]))
    with pytest.raises(ValueError, match="holds data_batch_6, which CIFAR-10 does not have"):
        cifar.read_cifar(tmp_path)


@pytest.mark.parametrize("left_out", cifar.CIFAR_100_FILES)
def test_cifar_100_short_of_a_file_is_refused_by_name(tmp_path, left_out):
    for name in {*cifar.CIFAR_100_FILES} - {left_out}:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"has no {left_out}; it must hold train, test"):
        cifar.read_cifar(tmp_path)


def in_little_memory(code, *arguments):
    """Runs code with room for 1 GiB more than the imports take; what it prints."""
    limit = """
        import resource, sys
        from jfed.data import cifar, federated, sqlite
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, resource.RLIM_INFINITY))
    """
    program = textwrap.dedent(limit) + textwrap.dedent(code)
    run = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(run, check=True, capture_output=True, text=True, timeout=120).stdout


TEXT = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20  # one string of a megabyte
BOMBS = {
    "memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index 2147483647 in a file of 9 bytes"),
    "memo in figures": (b"Np4000000000\n.", "memo index 4000000000"),
    "promised bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**42) + b".", "expected 4398046511104 bytes"),
    "promised bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b".", "expected 4398046511104 bytes"),
    "one text encoded often": (
        b"\x80\x02]q\x00(c_codecs\nencode\nq\x01" + TEXT + b"q\x02" + b"h\x01h\x02\x85R" * 4000 + b"e.",
        "more text than the file can hold",
    ),
    "lists of lists, told in an error": (
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a]q\x00"
        + b"".join(b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
        + b"\x86R.",
        "damaged",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures memory as Linux does; no file is needed")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_cannot_take_much_memory(tmp_path, name):
    content, told = BOMBS[name]
    (tmp_path / "train").write_bytes(content)
    (tmp_path / "test").write_bytes(content)
    code = """
        try:
            cifar.read_cifar(sys.argv[1])
        except ValueError as error:
            print(error)
    """
    said = in_little_memory(code, tmp_path)
    assert told in said and str(tmp_path / "train") in said and "MemoryError" not in said


def test_a_pickle_may_build_one_array_often_over_the_same_bytes():
    array = cifar._Array()
    array.__setstate__((1, (2, 3072), cifar._Dtype("u1"), False, PIXELS.tobytes()))
    assert array.array.base is not None  # a view: a thousand of them take no more memory


@pytest.mark.parametrize("which", ["_codecs\nencode", "numpy\ndtype", "numpy\nndarray"])
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x08\x00\x00\x00__init__K\x01s\x86"])
def test_a_pickle_cannot_change_what_stands_in_for_a_global(tmp_path, which, state):
    before = [dict(vars(kind)) for kind in (cifar._Array, cifar._Dtype, cifar._Encode)]
    for name in cifar.CIFAR_100_FILES:
        (tmp_path / name).write_bytes(b"\x80\x02c" + which.encode() + b"\n" + state + b"b.")
    with pytest.raises(ValueError, match="train: (refused to change a function|.*missing 1 required)"):
        cifar.read_cifar(tmp_path)
    assert before == [dict(vars(kind)) for kind in (cifar._Array, cifar._Dtype, cifar._Encode)]


def test_a_pickle_whose_data_are_a_class_or_an_array_without_bytes_is_refused(tmp_path):
    key = b"\x80\x02}X\x04\x00\x00\x00datacnumpy\nndarray\n"
    for content in (key + b"s.", key + b")\x81s."):  # NEWOBJ makes an instance without calling __init__
        for name in cifar.CIFAR_100_FILES:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="train: has no `data`"):
            cifar.read_cifar(tmp_path)


class Evil:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('pwned').touch()",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps(Evil(), 2), "refused to load the global (__builtin__|builtins).eval"),
        (pickle.dumps(np.float64(1), 2), "refused to load the global numpy"),
        (b"cos\nsystem\n(S'true'\ntR.", "refused to load the global os.system"),
        (pickle.dumps({"data": np.zeros((2, 3072))}, 2), "not of bytes"),
        (pickle.dumps({"data": PIXELS, "labels": [1]}, 2), "not a list of 2 labels"),
        (pickle.dumps({"data": PIXELS, "labels": [1, 2**40]}, 2), "not a list of 2 labels"),
        (pickle.dumps({"data": PIXELS[:, :9], "labels": [1, 2]}, 2), "shape"),
        (pickle.dumps([1, 2], 2), "pickle of list"),
        (pickle.dumps({"data": PIXELS}, 2)[:500], "damaged"),
        (b"", "damaged"),
    ],
)
def test_a_pickle_that_is_not_a_cifar_batch_is_refused_and_runs_nothing(tmp_path, monkeypatch, content, told):
    monkeypatch.chdir(tmp_path)
    for name in cifar.CIFAR_10_FILES:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        cifar.read_cifar(tmp_path)
    assert "data_batch_1" in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_folder_without_cifar_says_what_it_should_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_batch_1 .* train and test"):
        cifar.read_cifar(tmp_path)


# LEAF


def leaf(**users):
    return {"users": list(users), "num_samples": [len(u["y"]) for u in users.values()], "user_data": users}


ANN = {"x": [[0.5, 1.0], [2.0, 3.0]], "y": [1, 0]}
BOB = {"x": [[4, 5]], "y": [7]}


def test_leaf_reads_one_file_or_a_folder_and_leaves_out_users_without_samples(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(leaf(ann=ANN, nobody={"x": [], "y": []})))
    (tmp_path / "b.json").write_text(json.dumps(leaf(bob=BOB)))
    both, names = federated.read_leaf(tmp_path)
    assert names == ["ann", "bob"]
    assert both.examples["x"].dtype == np.float32 and both.examples["y"].dtype == np.int32
    np.testing.assert_array_equal(client(both, 1)["x"], [[4, 5]])
    one, names = federated.read_leaf(tmp_path / "a.json")
    assert names == ["ann"] and one.size.tolist() == [2]


def test_leaf_text_becomes_bytes_padded_to_the_longest_of_all_users(tmp_path):
    users = leaf(ann={"x": ["to be"], "y": ["e"]}, bob={"x": ["or not", "né"], "y": ["t", "s"]})
    (tmp_path / "t.json").write_text(json.dumps(users))
    both, _ = federated.read_leaf(tmp_path / "t.json")
    words = [bytes(row).rstrip(b"\0").decode() for row in np.asarray(both.examples["x"])]
    assert words == ["to be", "or not", "né"] and both.examples["y"].shape == (3, 1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not LEAF's JSON"),
        (json.dumps({**leaf(ann=ANN), "num_samples": [3]}), "said to have 3 samples"),
        (json.dumps({**leaf(ann=ANN), "num_samples": []}), "1 users but 0"),
        (json.dumps({**leaf(ann=ANN), "user_data": {}}), "no lists"),
        (json.dumps({**leaf(ann=ANN), "users": [["ann"]]}), "no lists"),
        (json.dumps(leaf(ann=ANN, bob={"x": [[1]], "y": [0]})), "client 0"),
        (json.dumps(leaf(ann={"x": [[1], [2, 3]], "y": [0, 1]})), "differ in shape"),
        (json.dumps(leaf(ann={"x": [1], "y": [2**40]})), "beyond int32"),
        (json.dumps(leaf(ann={"x": [1], "y": [2**80]})), "text or other shapes"),
        (json.dumps(leaf(ann={"x": [None], "y": [1]})), "mixes NoneType"),
        (json.dumps(leaf(ann={"x": [float("nan")], "y": [1]})), "NaN"),
        (json.dumps(leaf()), "holds no examples"),
    ],
)
def test_a_file_that_is_not_leafs_is_an_error_that_names_it(tmp_path, content, told):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=told) as caught:
        federated.read_leaf(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_a_leaf_user_in_two_files_is_an_error(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(leaf(ann=ANN)))
    with pytest.raises(ValueError, match="'ann' occurs twice"):
        federated.read_leaf(tmp_path)


# SQLite


def varint(n):
    n &= 2**64 - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(packed=True, **features):
    """An independent writer of tf.train.Example."""
    out = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            kind, content = 1, b"".join(field(1, v) for v in values)
        elif isinstance(values[0], float):
            kind, parts = 2, [struct.pack("<f", v) for v in values]
            content = field(1, b"".join(parts)) if packed else b"".join(b"\x0d" + p for p in parts)
        else:
            kind, parts = 3, [varint(v) for v in values]
            content = field(1, b"".join(parts)) if packed else b"".join(b"\x08" + p for p in parts)
        out += field(1, field(1, name.encode()) + field(2, field(kind, content)))
    return field(1, out)


@pytest.mark.parametrize("packed", [True, False])
def test_an_example_record_parses_packed_or_not(packed):
    numbers = [0, 1, -1, 127, 128, 300, 2**62, -(2**63)]
    read = parse_example(example(packed, a=numbers, b=[0.5, -2.0], c=[b"x", b""]))
    assert read["a"].tolist() == numbers and read["b"].tolist() == [0.5, -2.0] and read["c"] == [b"x", b""]


def test_every_cut_or_flipped_record_is_a_value_error_or_parses():
    record = example(a=[1, 300], b=[0.5], c=[b"xyz"])
    for i in range(len(record)):
        for broken in (record[:i], record[:i] + bytes([record[i] ^ 255]) + record[i + 1 :]):
            try:
                parse_example(broken)
            except ValueError:
                pass


def tff(path, rows):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)")
        connection.execute("CREATE TABLE client_metadata (client_id TEXT, split_name TEXT, num_examples INTEGER)")
        connection.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows)
        connection.commit()


TFF_ROWS = [
    ("train", "f2", example(label=[5], pixels=[0.0, 1.0, 2.0, 3.0])),
    ("train", "f1", example(label=[-1], pixels=[4.0, 5.0, 6.0, 7.0])),
    ("train", "f2", example(label=[6], pixels=[8.0, 9.0, 1.0, 2.0])),
    ("test", "f1", example(label=[8], pixels=[0.0, 0.0, 0.0, 0.0])),
]


@pytest.mark.parametrize("suffix", ["", ".lzma", ".xz"])
def test_tffs_sqlite_reads_back_by_split_with_clients_sorted(tmp_path, suffix):
    path = tmp_path / "odd name?#.sqlite"
    tff(path, TFF_ROWS)
    if suffix:
        kind = lzma.FORMAT_ALONE if suffix == ".lzma" else lzma.FORMAT_XZ
        path = path.rename(path.with_name("plain"))
        packed = tmp_path / f"odd name?#.sqlite{suffix}"
        packed.write_bytes(lzma.compress(path.read_bytes(), kind))
        path = packed
    before = sorted(p.name for p in tmp_path.iterdir())
    read, names = sqlite.read_sqlite(path, split="train", shapes={"pixels": (2, 2)})
    assert names == ["f1", "f2"] and read.size.tolist() == [1, 2]
    assert read.examples["label"].tolist() == [-1, 5, 6]
    np.testing.assert_array_equal(client(read, 1)["pixels"][1], [[8, 9], [1, 2]])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_tff_file_of_several_splits_asks_for_one(tmp_path):
    tff(tmp_path / "a.sqlite", TFF_ROWS)
    with pytest.raises(ValueError, match=r"\['test', 'train'\]; name one with split="):
        sqlite.read_sqlite(tmp_path / "a.sqlite")
    with pytest.raises(ValueError, match="no examples"):
        sqlite.read_sqlite(tmp_path / "a.sqlite", split="x' OR '1'='1")
    read, _ = sqlite.read_sqlite(tmp_path / "a.sqlite", split="test", features=["label"])
    assert list(read.examples) == ["label"]


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([("t", "a", b"\xff\xff")], {}, "cut short"),
        ([("t", "a", "text")], {}, "record of str"),
        ([("t", "a", example(y=[1])), ("t", "a", example(y=[1, 2]))], {}, "different numbers of values"),
        ([("t", "a", example(y=[1])), ("t", "b", example(z=[1]))], {}, "has the features"),
        ([("t", "a", example(y=[1]))], {"features": ["z"]}, "no feature 'z'"),
        ([("t", "a", example(y=[1, 2]))], {"shapes": {"y": (3,)}}, "mend shapes="),
        ([("t", "a", example(y=[2**40]))], {}, "beyond int32"),
        ([], {}, "no examples"),
    ],
)
def test_bad_tff_rows_are_errors_that_name_the_file(tmp_path, rows, options, told):
    tff(tmp_path / "bad.sqlite", rows)
    with pytest.raises(ValueError, match=told) as caught:
        sqlite.read_sqlite(tmp_path / "bad.sqlite", **options)
    assert "bad.sqlite" in str(caught.value)


def fedjax_bytes_array(words):
    """FedJAX's `serialization.msgpack_serialize` of an array of byte strings: extension type 4."""
    return msgpack.ExtType(4, msgpack.packb(((len(words),), words), use_bin_type=True))


def fedjax(path, rows):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT NULL, "
            "num_examples INTEGER NOT NULL)"
        )
        connection.executemany("INSERT INTO federated_data VALUES (?, ?, ?)", rows)
        connection.commit()


def test_fedjaxs_sqlite_reads_back_arrays_and_byte_strings(tmp_path):
    arrays = {"x": IMAGES.astype(np.float32), "y": np.array([3, 4], np.int64)}
    first = flax.serialization.msgpack_serialize(arrays)
    fedjax(tmp_path / "f.sqlite", [(b"zed", zlib.compress(first), 2), (b"amy", zlib.compress(first), 2)])
    read, names = sqlite.read_sqlite(tmp_path / "f.sqlite")
    assert names == ["zed", "amy"] and read.examples["y"].dtype == np.int32
    np.testing.assert_array_equal(client(read, 1)["x"], IMAGES)

    text = msgpack.packb({"snippets": fedjax_bytes_array([b"to be", b"or"])})
    fedjax(tmp_path / "t.sqlite", [(b"a", zlib.compress(text), 2)])
    read, _ = sqlite.read_sqlite(tmp_path / "t.sqlite")
    assert np.asarray(read.examples["snippets"]).tolist() == [list(b"to be"), list(b"or\0\0\0")]


def test_bad_fedjax_rows_are_errors_that_name_the_client(tmp_path):
    good = flax.serialization.msgpack_serialize({"y": np.arange(2)})
    bad = [
        (b"junk", "not zlib over msgpack"),
        (zlib.compress(b"\xc1"), "not zlib over msgpack"),
        (zlib.compress(good[:-3]), "not zlib over msgpack"),
        (zlib.compress(msgpack.packb([1])), "not named arrays"),
        (zlib.compress(msgpack.packb({"y": 1})), "not an array of examples"),
        (zlib.compress(msgpack.packb({"y": msgpack.ExtType(4, b"\xc1")})), "byte strings is damaged"),
        (zlib.compress(msgpack.packb({"y": msgpack.ExtType(1, msgpack.packb(((2,), "O", bytes(16))))})), "not zlib"),
        (zlib.compress(flax.serialization.msgpack_serialize({"y": np.arange(3)})), "said to have 2"),
    ]
    for i, (data, told) in enumerate(bad):
        path = tmp_path / f"{i}.sqlite"
        fedjax(path, [(b"ann", data, 2)])
        with pytest.raises(ValueError, match=f"{i}.sqlite: client 'ann'.*{told}"):
            sqlite.read_sqlite(path)


def test_a_file_that_is_no_federated_database_says_so(tmp_path):
    path = tmp_path / "no.sqlite"
    with pytest.raises(FileNotFoundError):
        sqlite.read_sqlite(path)
    path.write_bytes(b"not a database at all, but long enough" * 99)
    with pytest.raises(ValueError, match="SQLite cannot read it"):
        sqlite.read_sqlite(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")
        connection.commit()
    with pytest.raises(ValueError, match=r"\['other'\]"):
        sqlite.read_sqlite(path)
    packed = tmp_path / "no.sqlite.lzma"
    packed.write_bytes(lzma.compress(path.read_bytes())[:-20])
    with pytest.raises(ValueError, match="cut short or damaged"):
        sqlite.read_sqlite(packed)


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"


@pytest.mark.parametrize("where", ["", " WHERE i < 0"], ids=["endless", "endless and empty"])
@pytest.mark.parametrize(
    "view",
    [
        "examples AS {} SELECT 't' AS split_name, i AS client_id, x'00' AS serialized_example_proto FROM n{}",
        "federated_data AS {} SELECT i AS client_id, x'00' AS data, 1 AS num_examples FROM n{}",
    ],
)
def test_a_view_is_not_taken_for_a_table(tmp_path, view, where):
    path = tmp_path / "view.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE VIEW " + view.format(ENDLESS, where))
        connection.commit()
    with pytest.raises(ValueError, match=r"view\.sqlite: has neither a table .*\[\]"):
        sqlite.read_sqlite(path)


@pytest.mark.parametrize(
    ("split", "told"), [(None, "interrupted"), ("test", "interrupted"), ("train", "more than the file can hold")]
)
def test_a_table_whose_pages_lead_to_one_row_a_billion_times_is_given_up(tmp_path, split, told):
    path = tmp_path / "maze.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA page_size=512")
        connection.execute("CREATE TABLE examples (split_name TEXT, client_id TEXT, serialized_example_proto BLOB)")
        connection.execute("INSERT INTO examples VALUES (?, ?, ?)", ("train", "ann", example(y=[1])))
        connection.commit()
    pages = path.read_bytes()
    head, leaf = pages[:512], pages[512:1024]

    def inner(child, cells=50):
        """A page of a table's tree with all its pointers to one page: its header, where cells lie, the cells."""
        places = [512 - 5 * (i + 1) for i in range(cells)]
        top = struct.pack(">BHHHBI", 5, 0, cells, places[-1], 0, child) + struct.pack(f">{cells}H", *places)
        return top + bytes(places[-1] - len(top)) + (struct.pack(">I", child) + b"\1") * cells

    levels = 6  # 51 ** 6 = 1.8e10 ways from the root, page 2, to the leaf, the last page
    path.write_bytes(
        head[:28] + struct.pack(">I", 2 + levels) + head[32:] + b"".join(inner(3 + i) for i in range(levels)) + leaf
    )
    with pytest.raises(ValueError, match=rf"maze\.sqlite.*{told}"):
        sqlite.read_sqlite(path, split=split)


def test_a_column_that_is_computed_cannot_be_longer_than_the_file(tmp_path):
    path = tmp_path / "computed.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TABLE examples (split_name TEXT, client_id TEXT, "
            "serialized_example_proto BLOB GENERATED ALWAYS AS (zeroblob(900000000)))"
        )
        connection.execute("INSERT INTO examples VALUES ('t', 'a')")
        connection.commit()
    with pytest.raises(ValueError, match=r"computed\.sqlite.*too big"):
        sqlite.read_sqlite(path)


@pytest.mark.parametrize("kind", [lzma.FORMAT_ALONE, lzma.FORMAT_XZ])
def test_a_compressed_database_is_unpacked_up_to_a_limit_and_not_beyond(tmp_path, kind):
    tff(tmp_path / "plain", TFF_ROWS[:1])
    size = (tmp_path / "plain").stat().st_size
    path = tmp_path / "packed.sqlite.xz"
    path.write_bytes(lzma.compress((tmp_path / "plain").read_bytes(), kind))
    assert sqlite.read_sqlite(path, max_unpacked=size)[1] == ["f2"]
    with pytest.raises(ValueError, match=rf"packed\.sqlite\.xz: max_unpacked={size - 1}: .*raise max_unpacked"):
        sqlite.read_sqlite(path, max_unpacked=size - 1)


# HDF5


def test_tffs_h5_reads_back_numbers_and_text(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the package h5py; no file is needed in $JFED_DATA")
    with h5py.File(tmp_path / "t.h5", "w") as file:
        for name, count in (("f2", 1), ("f1", 2)):
            group = file.create_group(f"examples/{name}")
            group["label"] = np.arange(count, dtype=np.int64)
            group["pixels"] = np.full((count, 2, 2), count, np.float64)
            group.create_dataset("text", data=["word" * count] * count, dtype=h5py.string_dtype())
    read, names = federated.read_h5(tmp_path / "t.h5")
    assert names == ["f1", "f2"] and read.size.tolist() == [2, 1]
    assert read.examples["pixels"].shape == (3, 2, 2) and read.examples["pixels"].dtype == np.float32
    assert bytes(client(read, 1)["text"][0]) == b"word\0\0\0\0"
    assert list(federated.read_h5(tmp_path / "t.h5", features=["label"])[0].examples) == ["label"]


def test_a_hostile_or_foreign_h5_file_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the package h5py; no file is needed in $JFED_DATA")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["examples/a/y"] = [1]

    def outside(file):
        file.create_group("examples")["a"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/examples/a")

    def raw(file):
        file.create_dataset("examples/a/y", (8,), "i4", external=[(str(secret), 0, 32)])

    def huge(file):
        file.create_dataset("examples/a/y", (2**40,), "i4", chunks=(64,))

    def often(file):  # each dataset alone is within what the file could hold, all of them are not
        for i in range(200):
            file.create_dataset(f"examples/a/{i}", (2**18,), "i4", chunks=(64,))

    cases = [
        (often, "more than the file can hold"),
        (outside, "not a group of this file"),
        (raw, "another file"),
        (huge, "more than the file can hold"),
        (lambda file: file.create_group("data"), "no group `examples`"),
        (lambda file: file.create_group("examples"), "holds no examples"),
        (lambda file: file.create_dataset("examples", data=[1]), "not a group"),
    ]
    for i, (write, told) in enumerate(cases):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            write(file)
        with pytest.raises(ValueError, match=f"{i}.h5.*{told}"):
            federated.read_h5(tmp_path / f"{i}.h5")
    with pytest.raises(ValueError, match="HDF5 cannot read it"):
        federated.read_h5(secret)


def test_without_h5py_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "jfed\[h5\]"'):
        federated.read_h5(tmp_path / "t.h5")


# Hugging Face


class LazyColumn:
    """What a newer `datasets` gives for a column."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, at):
        return self.values[at]


class Dataset:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, columns, lazy=False):
        self.columns, self.lazy, self.column_names = columns, lazy, list(columns)

    def with_format(self, kind):
        assert kind == "numpy"
        return self

    def __getitem__(self, name):
        return LazyColumn(self.columns[name]) if self.lazy else self.columns[name]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_hugging_face_data_set_becomes_arrays_or_a_population_by_a_column(lazy):
    data = Dataset(
        {"image": list(IMAGES), "label": np.array([1, 2]), "writer": np.array(["zed", "amy"])},
        lazy,
    )
    arrays = readers.from_hugging_face(data)
    np.testing.assert_array_equal(arrays["image"], IMAGES)
    assert arrays["label"].dtype == np.int32 and arrays["writer"].dtype == np.uint8
    by_writer, names = readers.from_hugging_face(data, client="writer", columns=["label"])
    assert names == ["amy", "zed"] and by_writer.examples["label"].tolist() == [2, 1]
    assert "writer" not in readers.from_hugging_face(data, client="writer")[0].examples


def test_a_dict_of_splits_a_missing_column_and_images_of_two_sizes_are_errors():
    with pytest.raises(ValueError, match="one split"):
        readers.from_hugging_face({"train": 1})
    data = Dataset({"image": [np.zeros((2, 2)), np.zeros((3, 2))]})
    with pytest.raises(ValueError, match="no column 'label'"):
        readers.from_hugging_face(data, columns=["label"])
    with pytest.raises(ValueError, match="'image'.*(differ in shape|other shapes)"):
        readers.from_hugging_face(data)
