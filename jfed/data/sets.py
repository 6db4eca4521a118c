"""Named image sets: Fashion-MNIST, MNIST, EMNIST, CIFAR-10 and CIFAR-100.

A set is `(train, test)`; a split is a dict of numpy arrays, images `x` float32 in [0, 1] of shape
[E, rows, columns, channels] and labels `y` int32 [E]. `fashion_small` comes with jfed; the others are
looked for in `$JFED_DATA` and in the caches of other libraries, and fetched only with
`download=True`. A copy of MNIST or Fashion-MNIST is used only if it is the canonical one, byte for
byte, so that results from two machines can be compared.

Letters: E examples.
"""

import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jfed import _validate
from jfed.data import _copies
from jfed.data import download as _download
from jfed.data.cifar import CIFAR_10_FILES, CIFAR_100_FILES

Split = dict[str, np.ndarray]

SMALL_TRAIN, SMALL_TEST = 1000, 200  # images of each class in `fashion_small`
_EMBEDDED = Path(__file__).parent / "embedded"


class _Idx(NamedTuple):
    """A set kept as the four canonical IDX files."""

    folder: str  # below $JFED_DATA, and in Keras' cache
    torchvision: str
    hugging_face: str  # pattern of its folder, and start of its files' names
    url: str
    sha256: tuple[str, ...]  # of the four files, uncompressed, in the order of _copies.IDX_STEMS


_MNIST = _Idx(
    folder="mnist",
    torchvision="MNIST",
    hugging_face="mnist",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    sha256=(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)
_FASHION = _Idx(
    folder="fashion-mnist",
    torchvision="FashionMNIST",
    hugging_face="fashion_mnist",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    sha256=(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
# md5 as NIST's file has in torchvision; NIST publishes none.
_EMNIST = _download.Source(
    "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip", "md5", "58c8d27c78d21e728a6bc7b3cc06412e"
)
_EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
# md5 from https://www.cs.toronto.edu/~kriz/cifar.html
_CIFAR = {
    "cifar-10-batches-py": _download.Source(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5", "c58f30108f718f92721af3b95e74349a"
    ),
    "cifar-100-python": _download.Source(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "md5", "eb9058c3a382ffc7106e4002c42a8d85"
    ),
}


def fashion_small() -> tuple[Split, Split]:
    """The part of Fashion-MNIST that comes with jfed: 10,000 images to train on and 2,000 to test on.

    The first 1,000 training and 200 test images of each of the 10 classes, in an order in which any
    ten rows from a multiple of ten hold each class once (so a prefix is balanced too). Source: Xiao,
    Rasul and Vollgraf 2017, arXiv:1708.07747; MIT licence, (c) 2017 Zalando SE.

    Returns:
      `(train, test)`: `x` float32 [10000, 28, 28, 1] and [2000, 28, 28, 1], `y` int32.

    >>> train, test = fashion_small()
    >>> train["x"].shape, test["x"].shape, train["y"][:12].tolist()
    ((10000, 28, 28, 1), (2000, 28, 28, 1), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    """
    pixels = np.frombuffer(lzma.decompress((_EMBEDDED / "fashion_small.xz").read_bytes()), np.uint8)
    # Stored class by class, each image column by column, because that compresses best.
    images = pixels.reshape(-1, 28, 28).transpose(0, 2, 1)
    splits = []
    for part, each in zip(np.split(images, [10 * SMALL_TRAIN]), (SMALL_TRAIN, SMALL_TEST), strict=True):
        dealt = part.reshape(10, each, 28, 28).swapaxes(0, 1).reshape(-1, 28, 28)
        splits.append(_split(dealt, np.tile(np.arange(10), each)))
    return splits[0], splits[1]


def fashion_mnist(*, embedded: bool = False, download: bool = False) -> tuple[Split, Split]:
    """Fashion-MNIST: 60,000 and 10,000 images of 10 kinds of clothing (Xiao et al. 2017, arXiv:1708.07747).

    Args:
      embedded: take the part that comes with jfed, `fashion_small`, instead of looking for the whole.
      download: fetch the set if it is found nowhere (31 MB).

    Returns:
      `(train, test)`: `x` float32 [60000, 28, 28, 1] and [10000, 28, 28, 1], `y` int32.

    Raises:
      FileNotFoundError: if it is found nowhere; the message says where it was looked for.
      ValueError: if a download has the wrong checksum.
    """
    return fashion_small() if embedded else _idx_set("fashion_mnist", _FASHION, download)


def mnist(*, download: bool = False) -> tuple[Split, Split]:
    """MNIST: 60,000 and 10,000 images of handwritten digits (LeCun, Bottou, Bengio and Haffner 1998).

    Args:
      download: fetch the set if it is found nowhere (12 MB).

    Returns:
      `(train, test)`: `x` float32 [60000, 28, 28, 1] and [10000, 28, 28, 1], `y` int32.

    Raises:
      FileNotFoundError: if it is found nowhere; the message says where it was looked for.
      ValueError: if a download has the wrong checksum.
    """
    return _idx_set("mnist", _MNIST, download)


def mnist_writers() -> tuple[np.ndarray, np.ndarray]:
    """Who wrote each MNIST digit: the set's natural clients, 539 in train and 297 in test.

    Row i belongs to image i of `mnist()`. Ids are NIST's and have gaps; `partition.natural` numbers
    them from 0. Source: QMNIST, Yadav and Bottou 2019, arXiv:1905.10498; BSD licence.

    Returns:
      `(train, test)`: int32 [60000] and [10000].

    >>> train, test = mnist_writers()
    >>> train.shape, len(np.unique(train)), len(np.unique(test))
    ((60000,), 539, 297)
    """
    with np.load(_EMBEDDED / "writers.npz", allow_pickle=False) as writers:
        return writers["train_writer"].astype(np.int32), writers["test_writer"].astype(np.int32)


def emnist(split: str = "balanced", *, download: bool = False) -> tuple[Split, Split]:
    """EMNIST: handwritten digits and letters (Cohen, Afshar, Tapson and van Schaik 2017, arXiv:1702.05373).

    NIST's files hold each image transposed; here it is upright. The labels of "letters", 1 to 26 in
    the files, are 0 to 25 here.

    Args:
      split: "balanced" (47 classes), "byclass" (62), "bymerge" (47), "digits", "letters" (26) or "mnist".
      download: fetch all splits if this one is found nowhere (562 MB).

    Returns:
      `(train, test)`: `x` float32 [E, 28, 28, 1], `y` int32 [E].

    Raises:
      FileNotFoundError: if it is found nowhere; the message says where it was looked for.
      ValueError: if there is no such split, or a download has the wrong checksum.
    """
    if split not in _EMNIST_SPLITS:
        raise ValueError(f"emnist(split={split!r}): split must be one of {', '.join(_EMNIST_SPLITS)}.")
    stems = [
        f"emnist-{split}-{part}-{kind}-ubyte" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")
    ]

    def candidates() -> Iterator[tuple[str, Callable[[], _copies.Raw | None]]]:
        for folder in (*_copies.data_folders("emnist"), *_copies.torchvision_folders("EMNIST/raw")):
            for place in (folder, folder / "gzip"):
                yield str(place), partial(_copies.read_idx_files, place, stems, None)

    def fetch() -> None:
        _download.fetch_members(
            _EMNIST,
            _copies.target_folder("emnist"),
            lambda name: name.startswith("emnist-") and name.endswith("-ubyte.gz"),
        )

    raw = _find(
        f"emnist({split!r})", candidates, fetch if download else None, _cure("emnist", f"{stems[0]}.gz and its like")
    )
    first = 1 if split == "letters" else 0
    return tuple(_split(x.transpose(0, 2, 1), y.astype(np.int32) - first) for x, y in (raw[:2], raw[2:]))


def cifar10(*, download: bool = False) -> tuple[Split, Split]:
    """CIFAR-10: 50,000 and 10,000 colour images of 10 kinds of things (Krizhevsky 2009).

    Args:
      download: fetch the set if it is found nowhere (170 MB).

    Returns:
      `(train, test)`: `x` float32 [50000, 32, 32, 3] and [10000, 32, 32, 3], `y` int32.

    Raises:
      FileNotFoundError: if it is found nowhere; the message says where it was looked for.
      ValueError: if a download has the wrong checksum.
    """
    return _cifar_set("cifar10", "cifar-10-batches-py", "label", download)


def cifar100(*, download: bool = False) -> tuple[Split, Split]:
    """CIFAR-100: as CIFAR-10, with 100 classes; `read_cifar` gives the 20 superclasses too (Krizhevsky 2009).

    Args:
      download: fetch the set if it is found nowhere (169 MB).

    Returns:
      `(train, test)`: `x` float32 [50000, 32, 32, 3] and [10000, 32, 32, 3], `y` int32, the fine label.

    Raises:
      FileNotFoundError: if it is found nowhere; the message says where it was looked for.
      ValueError: if a download has the wrong checksum.
    """
    return _cifar_set("cifar100", "cifar-100-python", "fine_label", download)


def downscale(images: np.ndarray, side: int) -> np.ndarray:
    """Images [E, H, W, channels] averaged over squares of pixels to [E, side, side, channels], to train sooner.

    Raises:
      ValueError: if the images are not square, or `side` does not divide theirs.

    >>> downscale(np.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0]
    array([[ 2.5,  4.5],
           [10.5, 12.5]])
    """
    _validate.at_least_one("downscale", "side", side, "14 is half of MNIST's")
    count, height, width, channels = np.shape(images)
    if height != width or height % side:
        raise ValueError(
            f"downscale(side={side}): the images are {height} x {width} pixels; they must be square, and side must "
            f"divide their side."
        )
    return np.asarray(images).reshape(count, side, height // side, side, width // side, channels).mean((2, 4))


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    x = np.ascontiguousarray(images if images.ndim == 4 else images[..., None])
    return {"x": x.astype(np.float32) / np.float32(255), "y": np.asarray(labels, np.int32)}


def _cure(name: str, files: str) -> str:
    return f"Put {files} in $JFED_DATA/{name}, or call with download=True."


def _find(name: str, candidates: Callable[[], Any], fetch: Callable[[], None] | None, cure: str) -> _copies.Raw:
    try:
        return _copies.first_found(name, candidates(), cure)
    except FileNotFoundError:
        if fetch is None:
            raise
    fetch()
    return _copies.first_found(name, candidates(), cure)


def _idx_set(name: str, known: _Idx, download: bool) -> tuple[Split, Split]:
    def candidates() -> Iterator[tuple[str, Callable[[], _copies.Raw | None]]]:
        keras = _copies.keras_folder()
        for folder in (
            *_copies.data_folders(known.folder),
            *_copies.torchvision_folders(f"{known.torchvision}/raw"),
            keras / known.folder,
        ):
            yield str(folder), partial(_copies.read_idx_files, folder, _copies.IDX_STEMS, known.sha256)
        archive = keras / f"{known.folder}.npz"
        yield str(archive), partial(_copies.read_keras_archive, archive, known.sha256)
        yield from _copies.hugging_face(known.hugging_face, "image", "label", sha256=known.sha256)

    def fetch() -> None:
        for stem, checksum in zip(_copies.IDX_STEMS, known.sha256, strict=True):
            source = _download.Source(f"{known.url}{stem}.gz", "sha256", checksum, unpacked=True)
            _download.fetch(source, _copies.target_folder(known.folder) / f"{stem}.gz")

    cure = _cure(known.folder, f"{_copies.IDX_STEMS[0]}.gz and the three other files")
    if known is _FASHION:
        cure += " 12,000 of its images come with jfed: fashion_small()."
    raw = _find(name, candidates, fetch if download else None, cure)
    return _split(raw[0], raw[1]), _split(raw[2], raw[3])


def _cifar_set(name: str, folder: str, label: str, download: bool) -> tuple[Split, Split]:
    def candidates() -> Iterator[tuple[str, Callable[[], _copies.Raw | None]]]:
        keras = _copies.keras_folder()
        for place in (
            *(base / folder for base in _copies.data_folders(name)),
            *_copies.data_folders(name),
            *_copies.torchvision_folders(folder),
            keras / folder,
            keras / folder / folder,
            keras / f"{folder}-target" / folder,  # Keras 3.6 and later
        ):
            yield str(place), partial(_copies.read_cifar_folder, place, name)
        yield from _copies.hugging_face(name, "img", label, rows=_copies.CIFAR_ROWS)

    def fetch() -> None:
        members = {*CIFAR_10_FILES, *CIFAR_100_FILES}
        _download.fetch_members(_CIFAR[folder], _copies.target_folder(name) / folder, members.__contains__)

    cure = _cure(name, f"the folder {folder} of the Python version")
    raw = _find(name, candidates, fetch if download else None, cure)
    return _split(raw[0], raw[1]), _split(raw[2], raw[3])
