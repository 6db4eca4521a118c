"""Makes `fashion_small.xz`, the Fashion-MNIST images that come with jfed, from the canonical files.

From the training file the first 1,000 images of each class, from the test file the first 200, class
by class, each image read down its columns (garments are alike from top to bottom, which saves 5 %),
the whole in one xz stream. Labels need not be stored. The other embedded files are copies.

Command: `JFED_DATA=<folder with fashion-mnist/> python -m jfed.data.embedded.make`; it takes about
ten seconds and always writes the same bytes.
"""

import lzma
from pathlib import Path

import numpy as np

from jfed.data import sets

FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 24}
]


def pixels() -> bytes:
    """The bytes that are compressed, 12,000 x 784."""
    parts = []
    for split, each in zip(sets.fashion_mnist(), (sets.SMALL_TRAIN, sets.SMALL_TEST), strict=True):
        images = np.round(split["x"][..., 0] * 255).astype(np.uint8)
        parts += [images[np.flatnonzero(split["y"] == c)[:each]] for c in range(10)]
    return np.concatenate(parts).transpose(0, 2, 1).tobytes()


def main() -> None:
    """Writes the file beside this one."""
    target = Path(__file__).with_name("fashion_small.xz")
    target.write_bytes(lzma.compress(pixels(), check=lzma.CHECK_CRC64, filters=FILTERS))
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
