"""Settings of glibc's malloc for processes that compute on a CPU.

By default glibc returns the memory of every large tensor to the kernel, which zeroes each page before the next
allocation. A training step repeatedly allocates tensors of the same sizes; with these settings their pages are reused.
"""

from __future__ import annotations

import ctypes
import gc
import os

_GIB = 2**30
_TUNABLES = {
    "hugetlb": 1,  # request huge pages
    "mmap_max": 0,  # no separate mapping for a large block
    "trim_threshold": 1024 * _GIB,  # bytes; return nothing to the kernel before the process ends
    "top_pad": _GIB // 4,  # bytes; grow the heap in large increments
    "arena_max": 1,  # memory freed by one thread can be reused by another
}


def malloc_env() -> dict[str, str]:
    """Return the environment variables for a process that computes on a CPU.

    They must be set before the process starts. The result is empty if the user has set glibc's tunables. Other C
    libraries ignore the variable.
    """
    if "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}


def release_free_memory() -> None:
    """Delete unreachable objects and return free memory of the process to the kernel, where the C library is glibc."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
