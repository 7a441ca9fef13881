"""How processes that compute on a CPU keep their memory.

By default glibc gives the memory of every large tensor back to the kernel, which clears it, page by page, before the
next one. A step of training allocates the same tensors again and again; kept in huge pages, they cost nothing.
"""

from __future__ import annotations

import os

_GIB = 2**30
_TUNABLES = {
    "hugetlb": 1,  # ask for huge pages
    "mmap_max": 0,  # no mapping of its own for a large block
    "trim_threshold": 1024 * _GIB,  # nothing is given back before the process ends
    "top_pad": _GIB // 4,  # grow by much at a time
    "arena_max": 1,  # what one thread has freed, another can take
}


def malloc_env() -> dict[str, str]:
    """Environment with which a process that computes on a CPU is started; glibc reads it then only.

    Empty where the user has set glibc's tunables; other C libraries take no notice of it.
    """
    if "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}
