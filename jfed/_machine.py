"""What the machine offers: a folder for what is worth keeping, and memory."""

import math
import os
import sys
from importlib import metadata
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Where the kit keeps downloads, compiled programs and measured widths: `$JFED_CACHE`, or the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JFED_CACHE") or Path(base) / "jfed")


def version() -> str:
    """The installed version of the kit."""
    try:
        return metadata.version("jfed")
    except metadata.PackageNotFoundError:
        return "not installed"


def free_memory() -> float:
    """Bytes free on the device; a CPU, which does not tell and is shared, has half of what the host has left."""
    told = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in told:
        return told["bytes_limit"] - told.get("bytes_in_use", 0)
    if not hasattr(os, "sysconf"):  # not a Unix
        return math.inf
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 2


def peak_memory() -> int:
    """The most bytes held so far: on the device where it tells, else by this process; 0 where nobody does."""
    told = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        return told["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
