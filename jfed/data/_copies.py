"""Copies of public sets that are on this machine already: where they may lie, and how each is read.

A set is looked for in `$JFED_DATA`, in jfed's own cache, and in those of torchvision, Keras and
Hugging Face. Every reader gives the same four arrays, or None where there is no copy; a copy that is
there but damaged is an error, told to the user only if no other place has a good one.
"""

import hashlib
import importlib.util
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jfed import _machine
from jfed.data.cifar import CIFAR_10_FILES, CIFAR_100_FILES, read_cifar_10, read_cifar_100
from jfed.data.readers import from_hugging_face, read_idx

Raw = list[np.ndarray]
"""Train images, train labels, test images, test labels, as the files hold them."""

CIFAR_ROWS = (50_000, 10_000)
IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def first_found(name: str, candidates: Iterable[tuple[str, Callable[[], Any]]], cure: str) -> Any:
    """The first candidate that has the set.

    Args:
      name: of the set, for the error.
      candidates: pairs of a place, in words, and a function that reads the set there: None if it is
        not there, a `ValueError` if it is there but damaged, which is reported if no other place has it.
      cure: what to do if no place has the set.

    Raises:
      FileNotFoundError: naming every place.

    >>> first_found("mnist", [("here", lambda: None), ("there", lambda: 7)], "give up")
    7
    """
    looked: list[str] = []
    for place, read in candidates:
        try:
            found = read()
        except (ValueError, OSError) as error:
            looked.append(f"{place}  [found, but {error}]")
            continue
        if found is not None:
            return found
        looked.append(place)
    raise FileNotFoundError(f"{name} was not found. Looked in:\n  " + "\n  ".join(looked) + f"\n{cure}")


def data_folders(*names: str) -> Iterator[Path]:
    """Folders of jfed's own where a set may lie: `$JFED_DATA/<name>`, `$JFED_DATA`, the cache's `<name>`."""
    if root := os.environ.get("JFED_DATA"):
        yield from (Path(root, name) for name in names)
        yield Path(root)
    yield from (_machine.cache_folder() / name for name in names)


def torchvision_folders(*names: str) -> Iterator[Path]:
    """Folders of a set below the two usual roots of torchvision."""
    for root in (Path("data"), Path.home() / "data"):
        yield from (root / name for name in names)


def keras_folder() -> Path:
    """Where Keras keeps data sets."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras", "datasets")


def hugging_face_folder() -> Path:
    """Where `datasets` keeps Arrow files."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")


def target_folder(name: str) -> Path:
    """Where a fetched set is put: `$JFED_DATA/<name>`, or the cache."""
    root = os.environ.get("JFED_DATA")
    return Path(root, name) if root else _machine.cache_folder() / name


def read_idx_files(folder: Path, stems: Any, sha256: tuple[str, ...] | None) -> Raw | None:
    """Reads the four IDX files named `stems` or `stems` + ".gz" in a folder."""
    paths = [next((p for p in (folder / f"{s}.gz", folder / s) if p.is_file()), None) for s in stems]
    return None if None in paths else checked([read_idx(path) for path in paths], sha256)


def read_keras_archive(archive: Path, sha256: tuple[str, ...]) -> Raw | None:
    """Reads the `.npz` in which Keras keeps MNIST."""
    if not archive.is_file():
        return None
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            return checked([arrays[key] for key in ("x_train", "y_train", "x_test", "y_test")], sha256)
    except Exception as error:  # a damaged npz raises what zip, zlib or numpy come across
        raise ValueError(f"it cannot be read: {error}") from error


def read_cifar_folder(folder: Path, name: str) -> Raw | None:
    """Reads CIFAR's batches if the folder holds any of the set `name`; all must then be there and whole."""
    # Of the two layouts only that of `name` will do, and one folder may hold both.
    files, read = (CIFAR_10_FILES, read_cifar_10) if name == "cifar10" else (CIFAR_100_FILES, read_cifar_100)
    if not any((folder / file).is_file() for file in files):
        return None
    train, test = read(folder)
    return checked([train["x"], train["y"], test["x"], test["y"]], rows=CIFAR_ROWS)


def hugging_face(name: str, image: str, label: str, **canonical: Any) -> Iterator[tuple[str, Callable[[], Raw | None]]]:
    """The candidate that reads Arrow files, if the package that can is installed; `canonical` is for `checked`."""
    root = hugging_face_folder()
    if importlib.util.find_spec("datasets") is None:
        yield f"{root}  [not looked at: needs the package `datasets`]", lambda: None
    else:
        yield str(root), partial(_read_arrow, root, name, image, label, **canonical)


def _read_arrow(root: Path, name: str, image: str, label: str, **canonical: Any) -> Raw | None:
    # <owner>___<name>/<config>/<version>/<hash>/<name>-<split>.arrow; from_file never reaches for the network.
    for first in sorted(
        [*root.glob(f"*{name}/*/*/*/{name}-train.arrow"), *root.glob(f"{name}/*/*/{name}-train.arrow")]
    ):
        paths = [first, first.with_name(f"{name}-test.arrow")]
        if paths[1].is_file():
            try:
                import datasets

                parts = [from_hugging_face(datasets.Dataset.from_file(str(p)), columns=[image, label]) for p in paths]
            except Exception as error:  # Arrow and image decoders raise their own kinds
                raise ValueError(f"{first} cannot be read: {error}") from error
            return checked([part[column] for part in parts for column in (image, label)], **canonical)
    return None


def checked(raw: Raw, sha256: tuple[str, ...] | None = None, *, rows: tuple[int, int] | None = None) -> Raw:
    """The four arrays, if their shapes fit and, where known, their numbers of rows and checksums."""
    for images, labels in (raw[:2], raw[2:]):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"images {images.dtype}{list(images.shape)} and labels {list(labels.shape)} do not belong together"
            )
    if rows is not None and (len(raw[0]), len(raw[2])) != rows:
        raise ValueError(f"it has {len(raw[0])} and {len(raw[2])} images, not the set's {rows[0]} and {rows[1]}")
    for array, stem, checksum in zip(raw, IDX_STEMS, sha256 or (), strict=False):
        # The checksum is that of the IDX file, whatever the array was read from.
        head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        digest = hashlib.sha256(head)
        digest.update(np.ascontiguousarray(array, np.uint8))
        if digest.hexdigest() != checksum:
            raise ValueError(f"{stem} is not the canonical file: its sha256 is {digest.hexdigest()}, not {checksum}")
    return raw
