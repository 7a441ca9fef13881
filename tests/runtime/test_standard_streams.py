"""The command line with closed standard streams, and with streams that are not UTF-8."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from bsq_ray.runtime.standard_streams import prepare_standard_streams
prepare_standard_streams()
print("out →")
print("err", file=sys.stderr)
sys.stdin.read()
inherited = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
open(sys.argv[1], "w").write(str(inherited.count("/dev/null")))
"""


def run_shell(command, **variables):
    environment = {**os.environ, "PROGRAM": PROGRAM, **variables}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("redirections", "num_null"),
    [("<&-", 1), (">&-", 2), ("2>&-", 2), ("<&- >&-", 2), (">&- 2>&-", 3), ("<&- >&- 2>&-", 3), ("", 1)],
)
def test_closed_streams_are_replaced(tmp_path, redirections, num_null):
    """Every stream can be used, and a child process would inherit three open descriptors."""
    done = run_shell(f'{sys.executable} -c "$PROGRAM" {tmp_path}/result {redirections}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_text() == str(num_null)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "naïve → 猫 \\udcfc …".encode()),
        ("latin-1", "naïve -> \\u732b \\udcfc ...".encode("latin-1")),
        ("ascii", b"na\\xefve -> \\u732b \\udcfc ..."),
        ("cp437", "naïve -> \\u732b \\udcfc ...".encode("cp437")),
        ("shift_jis", b"na\\xefve \x81\xa8 \x94L \\udcfc \x81c"),
    ],
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_text_is_printed_in_any_encoding(encoding, expected, stream):
    """Letters, typography and bytes of a file name that is not UTF-8 are printed, replaced or escaped."""
    program = (
        "import sys; from bsq_ray.runtime.standard_streams import prepare_standard_streams; "
        f"prepare_standard_streams(); print('naïve → 猫 \\udcfc …', file=sys.{stream})"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert (done.returncode, getattr(done, stream)) == (0, expected + b"\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_plan_is_printed_in_any_encoding(encoding):
    arguments = ["plan", "--config", "imagenet128-bsq18", "--gpu", "a5000", "--gpus", "8"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "20"}
    done = subprocess.run([sys.executable, "-m", "bsq_ray", *arguments], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u" not in done.stdout
