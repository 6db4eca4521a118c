"""Checkpoints of any pytree, bit for bit, that say so when they cannot be trusted.

`save` lets Orbax write the arrays under a temporary name, adds a manifest (path, shape and dtype of
every leaf, SHA-256 of every file), and renames the whole: a process killed at any moment leaves
nothing that looks finished. `restore` checks every file before it reads any, and writes and deletes
nothing: a damaged or foreign folder is left as it was found.

    folder/step_00000020/jfed.json      the manifest
    folder/step_00000020/arrays/        an Orbax checkpoint
    folder/step_00000010/               the step before, in case the newest is damaged
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfed import _leaves, _validate
from jfed.core import Tree

_FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})")
# What a killed `save` may leave behind: a step on its way in or out.
_LEFTOVER = re.compile(r"step_\d{8,}\.(saving|deleting)")


class _Unfit(Exception):
    """A step that is readable but is not the one asked for; the message completes 'step 7 ...'."""


class _Damaged(_Unfit):
    """A step that does not hold what its manifest says."""


def save(folder: str | os.PathLike, step: int, tree: Tree, *, keep: int = 2) -> None:
    """Writes `tree` as a step of `folder` and returns when it is on disk.

    Guarantees:
      * The step appears by one rename: it is complete or it is not there.
      * Nothing is overwritten; steps before the latest `keep` are removed, folders without a
        manifest of jfed's excepted.

    Args:
      folder: made if it does not exist.
      step: usually rounds completed; above every step already there.
      tree: leaves are jax arrays (typed keys included), numpy arrays or Python numbers.
      keep: how many steps stay, at least 1.

    Raises:
      ValueError: if `keep` or `step` is out of bounds, a leaf is not an array, or `folder` cannot be
        written or belongs to something else.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    _validate.at_least_one("save", "keep", keep, "2 leaves one in reserve")
    newest = latest(folder)
    floor = 0 if newest is None else newest + 1
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < floor:
        raise ValueError(
            f"save(step={step!r}): step must be a whole number of at least {floor} in {folder}, where nothing is "
            "overwritten; restore the newest step first, or choose another folder."
        )
    leaves, arrays = _leaves.pack(tree)
    path = _path(folder, step)
    partial = path.with_name(path.name + ".saving")
    writer = jax.process_index() == 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if writer:
            for name in filter(_LEFTOVER.fullmatch, os.listdir(folder)):
                shutil.rmtree(folder / name)
    except OSError as error:
        raise ValueError(f"save({folder}): cannot be written ({error.strerror}); choose another folder.") from error
    # The step itself is an array too, because Orbax refuses an empty tree.
    with _quiet():
        ocp.save(partial / "arrays", arrays | {"step": np.asarray(step, np.int64)})
    if writer:
        _write_manifest(partial, {"format": _FORMAT, "step": int(step), "leaves": leaves, "files": _digests(partial)})
        partial.rename(path)
        for old in _steps(os.listdir(folder))[:-keep]:
            _remove(folder, old)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jfed.checkpoint.save {path.name}")


def latest(folder: str | os.PathLike) -> int | None:
    """The newest step in `folder`, or None where nothing has been saved yet; reads names only.

    Raises:
      ValueError: if `folder` is a file, or holds other things and no checkpoint.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, 3, {"w": jnp.arange(3.0), "key": jax.random.key(0)})
    ...     print(latest(folder))
    3
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, not a folder of checkpoints; choose another folder.")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if steps := _steps(names):
        return steps[-1]
    if others := [name for name in names if not _LEFTOVER.fullmatch(name)]:
        raise ValueError(
            f"{folder}: holds no jfed checkpoint but other files ({', '.join(others[:3])}); "
            "choose a new or empty folder."
        )
    return None


def restore(folder: str | os.PathLike, like: Tree, *, step: int | None = None) -> tuple[int, Tree]:
    """Reads a step back, checked against its manifest, with the structure of `like`.

    Leaves have the bits that were saved. Where a leaf of `like` is committed to devices, or is a
    `ShapeDtypeStruct` with a sharding, the restored leaf goes there; other arrays are uncommitted on
    the default device, as a fresh computation would have them. Numpy arrays and Python numbers
    come back as such. How arrays lay when they were saved, on which mesh of how many processes, does not
    matter. A leaf that is to lie in parts is read in parts, and a process needs memory for its own.

    Args:
      folder: as given to `save`.
      like: a pytree of arrays or of `ShapeDtypeStruct`s, as from `jax.eval_shape`.
      step: the newest by default.

    Returns:
      `(step, tree)`.

    Raises:
      ValueError: if there is no such step, it is damaged, or its leaves are not those of `like`. Never
        falls back to an older step by itself: the message names the one to use.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> tree = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, 3, tree)
    ...     step, tree = restore(folder, jax.eval_shape(lambda: tree))
    >>> print(step, tree["w"], jax.random.key_data(tree["key"]))
    3 [0. 1. 2.] [0 0]
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    newest = latest(folder)
    if newest is None:
        raise ValueError(f"restore({folder}): holds no checkpoint; check the path, or start afresh.")
    step = newest if step is None else step
    steps = _steps(os.listdir(folder))
    if step not in steps:
        raise ValueError(f"restore(step={step!r}): {folder} holds steps {steps}; choose one of them.")
    try:
        leaves = _verified(folder, step)
        if difference := _leaves.difference(leaves, like):
            cure = "restore with the model and method it was saved with, or choose another folder."
            raise _Unfit(f"{difference}; {cure}")
    except _Damaged as error:
        cure = "no other step is intact; choose a new folder to start afresh."
        if spare := _newest_intact(folder, [s for s in steps if s != step]):
            cure = f"step {spare[0]} is intact: use step={spare[0]}, or move {_path(folder, step).name} away."
        raise ValueError(f"restore({folder}): step {step} {error}; {cure}") from error
    except _Unfit as error:
        raise ValueError(f"restore({folder}): step {step} {error}") from error
    wanted = _leaves.stored(leaves, like)
    with _quiet():
        arrays = ocp.load(_path(folder, step) / "arrays", wanted | {"step": np.empty((), np.int64)})
    return int(step), _leaves.unpack(arrays, leaves, like)


def _write_manifest(path: Path, body: dict[str, Any]) -> None:
    """Writes `body`, and its own digest, as the manifest of the step in `path`, through to the disk."""
    with open(path / "jfed.json", "w", encoding="utf-8") as file:
        json.dump({"manifest": body, "sha256": _digest(body)}, file)
        file.flush()
        os.fsync(file.fileno())


def _verified(folder: Path, step: int) -> list[dict[str, Any]]:
    """The leaves in a step's manifest, once it and every file it lists are found as they were written.

    Orbax is not asked before: on bad bytes it raises errors of all kinds, some from its own threads.
    """
    path = _path(folder, step)
    if not (path / "jfed.json").is_file():
        raise _Damaged("has lost its manifest jfed.json, or is not a jfed checkpoint")
    try:
        manifest = json.loads((path / "jfed.json").read_text(encoding="utf-8"))
        body = manifest["manifest"]
        sound = manifest["sha256"] == _digest(body) and body["step"] == step
    except (ValueError, KeyError, TypeError):  # ValueError: neither JSON nor text
        sound = False
    if not sound:
        raise _Damaged("has a damaged manifest jfed.json")
    if body["format"] != _FORMAT:
        raise _Unfit(f"has format {body['format']}, this jfed reads {_FORMAT}; use the jfed that wrote it.")
    found = _digests(path)
    for name, digest in body["files"].items():
        if found.get(name) != digest:
            raise _Damaged(f"has {'damaged' if name in found else 'lost'} its file {name}")
    return body["leaves"]


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file below `path`, the manifest excepted."""
    found = {}
    for file in sorted((path / "arrays").rglob("*")):
        if file.is_file():
            with open(file, "rb") as stream:
                found[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _digest(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest, however its keys are ordered."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _newest_intact(folder: Path, steps: list[int]) -> list[int]:
    """The newest of `steps` that reads back whole, in a list; an empty one if none does."""
    for step in reversed(steps):
        with contextlib.suppress(_Unfit):
            _verified(folder, step)
            return [step]
    return []


def _remove(folder: Path, step: int) -> None:
    """Deletes a step of ours; renamed first, so that a kill leaves no half of a step under its name."""
    path = _path(folder, step)
    if (path / "jfed.json").is_file():
        shutil.rmtree(path.rename(path.with_name(path.name + ".deleting")))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _steps(names: list[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's log lines and warnings, meant for its own developers, off the terminal."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
