"""Run the GPU benchmarks shrunk on the CPU, so that none of them fails on a machine that is paid by the minute."""

import os
import subprocess
import sys

import pytest
from result_files import RESULTS, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


def test_gpu_benchmarks_run_shrunk_on_a_cpu():
    """Every benchmark of the GPU passes, and the recorded results stay as they are."""
    recorded = {path: path.read_bytes() for path in RESULTS.iterdir()}
    command = [sys.executable, "-m", "pytest", "-m", "gpu and benchmark", "-W", "ignore", "tests/benchmarks"]
    environment = os.environ | {"GPU_DRY_RUN": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == recorded
