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
from bsq_ray.runtime.malloc import malloc_env
from bsq_ray.runtime.ray_session import cluster_limits_known, max_cluster_cpus, max_cluster_gpus
from bsq_ray.training.capacity import DATA_TASK_RESOURCES, Resources, ScaleUpMonitor, draining_nodes, wait_for_capacity
from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.run_coordinator import Failure, RayReporter, RunCoordinator, WorkerGroupEvents
from bsq_ray.training.run_spec import RunResult, RunSpec
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import ControlSignal, Device, WorkerContext, local_device

_POLL_INTERVAL_S = 0.5
# Of sums of fractions of CPUs.
_CPU_TOLERANCE = 1e-6

RecordSink = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ResourceBudget:
    """A run's part of the cluster.

    Attributes:
        resources: of each worker, as Ray counts them; None takes a CPU, and a GPU if the device is one.
        runs: how many runs use the machines at once.
    """

    resources_per_worker: dict[str, float] | None = None
    concurrent_runs: int = 1


def run_on_ray(
    spec: RunSpec,
    world_sizes: Sequence[int],
    device: Device,
    max_failures: int,
    on_record: RecordSink,
    stop_event: threading.Event,
    budget: ResourceBudget,
) -> RunResult | None:
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

    use_gpu = should_use_gpus(device, world_sizes[0], available_gpus(device, on_record))
    # Whole CPUs for the workers, as long as some are left for the tasks that read.
    cpus_per_worker = 1.0 if ray.cluster_resources().get("CPU", 0) > world_sizes[-1] else 0.5
    resources_per_worker = budget.resources_per_worker or (
        {"CPU": cpus_per_worker, "GPU": 1} if use_gpu else {"CPU": cpus_per_worker}
    )
    check_cpus(world_sizes[0], resources_per_worker.get("CPU", 0.0), max_cluster_cpus())
    # Beside this process: what needs no CPU is else put anywhere, and would be lost with a server that is.
    driver_affinity = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator = ray.remote(num_cpus=0, scheduling_strategy=driver_affinity)(RunCoordinator).remote()
    worker_config = {"job": spec, "board": coordinator, "gpu": use_gpu, "runs": budget.concurrent_runs}
    failure_tracker = _FailureTracker(max_failures)
    try:
        while True:
            world_size = (
                wait_for_capacity(world_sizes, resources_per_worker, stop_event.is_set)
                if len(world_sizes) > 1
                else world_sizes[0]
            )
            if world_size is None:
                return None
            ray.get(coordinator.reset_for_group.remote())
            group = WorkerGroupRun(spec, world_size, resources_per_worker, worker_config)
            reason = group.supervise(
                ScaleUpMonitor(world_size, world_sizes, resources_per_worker),
                failure_tracker.tracking(on_record),
                stop_event,
            )
            if group.result is not None and (group.result.finished or stop_event.is_set()):
                return group.result
            if not group.started and stop_event.is_set():
                return None
            if group.result is None and not group.startup_timed_out:
                failure_tracker.record_or_raise(group.failure, group.errors, group.started)
            if group.started:
                on_record({"kind": "restart", "step": failure_tracker.step, "reason": reason})
            else:
                text = f"{world_size} workers could not begin: {'no room' if group.startup_timed_out else reason}; trying again"
                on_record({"kind": "warning", "step": failure_tracker.step, "text": text})
    finally:
        ray.kill(coordinator)
        with suppress(storage.StorageUnavailableError):
            storage.remove_folder(storage.join(spec.out_url, "ray"))


def available_gpus(device: Device, on_record: RecordSink) -> float:
    """GPUs of the whole cluster; infinitely many if its autoscaler may bring up more, which only the user can know.

    Says so where none is up and none was asked for.
    """
    running_gpus = max_cluster_gpus()
    if cluster_limits_known() or device == "cpu":
        return running_gpus
    if device == "auto" and not running_gpus:
        text = "no GPU is up on this cluster, so that CPUs train; --device gpu waits for an autoscaler to bring some"
        on_record({"kind": "warning", "step": 0, "text": text})
        return 0.0
    return math.inf


def should_use_gpus(device: Device, min_workers: int, max_gpus: float) -> bool:
    """Whether each worker takes a GPU.

    Args:
        device: "auto" takes GPUs where the cluster has any, up or still to be brought up.
        workers: the fewest that may be at work.
        within_reach: GPUs of the whole cluster, with those its autoscaler may start.

    Raises:
        ValueError: there will never be enough of them.
    """
    if device == "cpu" or (device == "auto" and not max_gpus):
        return False
    if max_gpus < min_workers:
        raise ValueError(
            f"{min_workers} workers want a GPU each and the cluster has {max_gpus:g}; give --workers {max_gpus:g}, "
            "or --device cpu"
            if max_gpus
            else "--device gpu needs a cluster with GPUs, and this one has none; give --device cpu"
        )
    return True


def check_cpus(min_workers: int, cpus_per_worker: float, max_cpus: float) -> None:
    """Refuses workers for which there will never be room, with the tasks that read for them.

    Args:
        workers: the fewest that may be at work.
        each: CPUs of each.
        within_reach: CPUs of the whole cluster, with those its autoscaler may start.

    Raises:
        ValueError: there will never be enough of them.
    """
    required_cpus = min_workers * cpus_per_worker + DATA_TASK_RESOURCES["CPU"]
    if required_cpus > max_cpus + _CPU_TOLERANCE:
        max_workers = (
            max(0, int((max_cpus - DATA_TASK_RESOURCES["CPU"]) / cpus_per_worker + _CPU_TOLERANCE))
            if cpus_per_worker
            else 0
        )
        raise ValueError(
            f"{min_workers} workers of {cpus_per_worker:g} CPUs and the tasks that read want {required_cpus:g} CPUs and the cluster has "
            f"{max_cpus:g}; give --workers {max_workers}" + (" or fewer" if max_workers else ", which needs no Ray")
        )


class _FailureTracker:
    """Counts losses, and knows when it is in vain to go on.

    Attributes:
        step: the newest step of the run.
    """

    def __init__(self, max_failures: int) -> None:
        self.step = 0
        self._max_failures = max_failures
        self._num_failures = 0
        self._last_failure: Failure | None = None

    def tracking(self, on_record: RecordSink) -> RecordSink:
        """Passes records on, and takes from them how far the run is."""

        def track(record: dict[str, Any]) -> None:
            self.step = max(self.step, record.get("step", 0))
            if record["kind"] == "checkpoint":
                self._num_failures = 0
            on_record(record)

        return track

    def record_or_raise(self, failure: Failure | None, errors: list[Exception], started: bool) -> None:
        """One more, of workers that had begun or of their start.

        Raises:
            Exception: what the workers failed with, if they will fail again.
        """
        previous, self._last_failure = self._last_failure, failure
        self._num_failures += 1
        # What fails twice at the same step in the same way will fail again.
        is_repeated = (
            failure and previous and (str(failure.error), failure.step) == (str(previous.error), previous.step)
        )
        if failure and (failure.is_fatal or is_repeated or self._num_failures > self._max_failures):
            raise failure.error
        if self._num_failures > self._max_failures:
            prefix = "" if started else f"workers could not begin ({self._num_failures} failures in a row): "
            raise RuntimeError(prefix + _last_line(errors))


class WorkerGroupRun:
    """A number of workers that train together until one of them ends.

    Attributes:
        began: whether any of them came to work.
        result: how they ended, if they ended by themselves.
        failure: how they failed, if one of them could still say so.
        errors: what Ray Train says about it.
    """

    def __init__(
        self, spec: RunSpec, world_size: int, resources_per_worker: Resources, worker_config: dict[str, Any]
    ) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        self.started = False
        self.result: RunResult | None = None
        self.failure: Failure | None = None
        self.errors: list[Exception] = []
        self._coordinator = worker_config["board"]
        self._node_ids: set[str] = set()
        self._trainer = TorchTrainer(
            _worker_main,
            train_loop_config=worker_config,
            scaling_config=ScalingConfig(
                num_workers=world_size, use_gpu=worker_config["gpu"], resources_per_worker=resources_per_worker
            ),
            run_config=RunConfig(
                name=f"ray-{int(time.time() * 1000)}",
                # Whether to try again is decided here, where another number can be tried too.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env={} if worker_config["gpu"] else {"env_vars": malloc_env()},
                **ray_storage_options(spec.out_url),
            ),
        )

    def supervise(self, monitor: ScaleUpMonitor, on_record: RecordSink, stop_event: threading.Event) -> str:
        """Passes records and wishes on, until the workers are done; why they ended, in a few words."""
        import ray

        # A thread fits, so that this one can show progress and hear Ctrl-C.
        fit_thread = threading.Thread(target=self._fit, daemon=True)
        fit_thread.start()
        signal, reason = ControlSignal.CONTINUE, ""
        try:
            while True:
                # Asked before the records are taken, so that none is left behind.
                is_running = fit_thread.is_alive()
                self._forward_records(ray.get(self._coordinator.take.remote()), on_record)
                if not is_running or (stop_event.is_set() and not self.started):
                    return reason or f"workers were lost ({self._cause()})"
                if stop_event.is_set() and signal < ControlSignal.STOP:
                    signal = ControlSignal.STOP
                    ray.get(self._coordinator.ask.remote(signal))
                    on_record({"kind": "warning", "step": 0, "text": "stopping: the workers save after this step"})
                elif (
                    self.started
                    and signal is ControlSignal.CONTINUE
                    and (resize_reason := self._resize_reason(monitor))
                ):
                    signal, reason = ControlSignal.RESIZE, resize_reason
                    ray.get(self._coordinator.ask.remote(signal))
                fit_thread.join(_POLL_INTERVAL_S)
        finally:
            monitor.close()

    @property
    def startup_timed_out(self) -> bool:
        """Whether they have not begun because there was no room after all, such as that of a machine yet to come."""
        from ray.train import ControllerError
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        return not self.started and any(
            isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
            for error in self.errors
        )

    def _cause(self) -> str:
        return (str(self.failure.error) if self.failure else _last_line(self.errors))[:200]

    def _resize_reason(self, monitor: ScaleUpMonitor) -> str:
        if draining_nodes() & self._node_ids:
            return "a machine will be taken away; all steps are saved"
        return "there is room for more workers; all steps are saved" if monitor.capacity_available() else ""

    def _forward_records(self, events: WorkerGroupEvents, on_record: RecordSink) -> None:
        self._node_ids = set(events.node_ids.values())
        self.started = bool(events.node_ids)
        self.failure = events.failure
        for record in events.records:
            if record["kind"] == "result":
                self.result = record["result"]
            else:
                on_record(record)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.errors.append(error)


def _worker_main(worker_config: dict[str, Any]) -> None:
    """What each Ray worker runs."""
    import ray
    from ray import train as ray_train

    context, spec, coordinator = ray_train.get_context(), worker_config["job"], worker_config["board"]
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device: Device = "gpu" if worker_config["gpu"] else "cpu"
    if device == "cpu":
        processes_per_node = max(1, context.get_local_world_size()) * worker_config["runs"]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes_per_node))
    ray.get(coordinator.join.remote(rank, ray.get_runtime_context().get_node_id()))
    try:
        result = run_training(
            spec, WorkerContext(rank, world_size, local_device(device), "ray", RayReporter(coordinator, spec.out_url))
        )
    except NonFiniteLossError as error:
        # All workers come here together.
        ray.get(coordinator.fail.remote(error, True))
        return
    except Exception as error:
        ray.get(coordinator.fail.remote(picklable_error(error), False))
        # Raised, so that the workers that wait for this one are stopped too.
        raise
    if rank == 0:
        ray.get(coordinator.add.remote({"kind": "result", "result": result}))


def ray_storage_options(out_url: str) -> dict[str, Any]:
    """Where Ray keeps its own notes: inside the run's folder."""
    url = storage.join(out_url, "ray")
    fs, path = storage.filesystem(url)
    if storage.is_local(out_url):
        return {"storage_path": path}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def picklable_error(error: Exception) -> Exception:
    """What another process can read; the user's mistakes stay ValueErrors, and storage that is away is none of them.

    What nobody foresaw names its place in the code, because its traceback stays in the worker's log.
    """
    if isinstance(error, ValueError) and not isinstance(error, storage.StorageUnavailableError):
        return ValueError(str(error))
    if type(error) in (RuntimeError, storage.StorageUnavailableError):
        return RuntimeError(str(error))
    last_frame = traceback.extract_tb(error.__traceback__)[-1:]
    location = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last_frame)
    return RuntimeError(f"{type(error).__name__}: {error}{location}")


def _last_line(errors: list[Exception]) -> str:
    """The cause of a failed fit, in one line."""
    lines = [line.strip() for error in errors for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "the workers were lost")
