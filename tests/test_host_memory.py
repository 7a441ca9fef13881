"""Processes that compute on a CPU keep their memory between tensors."""

import os
import subprocess
import sys

import pytest

from bsq_ray.runtime.malloc import keep_memory

_COUNT = """
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
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", _COUNT], env=plain | environment, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="another C library")
def test_the_next_large_tensor_takes_the_pages_of_the_one_before():
    assert page_faults(keep_memory()) < page_faults({}) / 20


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert keep_memory() == {}
