"""A run on Ray Train's workers: starting them, listening to them, starting others when they are lost or should be more.

    room for N ─▶ group of N workers ─▶ finished, or stopped
         ▲              │
         └── a worker is lost, its machine will be taken, or there is room for more

Every group goes on from the newest checkpoint. Of an announced end nothing is lost, because the group saves before.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsq_ray import storage
from bsq_ray.runtime.malloc import keep_memory
from bsq_ray.runtime.ray_session import cpus_within_reach, gpus_within_reach, reach_is_known
from bsq_ray.training.capacity import READER, Growth, Resources, nodes_to_be_taken, wait_for_room
from bsq_ray.training.nonfinite import NonFinite
from bsq_ray.training.run_coordinator import Board, Failure, Notes, RayReporter
from bsq_ray.training.run_spec import Job, Result
from bsq_ray.training.trainer import run
from bsq_ray.training.worker_context import Device, Wish, Worker, local_device

_POLL_SECONDS = 0.5
# Of sums of fractions of CPUs.
_ROUNDING = 1e-6

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Share:
    """A run's part of the cluster.

    Attributes:
        resources: of each worker, as Ray counts them; None takes a CPU, and a GPU if the device is one.
        runs: how many runs use the machines at once.
    """

    resources: dict[str, float] | None = None
    runs: int = 1


def run_on_ray(
    job: Job, sizes: Sequence[int], device: Device, max_failures: int, say: Say, stop: threading.Event, share: Share
) -> Result | None:
    """Trains with Ray Train's workers on the cluster this process is connected to.

    Args:
        sizes: numbers of workers that may be at work, ascending; with several of them the most for which there is room.
        max_failures: losses of workers, and starts that failed, in a row without a new checkpoint between them. Waiting
            for room is none, and lasts as long as it takes.
        say: receives the run's records; one of the kind "restart" for each group after the first.

    Returns:
        How the run ended; None if it was asked to stop before its workers began.

    Raises:
        ValueError: the cluster can never have the GPUs or CPUs that are asked for.
        RuntimeError: the training failed; the message says why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpu = train_on_gpus(device, sizes[0], gpus_in_sight(device, say))
    # Whole CPUs for the workers, as long as some are left for the tasks that read.
    cpus = 1.0 if ray.cluster_resources().get("CPU", 0) > sizes[-1] else 0.5
    worker = share.resources or ({"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus})
    check_cpus(sizes[0], worker.get("CPU", 0.0), cpus_within_reach())
    # Beside this process: what needs no CPU is else put anywhere, and would be lost with a server that is.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    settings = {"job": job, "board": board, "gpu": gpu, "runs": share.runs}
    failures = _Failures(max_failures)
    try:
        while True:
            size = wait_for_room(sizes, worker, stop.is_set) if len(sizes) > 1 else sizes[0]
            if size is None:
                return None
            ray.get(board.new_group.remote())
            group = _Group(job, size, worker, settings)
            reason = group.follow(Growth(size, sizes, worker), failures.heard(say), stop)
            if group.result is not None and (group.result.finished or stop.is_set()):
                return group.result
            if not group.began and stop.is_set():
                return None
            if group.result is None and not group.without_room:
                failures.add(group.failure, group.errors, group.began)
            if group.began:
                say({"kind": "restart", "step": failures.step, "reason": reason})
            else:
                text = f"{size} workers could not begin: {'no room' if group.without_room else reason}; trying again"
                say({"kind": "warning", "step": failures.step, "text": text})
    finally:
        ray.kill(board)
        with suppress(storage.StorageUnavailableError):
            storage.remove_folder(storage.join(job.out_url, "ray"))


def gpus_in_sight(device: Device, say: Say) -> float:
    """GPUs of the whole cluster; infinitely many if its autoscaler may bring up more, which only the user can know.

    Says so where none is up and none was asked for.
    """
    up = gpus_within_reach()
    if reach_is_known() or device == "cpu":
        return up
    if device == "auto" and not up:
        text = "no GPU is up on this cluster, so that CPUs train; --device gpu waits for an autoscaler to bring some"
        say({"kind": "warning", "step": 0, "text": text})
        return 0.0
    return math.inf


def train_on_gpus(device: Device, workers: int, within_reach: float) -> bool:
    """Whether each worker takes a GPU.

    Args:
        device: "auto" takes GPUs where the cluster has any, up or still to be brought up.
        workers: the fewest that may be at work.
        within_reach: GPUs of the whole cluster, with those its autoscaler may start.

    Raises:
        ValueError: there will never be enough of them.
    """
    if device == "cpu" or (device == "auto" and not within_reach):
        return False
    if within_reach < workers:
        raise ValueError(
            f"{workers} workers want a GPU each and the cluster has {within_reach:g}; give --workers {within_reach:g}, "
            "or --device cpu"
            if within_reach
            else "--device gpu needs a cluster with GPUs, and this one has none; give --device cpu"
        )
    return True


def check_cpus(workers: int, each: float, within_reach: float) -> None:
    """Refuses workers for which there will never be room, with the tasks that read for them.

    Args:
        workers: the fewest that may be at work.
        each: CPUs of each.
        within_reach: CPUs of the whole cluster, with those its autoscaler may start.

    Raises:
        ValueError: there will never be enough of them.
    """
    wanted = workers * each + READER["CPU"]
    if wanted > within_reach + _ROUNDING:
        most = max(0, int((within_reach - READER["CPU"]) / each + _ROUNDING)) if each else 0
        raise ValueError(
            f"{workers} workers of {each:g} CPUs and the tasks that read want {wanted:g} CPUs and the cluster has "
            f"{within_reach:g}; give --workers {most}" + (" or fewer" if most else ", which needs no Ray")
        )


class _Failures:
    """Counts losses, and knows when it is in vain to go on.

    Attributes:
        step: the newest step of the run.
    """

    def __init__(self, limit: int) -> None:
        self.step = 0
        self._limit = limit
        self._count = 0
        self._last: Failure | None = None

    def heard(self, say: Say) -> Say:
        """Passes records on, and takes from them how far the run is."""

        def hear(record: dict[str, Any]) -> None:
            self.step = max(self.step, record.get("step", 0))
            if record["kind"] == "checkpoint":
                self._count = 0
            say(record)

        return hear

    def add(self, failure: Failure | None, errors: list[Exception], began: bool) -> None:
        """One more, of workers that had begun or of their start.

        Raises:
            Exception: what the workers failed with, if they will fail again.
        """
        before, self._last = self._last, failure
        self._count += 1
        # What fails twice at the same step in the same way will fail again.
        again = failure and before and (str(failure.error), failure.step) == (str(before.error), before.step)
        if failure and (failure.final or again or self._count > self._limit):
            raise failure.error
        if self._count > self._limit:
            told = "" if began else f"workers could not begin ({self._count} failures in a row): "
            raise RuntimeError(told + _last_line(errors))


class _Group:
    """A number of workers that train together until one of them ends.

    Attributes:
        began: whether any of them came to work.
        result: how they ended, if they ended by themselves.
        failure: how they failed, if one of them could still say so.
        errors: what Ray Train says about it.
    """

    def __init__(self, job: Job, size: int, worker: Resources, settings: dict[str, Any]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        self.began = False
        self.result: Result | None = None
        self.failure: Failure | None = None
        self.errors: list[Exception] = []
        self._board = settings["board"]
        self._nodes: set[str] = set()
        self._trainer = TorchTrainer(
            _worker_main,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=size, use_gpu=settings["gpu"], resources_per_worker=worker),
            run_config=RunConfig(
                name=f"ray-{int(time.time() * 1000)}",
                # Whether to try again is decided here, where another number can be tried too.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env={} if settings["gpu"] else {"env_vars": keep_memory()},
                **ray_storage(job.out_url),
            ),
        )

    def follow(self, growth: Growth, say: Say, stop: threading.Event) -> str:
        """Passes records and wishes on, until the workers are done; why they ended, in a few words."""
        import ray

        # A thread fits, so that this one can show progress and hear Ctrl-C.
        fitting = threading.Thread(target=self._fit, daemon=True)
        fitting.start()
        wish, reason = Wish.GO_ON, ""
        try:
            while True:
                # Asked before the records are taken, so that none is left behind.
                alive = fitting.is_alive()
                self._read(ray.get(self._board.take.remote()), say)
                if not alive or (stop.is_set() and not self.began):
                    return reason or f"workers were lost ({self._cause()})"
                if stop.is_set() and wish < Wish.STOP:
                    wish = Wish.STOP
                    ray.get(self._board.ask.remote(wish))
                    say({"kind": "warning", "step": 0, "text": "stopping: the workers save after this step"})
                elif self.began and wish is Wish.GO_ON and (why := self._why_to_make_room(growth)):
                    wish, reason = Wish.MAKE_ROOM, why
                    ray.get(self._board.ask.remote(wish))
                fitting.join(_POLL_SECONDS)
        finally:
            growth.end()

    @property
    def without_room(self) -> bool:
        """Whether they have not begun because there was no room after all, such as that of a machine yet to come."""
        from ray.train import ControllerError
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        return not self.began and any(
            isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
            for error in self.errors
        )

    def _cause(self) -> str:
        return (str(self.failure.error) if self.failure else _last_line(self.errors))[:200]

    def _why_to_make_room(self, growth: Growth) -> str:
        if nodes_to_be_taken() & self._nodes:
            return "a machine will be taken away; all steps are saved"
        return "there is room for more workers; all steps are saved" if growth.possible() else ""

    def _read(self, notes: Notes, say: Say) -> None:
        self._nodes = set(notes.nodes.values())
        self.began = bool(notes.nodes)
        self.failure = notes.failure
        for record in notes.records:
            if record["kind"] == "result":
                self.result = record["result"]
            else:
                say(record)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.errors.append(error)


def _worker_main(settings: dict[str, Any]) -> None:
    """What each Ray worker runs."""
    import ray
    from ray import train as ray_train

    context, job, board = ray_train.get_context(), settings["job"], settings["board"]
    rank, world = context.get_world_rank(), context.get_world_size()
    device: Device = "gpu" if settings["gpu"] else "cpu"
    if device == "cpu":
        neighbours = max(1, context.get_local_world_size()) * settings["runs"]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    ray.get(board.join.remote(rank, ray.get_runtime_context().get_node_id()))
    try:
        result = run(job, Worker(rank, world, local_device(device), "ray", RayReporter(board, job.out_url)))
    except NonFinite as error:
        # All workers come here together.
        ray.get(board.fail.remote(error, True))
        return
    except Exception as error:
        ray.get(board.fail.remote(plain_error(error), False))
        # Raised, so that the workers that wait for this one are stopped too.
        raise
    if rank == 0:
        ray.get(board.add.remote({"kind": "result", "result": result}))


def ray_storage(out_url: str) -> dict[str, Any]:
    """Where Ray keeps its own notes: inside the run's folder."""
    url = storage.join(out_url, "ray")
    fs, path = storage.filesystem(url)
    if storage.is_local(out_url):
        return {"storage_path": path}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def plain_error(error: Exception) -> Exception:
    """What another process can read; the user's mistakes stay ValueErrors, and storage that is away is none of them.

    What nobody foresaw names its place in the code, because its traceback stays in the worker's log.
    """
    if isinstance(error, ValueError) and not isinstance(error, storage.StorageUnavailableError):
        return ValueError(str(error))
    if type(error) in (RuntimeError, storage.StorageUnavailableError):
        return RuntimeError(str(error))
    place = traceback.extract_tb(error.__traceback__)[-1:]
    at = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in place)
    return RuntimeError(f"{type(error).__name__}: {error}{at}")


def _last_line(errors: list[Exception]) -> str:
    """The cause of a failed fit, in one line."""
    lines = [line.strip() for error in errors for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "the workers were lost")
