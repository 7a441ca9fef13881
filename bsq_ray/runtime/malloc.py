"""Allocator settings of processes that compute on a CPU.

By default glibc returns the memory of every large tensor to the kernel, which clears it page by page before the next
allocation. A training step allocates the same tensors again and again; with these settings their pages are reused.
"""

from __future__ import annotations

import os

_GIB = 2**30
_TUNABLES = {
    "hugetlb": 1,  # request huge pages
    "mmap_max": 0,  # no separate mapping for a large block
    "trim_threshold": 1024 * _GIB,  # return nothing to the kernel before the process ends
    "top_pad": _GIB // 4,  # grow in large increments
    "arena_max": 1,  # memory freed by one thread can be reused by another
}


def malloc_env() -> dict[str, str]:
    """Return the environment for starting a process that computes on a CPU; glibc reads it only at startup.

    Empty if the user has set glibc's tunables. Other C libraries ignore it.
    """
    if "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}
