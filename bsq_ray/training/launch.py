"""Starting a run: on Ray workers, or in this process.

this process: progress line, Ctrl-C ──stop──▶ Board (actor) ◀──records── rank 0 … rank N-1: loop.run
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch

from bsq_ray import config, storage
from bsq_ray.data.sources import open_source
from bsq_ray.session import ray_session
from bsq_ray.training.checkpoint import list_checkpoints, newest_progress
from bsq_ray.training.job import Job, NonFinite, Result, check_same_run, split_batch
from bsq_ray.training.loop import run
from bsq_ray.training.progress import ProgressLine
from bsq_ray.training.worker import Worker, local_device

_POLL_SECONDS = 0.5


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the message says how to go on."""


def train(
    run_config: config.AnyConfig,
    data_url: str,
    out_url: str,
    workers: int,
    resume: bool = False,
    address: str | None = None,
    held_out_url: str | None = None,
    minutes: float | None = None,
    max_failures: int = 3,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Trains a model and leaves `out_url/model`, checkpoints, logs and pictures; see `loop.Job`.

    Args:
        workers: processes to train with; 0 trains in this process, without Ray.
        resume: go on with the run in `out_url`.
        address: Ray cluster; None starts one on this machine for the time of the run.
        max_failures: how often lost workers are replaced; the run then goes on from its newest checkpoint.
        show: receives the run's records instead of the progress line.

    Raises:
        ValueError: configuration, data and folder do not fit together; nothing was started.
        Interrupted: it was stopped by Ctrl-C or SIGTERM, after saving.
        RuntimeError: the training failed; the message says why.
    """
    # Workers may run in another folder.
    data_url, out_url = _absolute(data_url), _absolute(out_url)
    job = Job(run_config, data_url, out_url, held_out_url and _absolute(held_out_url), minutes)
    _check(job, workers, resume)
    storage.write_bytes(storage.join(out_url, "config.yaml"), config.dump_config(run_config).encode())
    with _display(show) as say:
        if workers == 0:
            with _stop_on_signal() as stop:
                result, restarts = run(job, Worker(0, 1, local_device(), "local", _LocalReporter(say, stop))), 0
        else:
            # In this order, because Ray takes SIGTERM for itself when it starts.
            with ray_session(address), _stop_on_signal() as stop:
                result, restarts = _run_on_ray(job, workers, max_failures, say, stop)
    facts = {**asdict(result), "workers": workers, "restarts": restarts, "minutes": minutes}
    storage.write_bytes(storage.join(out_url, "summary.json"), json.dumps(facts, indent=1).encode())
    if not result.finished:
        raise Interrupted(
            f"stopped after step {result.step}; checkpoint and model are saved in {out_url}. "
            "Go on with the same command and --resume"
        )
    return result


def _check(job: Job, workers: int, resume: bool) -> None:
    """What can be known to be wrong before anything is started."""
    if workers < 0:
        raise ValueError(f"workers {workers} must be 0 (this process, without Ray) or more")
    if job.minutes is not None and job.minutes <= 0:
        raise ValueError(f"minutes {job.minutes} must be positive")
    split_batch(job.config.training, max(1, workers))
    source = open_source(job.config, job.data_url)
    for each in (source, open_source(job.config, job.held_out_url) if job.held_out_url else source):
        if not each.samples:
            raise ValueError(f"{each.url} holds no samples")
    checkpoints = list_checkpoints(job.out_url)
    if checkpoints and not resume:
        raise ValueError(
            f"{job.out_url} already holds a run (checkpoint {checkpoints[-1]}); go on with it by --resume, "
            "or choose another --out"
        )
    progress = newest_progress(job.out_url)
    if progress:
        check_same_run(progress, job.config, source, job.out_url)


def _absolute(url: str) -> str:
    return os.path.abspath(storage.filesystem(url)[1]) if storage.is_local(url) else url


@contextmanager
def _display(show: Callable[[dict[str, Any]], None] | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    if show is not None:
        yield show
        return
    with ProgressLine() as line:
        yield line.show


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks the run to save and stop; the second one is not caught."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        for caught, handler in before.items():
            signal.signal(caught, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _LocalReporter:
    def __init__(self, say: Callable[[dict[str, Any]], None], stop: threading.Event) -> None:
        self.record = say
        self.stop_requested = stop.is_set


class _Board:
    """Actor between the workers and the process that started them."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stop = False
        self._starts = 0
        self._step = 0
        self._failed_start = -1
        self._failure: tuple[Exception, int] | None = None
        self._hopeless = False

    def start(self) -> None:
        """The first worker of a group begins."""
        self._starts += 1

    def add(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._step = max(self._step, record.get("step", 0))

    def fail(self, error: Exception, final: bool) -> None:
        """A worker failed. What fails twice at the same step in the same way will fail again.

        Of the failures of one group only the first counts; the others follow from it.
        """
        if self._failed_start == self._starts:
            return
        self._failed_start = self._starts
        failure = (error, self._step)
        again = self._failure is not None and (str(self._failure[0]), self._failure[1]) == (str(error), self._step)
        self._hopeless = final or again
        self._failure = failure

    def hopeless(self) -> bool:
        return self._hopeless

    def failure(self) -> Exception | None:
        return self._failure[0] if self._failure else None

    def take(self) -> tuple[list[dict[str, Any]], int]:
        """Records since the last call, and how often workers were started."""
        records, self._records = self._records, []
        return records, self._starts

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


class _RayReporter:
    """Reports to the board without waiting for it."""

    def __init__(self, board: Any) -> None:
        import ray

        self._wait, self._get = ray.wait, ray.get
        self._board = board
        self._answer: Any = None
        self._stop = False

    def record(self, record: dict[str, Any]) -> None:
        self._board.add.remote(record)

    def stop_requested(self) -> bool:
        """The newest answer that has arrived; the next question is already under way."""
        if self._answer is None:
            self._answer = self._board.stop_requested.remote()
        ready, _ = self._wait([self._answer], timeout=0)
        if ready:
            self._stop = bool(self._get(ready[0]))
            self._answer = None
        return self._stop


def _run_on_ray(
    job: Job, workers: int, max_failures: int, say: Callable[[dict[str, Any]], None], stop: threading.Event
) -> tuple[Result, int]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    board = ray.remote(num_cpus=0)(_Board).remote()
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    # Whole CPUs for the workers, as long as some are left for the tasks that read.
    cpus = 1.0 if ray.cluster_resources().get("CPU", 0) > workers else 0.5
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus},
        ),
        run_config=RunConfig(
            name=f"ray-{int(time.time() * 1000)}",
            failure_config=FailureConfig(max_failures=max_failures),
            **_storage(job.out_url),
        ),
    )
    errors: list[Exception] = []
    # A thread fits, so that this one can show progress and hear Ctrl-C.
    fitting = threading.Thread(target=_fit, args=(trainer, errors), daemon=True)
    fitting.start()
    try:
        result, starts = _follow(fitting, board, say, stop)
        failure = ray.get(board.failure.remote())
    finally:
        ray.kill(board)
        storage.remove_folder(storage.join(job.out_url, "ray"))
    if result is None:
        raise failure or RuntimeError(_last_line(errors))
    return result, max(0, starts - 1)


def _fit(trainer: Any, errors: list[Exception]) -> None:
    try:
        trainer.fit()
    except Exception as error:
        errors.append(error)


def _follow(
    fitting: threading.Thread, board: Any, say: Callable[[dict[str, Any]], None], stop: threading.Event
) -> tuple[Result | None, int]:
    """Passes records and the wish to stop on, until the workers are done."""
    import ray

    result: Result | None = None
    starts, asked = 0, False
    while True:
        # Asked before the records are taken, so that none is left behind.
        alive = fitting.is_alive()
        records, now_started = ray.get(board.take.remote())
        if now_started > max(1, starts):
            say({"kind": "warning", "step": 0, "text": f"workers were lost and are replaced ({now_started - 1} times)"})
        starts = now_started
        for record in records:
            if record["kind"] == "result":
                result = record["result"]
            else:
                say(record)
        if not alive:
            return result, starts
        if stop.is_set() and not asked:
            asked = True
            ray.get(board.ask_to_stop.remote())
            say({"kind": "warning", "step": 0, "text": "stopping: the workers save after this step"})
        fitting.join(_POLL_SECONDS)


def _worker_main(settings: dict[str, Any]) -> None:
    """What each Ray worker runs."""
    import ray
    from ray import train as ray_train

    context, job, board = ray_train.get_context(), settings["job"], settings["board"]
    if ray.get(board.hopeless.remote()):
        return
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, context.get_local_world_size())))
    if rank == 0:
        ray.get(board.start.remote())
    try:
        result = run(job, Worker(rank, world, local_device(), "ray", _RayReporter(board)))
    except NonFinite as error:
        # All workers come here together.
        ray.get(board.fail.remote(error, True))
        return
    except Exception as error:
        told = ValueError(str(error)) if isinstance(error, ValueError) else RuntimeError(_named(error))
        ray.get(board.fail.remote(told, False))
        # Raised, so that the workers that wait for this one are stopped too.
        raise
    if rank == 0:
        ray.get(board.add.remote({"kind": "result", "result": result}))


def _storage(out_url: str) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: inside the run's folder."""
    url = storage.join(out_url, "ray")
    fs, path = storage.filesystem(url)
    if storage.is_local(out_url):
        return {"storage_path": path}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _named(error: Exception) -> str:
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


def _last_line(errors: list[Exception]) -> str:
    """The cause of a failed fit, in one line."""
    lines = [line.strip() for error in errors for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "the workers were lost")
