"""The embedded sets are what they say; the others are found where people keep them, or the error helps."""

import csv
import gzip
import hashlib
import io
import lzma
import os
import pickle
import struct
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jfed.data import _copies, cifar, download, natural, sets
from jfed.data.embedded import make

DATA = os.environ.get("JFED_DATA")


def missing(root, folder):
    """The files of MNIST or Fashion-MNIST the folder of data has not, as the reason of a skip; or None."""
    absent = [stem for stem in _copies.IDX_STEMS if root is None or not [*Path(root, folder).glob(f"{stem}*")]]
    return f"needs {', '.join(f'{folder}/{stem}.gz' for stem in absent)} in $JFED_DATA" if absent else None


needs_mnist = pytest.mark.skipif(missing(DATA, "mnist") is not None, reason=str(missing(DATA, "mnist")))
needs_fashion = pytest.mark.skipif(
    missing(DATA, "fashion-mnist") is not None, reason=str(missing(DATA, "fashion-mnist"))
)


def test_the_reason_of_a_skip_names_the_files_that_are_missing(tmp_path):
    put_idx(tmp_path / "mnist")
    assert missing(tmp_path, "mnist") is None
    (tmp_path / "mnist" / f"{_copies.IDX_STEMS[2]}.gz").unlink()
    assert missing(tmp_path, "mnist") == "needs mnist/t10k-images-idx3-ubyte.gz in $JFED_DATA"
    assert all(f"fashion-mnist/{stem}.gz" in missing(None, "fashion-mnist") for stem in _copies.IDX_STEMS)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine on which no set lies anywhere."""
    for name in ("JFED_DATA", "XDG_CACHE_HOME", "KERAS_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(_copies.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


RAW = [
    np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8),
    np.array([7, 0, 9], np.uint8),
    np.full((2, 28, 28), 255, np.uint8),
    np.array([1, 2], np.uint8),
]
FILES = [idx(array) for array in RAW]
TINY = sets._MNIST._replace(sha256=tuple(hashlib.sha256(file).hexdigest() for file in FILES))


@pytest.fixture
def tiny(monkeypatch):
    """MNIST, were it five images."""
    monkeypatch.setattr(sets, "_MNIST", TINY)


def put_idx(folder, files=FILES, stems=_copies.IDX_STEMS, pack=gzip.compress, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, file in zip(stems, files, strict=True):
        (folder / f"{stem}{suffix}").write_bytes(pack(file))


def is_tiny(pair):
    train, test = pair
    np.testing.assert_array_equal(train["x"][..., 0], RAW[0].astype(np.float32) / np.float32(255))
    assert train["x"].dtype == np.float32 and train["y"].dtype == np.int32 and train["y"].tolist() == [7, 0, 9]
    assert test["x"].shape == (2, 28, 28, 1) and test["x"].max() == 1.0
    return True


# Embedded


def test_fashion_small_is_balanced_in_every_ten_rows_and_loads_at_once():
    start = time.perf_counter()
    train, test = sets.fashion_small()
    assert time.perf_counter() - start < 2
    for part, count in ((train, 10_000), (test, 2_000)):
        assert part["x"].shape == (count, 28, 28, 1) and part["x"].dtype == np.float32
        assert part["x"].min() == 0.0 and part["x"].max() == 1.0
        np.testing.assert_array_equal(part["y"].reshape(-1, 10), np.tile(np.arange(10), (count // 10, 1)))


@needs_fashion
def test_fashion_small_is_the_first_of_each_class_of_the_canonical_files_and_can_be_made_again():
    whole, small = sets.fashion_mnist(), sets.fashion_mnist(embedded=True)
    for all_of, some, each in zip(whole, small, (1000, 200), strict=True):
        for c in range(10):
            np.testing.assert_array_equal(some["x"][c::10], all_of["x"][all_of["y"] == c][:each])
    embedded = Path(sets.__file__).parent / "embedded" / "fashion_small.xz"
    assert make.pixels() == lzma.decompress(embedded.read_bytes())


@needs_mnist
def test_mnist_is_found_and_every_image_has_its_writer():
    (train, test), writers = sets.mnist(), sets.mnist_writers()
    assert train["x"].shape == (60_000, 28, 28, 1) and train["y"][:5].tolist() == [5, 0, 4, 1, 9]
    assert [len(w) for w in writers] == [len(train["y"]), len(test["y"])]
    sizes = np.unique(writers[0], return_counts=True)[1]
    assert (len(sizes), sizes.min(), sizes.max(), np.median(sizes)) == (539, 19, 131, 116)


def test_the_embedded_folder_stays_below_six_megabytes_and_every_file_has_a_licence():
    folder = Path(sets.__file__).parent / "embedded"
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".md")]
    assert sum(path.stat().st_size for path in files) < 6e6
    licences = (folder / "LICENSES.md").read_text()
    assert all(f"`{path.name}`" in licences for path in files)


# Shakespeare


def test_shakespeares_windows_spell_each_roles_speeches_and_never_mix_train_with_test():
    import json

    train, test, vocabulary = natural.shakespeare(window=50)
    roles = json.loads(lzma.decompress((Path(natural.__file__).parent / "embedded" / "roles.json.xz").read_bytes()))
    roles = [speeches for _, _, speeches in roles if len(speeches) >= 2]
    assert len(train.size) == len(test.size) == len(roles) == 1125
    assert len(vocabulary) == 75 and len(set(vocabulary)) == 75
    symbols = np.array(["", *vocabulary])
    whole = [{k: np.asarray(v) for k, v in part.examples.items()} for part in (train, test)]
    starts = [np.asarray(part.start) for part in (train, test)]
    for i in (0, 1, 500, 1124):
        held = min(len(roles[i]) - 1, -(-len(roles[i]) // 5))
        for examples, start, part, speeches in zip(
            whole, starts, (train, test), (roles[i][:-held], roles[i][-held:]), strict=True
        ):
            rows = slice(start[i], start[i] + int(part.size[i]))
            x, y = examples["x"][rows].ravel(), examples["y"][rows].ravel()
            text = "".join(speech + "\n" for speech in speeches)
            real = y >= 0
            assert "".join(symbols[x[real]]) == text[:-1] and "".join(symbols[y[real]]) == text[1:]
            assert not x[~real].any() and (~real).sum() < 50


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"min_speeches": 1}, {"test_fraction": 0.0}, {"test_fraction": 1.0}, {"min_speeches": 10**6}],
)
def test_shakespeare_names_the_argument_that_is_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"shakespeare.{next(iter(wrong))}="):
        natural.shakespeare(**wrong)


# Heart disease


def test_heart_has_four_hospitals_with_the_known_sizes_and_shares_of_disease():
    train, test, names = natural.heart()
    size = np.asarray(train.size) + np.asarray(test.size)
    assert names == list(natural.HOSPITALS) and size.tolist() == [303, 294, 123, 200]
    ill = [
        sum(int(np.asarray(p.examples["y"])[int(p.start[i]) :][: int(p.size[i])].sum()) for p in (train, test))
        for i in range(4)
    ]
    # UCI's own documentation gives these counts of `num` > 0.
    assert ill == [139, 106, 115, 149]


def test_hearts_columns_are_standardized_one_hot_and_flagged_where_missing():
    train, test, _ = natural.heart()
    column = dict(zip(natural.HEART_FEATURES, np.asarray(train.examples["x"]).T, strict=True))
    assert len(column) == 32 and train.examples["x"].dtype == np.float32
    for name in ("age", "trestbps", "chol", "thalch", "oldpeak", "ca"):
        missing = column.get(f"{name} missing", np.zeros(len(column[name]))) == 1
        assert abs(column[name][~missing].mean()) < 1e-5 and abs(column[name][~missing].std() - 1) < 1e-5
        assert not column[name][missing].any()
    for name, values in natural._MANY.items():
        told = sum(column[f"{name}={value}"] for value in values)
        np.testing.assert_array_equal(told, 1 - column.get(f"{name} missing", 0))
    switzerland = slice(int(train.start[2]), int(train.start[2] + train.size[2]))
    assert column["chol missing"][switzerland].all()  # it wrote 0 for every patient
    assert np.isin(np.asarray(test.examples["x"])[:, 6:9], [-1, 0, 1]).all()


def test_the_row_filed_under_the_wrong_hospital_is_hungarys():
    with open(Path(natural.__file__).parent / "embedded" / "heart_disease_uci.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["id"] == "304")
    assert row["dataset"] == "Cleveland" and row["age"] == "28"
    parts = natural.heart()[:2]
    ages = [np.asarray(p.examples["x"])[int(p.start[1]) :][: int(p.size[1]), 0] for p in parts]
    everyone = min(np.asarray(p.examples["x"])[:, 0].min() for p in parts)
    assert min(a.min() for a in ages) == everyone  # 28 is the youngest of all


# Finding


@pytest.mark.parametrize(
    "place",
    [
        "root/mnist",
        "root",
        "home/.cache/jfed/mnist",
        "work/data/MNIST/raw",
        "home/data/MNIST/raw",
        "home/.keras/datasets/mnist",
    ],
)
def test_mnist_is_found_in_the_folder_of(nowhere, tiny, monkeypatch, place):
    monkeypatch.setenv("JFED_DATA", str(nowhere / "root"))
    plain = place.startswith("work")
    put_idx(nowhere / place, pack=bytes if plain else gzip.compress, suffix="" if plain else ".gz")
    assert is_tiny(sets.mnist())


def test_mnist_is_found_in_keras_archive(nowhere, tiny):
    folder = nowhere / "home/.keras/datasets"
    folder.mkdir(parents=True)
    np.savez(folder / "mnist.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), RAW, strict=True)))
    assert is_tiny(sets.mnist())


def test_mnist_is_found_in_hugging_faces_cache_if_the_package_is_there(nowhere, tiny, monkeypatch):
    folder = nowhere / "home/.cache/huggingface/datasets/ylecun___mnist/mnist/0.0.0/abc"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / f"mnist-{name}.arrow").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="needs the package `datasets`"):
        sets.mnist()

    class Dataset:
        column_names = ["image", "label"]

        def __init__(self, first):
            self.columns = {"image": list(RAW[first]), "label": RAW[first + 1].astype(np.int64)}

        @classmethod
        def from_file(cls, path):
            return cls(0 if path.endswith("train.arrow") else 2)

        def with_format(self, kind):
            return self

        def __getitem__(self, name):
            return self.columns[name]

    module = types.ModuleType("datasets")
    module.Dataset = Dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(_copies.importlib.util, "find_spec", lambda name: module)
    assert is_tiny(sets.mnist())


def test_a_copy_that_is_not_the_canonical_one_is_passed_over_and_told_of(nowhere, tiny, monkeypatch):
    monkeypatch.setenv("JFED_DATA", str(nowhere / "root"))
    wrong = [FILES[0], idx(np.array([7, 0, 8], np.uint8)), *FILES[2:]]
    put_idx(nowhere / "root" / "mnist", wrong)
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte is not the canonical file"):
        sets.mnist()
    put_idx(nowhere / "home/.keras/datasets/mnist")
    assert is_tiny(sets.mnist())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "emnist", "cifar10", "cifar100"])
def test_a_set_that_is_nowhere_is_one_error_that_lists_every_place_and_a_cure(nowhere, monkeypatch, name):
    monkeypatch.setenv("JFED_DATA", str(nowhere / "root"))
    with pytest.raises(FileNotFoundError) as caught:
        getattr(sets, name)()
    told = str(caught.value)
    for part in (str(nowhere / "root"), str(nowhere / "home/.cache/jfed"), "download=True", "$JFED_DATA/"):
        assert part in told
    assert str(nowhere / "home/data") in told
    if name != "emnist":
        assert str(nowhere / "home/.keras/datasets") in told and "huggingface" in told
    assert ("fashion_small()" in told) == (name == "fashion_mnist")


@pytest.mark.parametrize(("split", "first"), [("balanced", 0), ("letters", 1)])
def test_emnist_is_upright_and_counts_classes_from_0(nowhere, monkeypatch, split, first):
    monkeypatch.setenv("JFED_DATA", str(nowhere))
    stems = [f"emnist-{split}-{p}-{k}-ubyte" for p in ("train", "test") for k in ("images-idx3", "labels-idx1")]
    files = [idx(RAW[0]), idx(np.array([1, 2, 26], np.uint8)), idx(RAW[2]), idx(np.array([1, 1], np.uint8))]
    put_idx(nowhere / "emnist" / "gzip", files, stems)
    train, _ = sets.emnist(split)
    np.testing.assert_array_equal(train["x"][1, 2, 5, 0], np.float32(RAW[0][1, 5, 2]) / np.float32(255))
    assert train["y"].tolist() == [1 - first, 2 - first, 26 - first]


def put_cifar(folder, rows=(50_000, 10_000), fine=False):
    """CIFAR of black images; the last image of each file is white."""
    folder.mkdir(parents=True)
    train = [rows[0]] if fine else [rows[0] // 5] * 5
    for name, count in zip(cifar.CIFAR_100_FILES if fine else cifar.CIFAR_10_FILES, (*train, rows[1]), strict=True):
        data, labels = np.zeros((count, 3072), np.uint8), [7] * count
        data[-1] = 255
        batch = {"data": data, "fine_labels": labels, "coarse_labels": labels} if fine else {"data": data}
        (folder / name).write_bytes(pickle.dumps({"labels": labels, **batch}, protocol=4))


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_is_found_whole_even_beside_the_other(nowhere, monkeypatch, fine):
    monkeypatch.setenv("JFED_DATA", str(nowhere / "root"))
    monkeypatch.setattr(_copies, "CIFAR_ROWS", (50, 10))
    put_cifar(nowhere / "root", (50, 10), fine=False)
    put_cifar(nowhere / "more", (50, 10), fine=True)
    for path in (nowhere / "more").iterdir():
        path.rename(nowhere / "root" / path.name)
    train, test = (sets.cifar100 if fine else sets.cifar10)()
    assert train["x"].shape == (50, 32, 32, 3) and test["x"].shape == (10, 32, 32, 3)
    assert train["x"][..., 0].sum() == 1024 * (1 if fine else 5)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("rows", [(45, 10), (50, 9)])
def test_cifar_with_too_few_rows_is_not_the_named_set(nowhere, monkeypatch, fine, rows):
    monkeypatch.setenv("JFED_DATA", str(nowhere / "root"))
    name = "cifar100" if fine else "cifar10"
    put_cifar(nowhere / "root" / name, rows, fine)
    told = f"it has {rows[0]} and {rows[1]} images, not the set's 50000 and 10000"
    with pytest.raises(FileNotFoundError, match=told):
        getattr(sets, name)()


@pytest.mark.parametrize(
    ("name", "left_out"), [("cifar10", "data_batch_3"), ("cifar10", "test_batch"), ("cifar100", "train")]
)
def test_a_part_of_cifar_is_not_the_set_and_what_is_missing_is_told(nowhere, monkeypatch, name, left_out):
    monkeypatch.setenv("JFED_DATA", str(nowhere / "root"))
    put_cifar(nowhere / "root" / name, (50, 10), fine=name == "cifar100")
    (nowhere / "root" / name / left_out).unlink()
    with pytest.raises(FileNotFoundError, match=rf"\[found, but .*has no {left_out}"):
        getattr(sets, name)()


def test_emnist_refuses_a_split_it_does_not_have():
    with pytest.raises(ValueError, match="balanced, byclass"):
        sets.emnist("writers")


# Fetching


def source(path, **change):
    content = path.read_bytes()
    return download.Source(path.as_uri(), "sha256", hashlib.sha256(content).hexdigest())._replace(**change)


def test_a_fetched_file_appears_whole(tmp_path):
    remote = tmp_path / "remote"
    remote.write_bytes(bytes(300_000))
    download.fetch(source(remote), tmp_path / "new" / "here")
    assert (tmp_path / "new" / "here").read_bytes() == bytes(300_000)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("content", "change", "kind", "told"),
    [
        (b"data", {"checksum": "0" * 64}, ValueError, "not 0000.*nothing was kept"),
        (b"data", {"unpacked": True}, ValueError, "not a gzip file"),
        (gzip.compress(b"data", mtime=0)[:-9], {"unpacked": True}, ValueError, "nothing was kept"),
        (b"data", {"url": "file:///no/such/file"}, ConnectionError, "cannot be fetched"),
    ],
)
def test_a_wrong_checksum_leaves_nothing_behind(tmp_path, content, change, kind, told):
    remote = tmp_path / "remote"
    remote.write_bytes(content)
    with pytest.raises(kind, match=told):
        download.fetch(source(remote, **change), tmp_path / "new" / "here")
    assert list((tmp_path / "new").iterdir()) == []


def test_mnist_is_fetched_once_and_only_when_asked(nowhere, tiny, monkeypatch):
    put_idx(nowhere / "remote")
    monkeypatch.setattr(sets, "_MNIST", TINY._replace(url=(nowhere / "remote").as_uri() + "/"))
    with pytest.raises(FileNotFoundError):
        sets.mnist()
    assert is_tiny(sets.mnist(download=True))
    monkeypatch.setattr(download, "fetch", None)
    assert is_tiny(sets.mnist(download=True))
    assert len(list((nowhere / "home/.cache/jfed/mnist").iterdir())) == 4


def test_only_wanted_members_leave_an_archive_and_none_leaves_the_folder(tmp_path):
    remote = tmp_path / "remote.tar.gz"
    with tarfile.open(remote, "w:gz") as tar:
        for name in ("cifar/train", "../../test", "/test_batch", "cifar/readme.html"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"data"))
        link = tarfile.TarInfo("data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    wanted = {"train", "test", "test_batch", "data_batch_1"}
    download.fetch_members(source(remote), tmp_path / "a" / "b", wanted.__contains__)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["test", "test_batch", "train"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "remote.tar.gz"]

    zipped = tmp_path / "remote.zip"
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("gzip/emnist-x-ubyte.gz", b"one")
        file.writestr("../emnist-y-ubyte.gz", b"two")
    download.fetch_members(source(zipped), tmp_path / "c", lambda name: name.endswith(".gz"))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["emnist-x-ubyte.gz", "emnist-y-ubyte.gz"]


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name)
    return source(path)


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_unpacking_leaves_no_part_of_the_archive(tmp_path, monkeypatch, there):
    remote, folder = archive(tmp_path / "remote.zip", "one", "two", "three"), tmp_path / "sets" / "here"
    if there:
        folder.mkdir(parents=True)
        (folder / "note").write_text("mine")
    whole = download._members

    def interrupted(path):
        for i, member in enumerate(whole(path)):
            if i == 2:
                raise KeyboardInterrupt
            yield member

    monkeypatch.setattr(download, "_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.fetch_members(remote, folder, lambda name: True)
    assert [str(p.relative_to(tmp_path / "sets")) for p in (tmp_path / "sets").rglob("*")] == (
        ["here", "here/note"] if there else []
    )


def test_members_come_by_one_renaming_or_join_what_the_folder_holds(tmp_path):
    remote, folder = archive(tmp_path / "remote.zip", "one", "two"), tmp_path / "here"
    download.fetch_members(remote, folder, lambda name: True)
    (folder / "one").write_text("damaged")
    (folder / "note").write_text("mine")
    download.fetch_members(remote, folder, lambda name: True)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"one": "one", "two": "two", "note": "mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "remote.zip"]


def test_a_damaged_archive_is_an_error_and_leaves_nothing_behind(tmp_path):
    remote = tmp_path / "remote.tar.gz"
    remote.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="archive is damaged"):
        download.fetch_members(source(remote), tmp_path / "new", lambda name: True)
    assert [path.name for path in tmp_path.iterdir()] == ["remote.tar.gz"]


@pytest.mark.parametrize(("shape", "side"), [((2, 28, 28, 1), 5), ((2, 28, 14, 1), 7), ((2, 28, 28, 1), 0)])
def test_images_that_cannot_be_averaged_to_a_side_are_refused(shape, side):
    with pytest.raises(ValueError, match=rf"downscale\(side={side}\)"):
        sets.downscale(np.zeros(shape), side)


def test_an_image_keeps_its_mean_and_its_own_quarter_when_downscaled():
    images = np.random.default_rng(0).random((3, 28, 28, 2))
    small = sets.downscale(images, 14)
    np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)))
    np.testing.assert_allclose(small[1, 3, 5], images[1, 6:8, 10:12].mean((0, 1)))
