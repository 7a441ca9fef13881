"""Allocator settings: processes that compute on a CPU reuse the memory of freed tensors."""

import os
import subprocess
import sys

import pytest

from bsq_ray.runtime.malloc import malloc_env

_COUNT_FAULTS_SCRIPT = """
import resource, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000)
before = faults()
for _ in range(10):
    torch.ones(16_000_000)
print(faults() - before)
"""


def page_faults(environment):
    base_environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    process = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS_SCRIPT], env=base_environment | environment, capture_output=True, text=True
    )
    return int(process.stdout)


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="requires glibc")
def test_malloc_env_reuses_pages_of_freed_tensors():
    """A large tensor reuses the memory pages of the one freed before it; how many are huge depends on the machine."""
    assert page_faults(malloc_env()) < page_faults({}) / 5


def test_malloc_env_keeps_user_tunables(monkeypatch):
    """Tunables set by the user are not overwritten."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert malloc_env() == {}
