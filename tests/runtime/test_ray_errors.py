"""Errors of Ray and of its workers become the error of the code that failed, in one line."""

import os

import pytest
from ray.exceptions import ActorDiedError, RayError, RayTaskError, WorkerCrashedError

from bsq_ray.runtime import _ray_internals, ray_errors, ray_session
from bsq_ray.runtime.ray_errors import find_cause, translate_ray_errors


def task_error(cause):
    """The exception that `ray.get` raises for a task that raised `cause`."""
    error = RayTaskError(
        "task", f"\x1b[36mray::task()\x1b[39m\n  line\nValueError: {cause}", cause, "title", 1, "127.0.0.1"
    )
    return error.as_instanceof_cause()


@pytest.mark.parametrize(
    "cause", [ValueError("no image"), KeyError("x"), OSError(28, "No space left"), MemoryError(), RuntimeError("a\nb")]
)
def test_cause_of_a_task_is_raised(cause):
    """The error has the type, message and attributes that it has without Ray."""
    with pytest.raises(type(cause)) as raised, translate_ray_errors():
        raise task_error(cause)
    assert raised.value is cause
    assert isinstance(raised.value.__cause__, RayTaskError)


def test_nested_tasks_raise_the_innermost_cause():
    cause = ValueError("no image")
    assert find_cause(task_error(task_error(cause))) is cause


def test_other_errors_pass():
    with pytest.raises(KeyError, match="x"), translate_ray_errors():
        raise KeyError("x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RayError("\x1b[31mTraceback\x1b[0m\n  File x\nabc.CodecError: bad header\n"), "abc.CodecError: bad header"),
        (RayError("the object is lost"), "the object is lost"),
        (RayError(""), "no reason"),
    ],
)
def test_other_errors_of_ray_become_one_line(error, message):
    cause = find_cause(error)
    assert type(cause) is RuntimeError
    assert str(cause) == message


@pytest.mark.parametrize("error", [WorkerCrashedError(), ActorDiedError()])
@pytest.mark.parametrize("lines", [["MemoryError: too large"], []])
def test_dead_worker_is_explained_by_its_own_last_error(monkeypatch, error, lines):
    """A pointer to log files is the message only if the logs have no error."""
    monkeypatch.setattr(ray_errors, "recent_worker_errors", lambda: lines)
    message = str(find_cause(error))
    assert message.startswith("a worker process of Ray died: ")
    assert "\n" not in message
    assert not lines or message.endswith("MemoryError: too large")


def test_recent_worker_errors_are_newest_first(tmp_path, monkeypatch):
    """Only recent logs of workers count, and of each the last line that names an error."""
    contents = {
        "worker-1.err": "Traceback\nValueError: first\nmore\nnumpy.LinAlgError: singular\n",
        "worker-2.err": "ImportError: no module\n",
        "worker-3.err": "warning: Error in the middle\n",
        "worker-4.err": "OSError: old\n",
        "raylet.err": "OSError: raylet\n",
    }
    for number, (name, content) in enumerate(contents.items()):
        (tmp_path / name).write_text(content)
        age_s = 1000 if "old" in content else 10 - number
        modified = (tmp_path / name).stat().st_mtime - age_s
        os.utime(tmp_path / name, (modified, modified))

    class Node:
        def get_logs_dir_path(self):
            return str(tmp_path)

    monkeypatch.setattr("ray._private.worker._global_node", Node())
    assert _ray_internals.recent_worker_errors() == ["ImportError: no module", "numpy.LinAlgError: singular"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("/tmp", "/tmp")),
        ({"TMPDIR": "/scratch"}, ("/scratch", "/scratch")),
        ({"TMPDIR": "/" + "x" * 80}, ("/" + "x" * 80, "/tmp")),
        ({"TMPDIR": "/" + "ü" * 20}, ("/" + "ü" * 20, "/tmp")),
        ({"TMPDIR": "/" + "x" * 80, "RAY_TMPDIR": "/r"}, ("/r", "/r")),
    ],
)
def test_sockets_of_ray_are_in_a_short_folder(monkeypatch, variables, expected):
    """Sockets have paths of at most 107 bytes; large files stay in the folder that was chosen for them."""
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ray_session._temp_folders() == expected


def test_too_long_ray_folder_raises(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 80)
    with pytest.raises(
        ValueError, match="too long for the sockets of Ray; set RAY_TMPDIR to a folder with a path of at"
    ):
        ray_session._temp_folders()


@pytest.mark.parametrize("error", [OSError("AF_UNIX path"), RuntimeError("x\n y"), TimeoutError()])
def test_failed_start_of_ray_is_one_line(monkeypatch, error):
    """Whatever `ray.init` raises names the folder of the logs."""

    def fail(**_):
        raise error

    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(RuntimeError, match="^Ray cannot start on this node: .*; read its logs in .*/ray/session_latest"),
        ray_session.ray_session(),
    ):
        pass


def test_address_of_the_environment_is_printed(monkeypatch, capsys):
    """A cluster that the command line does not name is named on stderr before anything is sent to it."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match="no Ray cluster"), ray_session.ray_session():
        pass
    assert capsys.readouterr().err == "connecting to Ray at 127.0.0.1:1, the value of RAY_ADDRESS\n"


def test_folder_variables_become_absolute(monkeypatch, tmp_path):
    """Processes of Ray have other working folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", "weights")
    monkeypatch.setenv("BSQ_RAY_CACHE", "~/cache")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="no Ray cluster"), ray_session.ray_session():
        pass
    assert os.environ["BSQ_RAY_WEIGHTS"] == str(tmp_path / "weights")
    assert os.environ["BSQ_RAY_CACHE"] == os.path.expanduser("~/cache")


SHADOWING = ["numpy.py", "random.py", "torch.py", "pyarrow/__init__.py", "tokenize.py"]
PROGRAM = """
import ray, sys
from bsq_ray.runtime.ray_session import ray_session
with ray_session(num_cpus=1):
    @ray.remote
    def import_numpy():
        import numpy, random, pyarrow, tokenize
        return numpy.__version__
    print(ray.get(import_numpy.remote()))
"""


@pytest.mark.slow
def test_modules_in_the_working_folder_do_not_shadow(tmp_path):
    """Workers import what the command itself imports, also with a temporary folder whose path is too long for Ray."""
    import subprocess
    import sys

    for name in SHADOWING:
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "main.py").write_text(PROGRAM)
    (tmp_path / ("t" * 80)).mkdir()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program" / "main.py")],
        cwd=tmp_path / "work",
        env={**os.environ, "TMPDIR": str(tmp_path / ("t" * 80))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    import numpy

    assert done.stdout.strip() == numpy.__version__, done.stderr[-2000:]
