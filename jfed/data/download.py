"""Fetching of public files: whole and verified, or not at all.

Nothing is fetched unless asked for. What comes is written to a temporary file beside its place, its
checksum is compared, and only then is it renamed; a run that is interrupted leaves nothing to trip over.
An archive's members likewise come to light together, by the renaming of a folder.
"""

import hashlib
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = 1 << 16


class Source(NamedTuple):
    """A public address and what must come from it."""

    url: str
    algorithm: str  # "sha256" or "md5"
    checksum: str  # in hexadecimal
    unpacked: bool = False  # whether the checksum is of what the gzip file holds, rather than of the file


def fetch(source: Source, target: Path) -> None:
    """Fetches a file; it appears at `target` whole and verified, or not at all.

    Raises:
      ValueError: if the checksum is wrong.
      OSError: if the address cannot be reached or the folder not be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename, which is atomic.
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        digest = hashlib.new(source.algorithm, usedforsecurity=False)
        inflate = zlib.decompressobj(wbits=31) if source.unpacked else None
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(source.url, timeout=60) as reply:
            while block := reply.read(_BLOCK):
                file.write(block)
                try:
                    digest.update(inflate.decompress(block) if inflate else block)
                except zlib.error as error:
                    raise ValueError(
                        f"{source.url}: what came is not a gzip file ({error}); try again later."
                    ) from error
        if digest.hexdigest() != source.checksum:
            raise ValueError(
                f"{source.url}: the {source.algorithm} of what came is {digest.hexdigest()}, not {source.checksum}; "
                "nothing was kept. Try again later, or place a good copy yourself."
            )
        os.chmod(name, 0o644)
        os.replace(name, target)
    except urllib.error.URLError as error:
        raise ConnectionError(
            f"{source.url}: cannot be fetched ({error}); place a copy at {target} yourself."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)


def fetch_members(source: Source, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Fetches a tar or zip archive and keeps the members wanted, each by its bare file name.

    No path from inside the archive is used, so none can lead out of `folder`. All members are unpacked
    beside `folder` and renamed to it at once. If it is there already and holds anything, they are
    moved into it one by one, last of all, and what else it holds stays.

    Args:
      source: the archive; the checksum is of the archive itself.
      folder: where the members go; created with its parents.
      wanted: whether to keep a member, asked with its bare file name.

    Raises:
      ValueError: if the checksum is wrong or the archive damaged.
      OSError: if the address cannot be reached or the folder not be written.
    """
    folder = folder.resolve()  # the rename must not meet a link
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
        archive, unpacked = Path(temporary, "archive"), Path(temporary, "unpacked")
        fetch(source, archive)
        unpacked.mkdir()
        try:
            for name, open_member in _members(archive):
                if not wanted(name):
                    continue
                with open_member() as member, open(unpacked / name, "wb") as file:
                    while block := member.read(_BLOCK):
                        file.write(block)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{source.url}: the archive is damaged ({error}).") from error
        try:
            os.replace(unpacked, folder)
        except OSError:
            if not folder.is_dir():
                raise
            for path in unpacked.iterdir():
                os.replace(path, folder / path.name)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Bare names of the plain files of an archive, and how to open each."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield Path(info.filename).name, lambda info=info: zipped.open(info)
        return
    with tarfile.open(archive) as tar:
        for entry in tar:
            if entry.isfile():
                yield Path(entry.name).name, lambda entry=entry: tar.extractfile(entry)
