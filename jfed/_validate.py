"""Checks of what a user hands in, made before anything compiles; traced values pass unchecked."""

from typing import Any

import jax
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether every leaf of `value` has a value now, rather than inside a traced program."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def at_least_one(where: str, name: str, value: Any, cure: str) -> None:
    """Raises a `ValueError` unless `value` is a whole number of at least 1.

    >>> at_least_one("lanes", "width", 0, "a good start is 16")
    Traceback (most recent call last):
    ...
    ValueError: lanes(width=0): width must be a whole number of at least 1; a good start is 16.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{where}({name}={value!r}): {name} must be a whole number of at least 1; {cure}.")


def positive(where: str, name: str, value: Any, cure: str) -> None:
    """Raises a `ValueError` unless `value` is traced or a finite number above 0."""
    if is_concrete(value) and not (np.ndim(value) == 0 and np.isfinite(value) and value > 0):
        raise ValueError(f"{where}({name}={value!r}): {name} must be a finite number above 0; {cure}.")


def within(where: str, name: str, value: Any, low: float, high: float, cure: str) -> None:
    """Raises a `ValueError` unless `value` is traced or lies in [low, high]."""
    if is_concrete(value) and not (np.ndim(value) == 0 and low <= value <= high):
        raise ValueError(f"{where}({name}={value!r}): {name} must lie in [{low}, {high}]; {cure}.")


def at_least_zero(where: str, name: str, value: Any, cure: str) -> None:
    """Raises a `ValueError` unless `value` is traced or a finite number of at least 0."""
    if is_concrete(value) and not (np.ndim(value) == 0 and np.isfinite(value) and value >= 0):
        raise ValueError(f"{where}({name}={value!r}): {name} must be a finite number of at least 0; {cure}.")


def flags(where: str, **given: Any) -> None:
    """Raises a `ValueError` unless each is True or False."""
    for name, value in given.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{where}({name}={value!r}): {name} must be True or False.")
