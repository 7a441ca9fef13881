"""A training run on Ray Train: start worker groups, supervise them, and replace or resize them.

    ┌─────────▶ wait for capacity ──size──▶ group of N workers ──┬─▶ Finished            return the result
    │                                                            ├─▶ StoppedBeforeStart  return None
    ├─ restart from the newest checkpoint ◀──────────────────────┼── Resized             preempted, or more capacity
    ├─ retry, not counted as a failure ◀─────────────────────────┼── StartupTimedOut     insufficient capacity
    └─ retry, up to max_failures in a row ◀──────────────────────┴── Failed              else raise its error

The elastic mode of Ray Train, `ScalingConfig(num_workers=(min, max))`, is not used. It restarts the workers from their
latest checkpoint (https://github.com/ray-project/ray/pull/61115) and does not let them save one first, so every resize
would repeat the steps since then. Here a RESIZE signal makes the workers save and exit.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch

from bsq_ray import storage
from bsq_ray.runtime._ray_internals import draining_nodes, is_startup_timeout
from bsq_ray.runtime.malloc import malloc_env
from bsq_ray.training.capacity import Resources, ScaleUpMonitor, wait_for_capacity
from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.run_coordinator import Failure, RayReporter, RunCoordinator, WorkerGroupEvents
from bsq_ray.training.run_spec import RunResult, RunSpec
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import ControlSignal, Device, RecordSink, WorkerContext, local_device
from bsq_ray.training.worker_resources import ResourceBudget, resolve_worker_resources

_POLL_INTERVAL_S = 0.5
_DRAINING = "a node is draining; all steps are saved"
_MORE_CAPACITY = "capacity for more workers is available; all steps are saved"


@dataclass(frozen=True)
class Finished:
    """The run ended: it trained to its end, or it saved and exited on a stop request."""

    result: RunResult


@dataclass(frozen=True)
class Resized:
    """The workers saved a checkpoint and exited, so that the run can continue with another group."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The workers were lost, raised an error, or could not start.

    Attributes:
        cause: one line for the log.
        failure: first error that a worker reported; None if none could.
        started: whether any worker had started.
    """

    cause: str
    failure: Failure | None
    started: bool


@dataclass(frozen=True)
class StartupTimedOut:
    """The workers could not be placed: the capacity that was found is gone, or is still to be added."""


@dataclass(frozen=True)
class StoppedBeforeStart:
    """A stop request arrived before any worker had started."""


Outcome = Finished | Resized | Failed | StartupTimedOut | StoppedBeforeStart


@dataclass(frozen=True)
class WorkerConfig:
    """Input of each Ray worker.

    Attributes:
        spec: the run.
        coordinator: handle of the `RunCoordinator` actor.
        use_gpu: compute on a GPU.
        concurrent_runs: number of runs that share the CPU threads of a node.
    """

    spec: RunSpec
    coordinator: Any
    use_gpu: bool
    concurrent_runs: int


def run_on_ray(
    spec: RunSpec,
    world_sizes: list[int],
    *,
    device: Device,
    max_failures: int,
    on_record: RecordSink,
    stop_event: threading.Event,
    budget: ResourceBudget,
) -> RunResult | None:
    """Train with Ray Train's workers on the connected cluster.

    Args:
        world_sizes: valid numbers of workers, ascending. A run with several is elastic: it uses the largest that fits.
        max_failures: failures in a row, without a new checkpoint between them, after which the run ends. Waiting for
            capacity is not a failure and has no time limit.
        on_record: receives the run's records, with one of kind "restart" for each group after the first.
        stop_event: requests that the run saves and stops.

    Returns:
        The result; None if the run was stopped before its workers started.

    Raises:
        ValueError: the cluster can never provide the requested GPUs or CPUs.
        RuntimeError: the training failed; the message states why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = resolve_worker_resources(budget, device, world_sizes, on_record)
    # On the driver's node: an actor without CPUs could be placed on a node that is lost later.
    driver_affinity = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator_class = ray.remote(RunCoordinator).options(num_cpus=0, scheduling_strategy=driver_affinity)
    coordinator: Any = coordinator_class.remote()
    worker_config = WorkerConfig(spec, coordinator, resources.use_gpu, budget.concurrent_runs)
    failure_tracker = _FailureTracker(max_failures)
    try:
        while True:
            world_size: int | None = world_sizes[0]
            if len(world_sizes) > 1:
                world_size = wait_for_capacity(world_sizes, resources.per_worker, stop_event.is_set, budget.timeouts)
            if world_size is None:
                return None
            ray.get(coordinator.reset_for_group.remote())
            group = WorkerGroupRun(worker_config, world_size, resources.per_worker)
            monitor = ScaleUpMonitor(world_size, world_sizes, resources.per_worker, budget.timeouts)
            outcome = group.supervise(monitor, failure_tracker.tracking(on_record), stop_event)
            match outcome:
                case Finished(result):
                    return result
                case StoppedBeforeStart():
                    return None
                case Resized(reason):
                    retry = "restart", reason
                case StartupTimedOut():
                    retry = "warning", "insufficient cluster capacity"
                case Failed(cause, _, started):
                    failure_tracker.record_or_raise(outcome)
                    retry = ("restart", f"workers were lost ({cause[:200]})") if started else ("warning", cause[:200])
                case _:
                    assert_never(outcome)
            on_record(_retry_record(*retry, world_size, failure_tracker.step))
    finally:
        ray.kill(coordinator)
        with suppress(storage.StorageUnavailableError):
            storage.remove_folder(storage.join(spec.out_url, "ray"))


def _retry_record(kind: str, reason: str, world_size: int, step: int) -> dict[str, Any]:
    """Return the record of a group that ended ("restart") or never started ("warning")."""
    if kind == "restart":
        return {"kind": kind, "step": step, "reason": reason}
    return {"kind": kind, "step": step, "text": f"could not start {world_size} workers: {reason}; retrying"}


class _FailureTracker:
    """Counts failures in a row and decides when retrying is pointless.

    Attributes:
        step: newest step of the run.
    """

    def __init__(self, max_failures: int) -> None:
        self.step = 0
        self._max_failures = max_failures
        self._num_failures = 0
        self._last_failure: Failure | None = None

    def tracking(self, on_record: RecordSink) -> RecordSink:
        """Return a sink that forwards records and follows the run's steps and checkpoints."""

        def track(record: dict[str, Any]) -> None:
            self.step = max(self.step, record.get("step", 0))
            if record["kind"] == "checkpoint":
                self._num_failures = 0
            on_record(record)

        return track

    def record_or_raise(self, outcome: Failed) -> None:
        """Count a failure.

        Raises:
            Exception: the workers' error, if it is fatal, repeats itself, or there were too many failures.
        """
        failure, previous = outcome.failure, self._last_failure
        self._last_failure = failure
        self._num_failures += 1
        # The same error at the same step will occur again.
        is_repeated = (
            failure and previous and (str(failure.error), failure.step) == (str(previous.error), previous.step)
        )
        if failure and (failure.is_fatal or is_repeated or self._num_failures > self._max_failures):
            raise failure.error
        if self._num_failures > self._max_failures:
            prefix = "" if outcome.started else f"workers could not start ({self._num_failures} failures in a row): "
            raise RuntimeError(prefix + outcome.cause)


class WorkerGroupRun:
    """A group of workers that train together until one of them ends."""

    def __init__(self, worker_config: WorkerConfig, world_size: int, resources_per_worker: Resources) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        use_gpu, out_url = worker_config.use_gpu, worker_config.spec.out_url
        self._coordinator = worker_config.coordinator
        self._events = WorkerGroupEvents()
        self._result: RunResult | None = None
        self._fit_errors: list[Exception] = []
        self.trainer = TorchTrainer(
            _worker_main,
            train_loop_config={"worker_config": worker_config},
            scaling_config=ScalingConfig(
                num_workers=world_size, use_gpu=use_gpu, resources_per_worker=resources_per_worker
            ),
            # Type checkers see the configuration classes of Ray Train's first version here.
            run_config=RunConfig(  # type: ignore[call-arg]
                name=f"ray-{int(time.time() * 1000)}",
                # `run_on_ray` retries, because it can choose another number of workers.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                worker_runtime_env={} if use_gpu else {"env_vars": malloc_env()},
                **ray_storage_options(out_url),
            ),
        )

    def supervise(self, monitor: ScaleUpMonitor, on_record: RecordSink, stop_event: threading.Event) -> Outcome:
        """Run the group until it ends; forward its records, and send it stop and resize requests."""
        import ray

        # In a thread, so that this one can show progress and receive Ctrl-C.
        fit_thread = threading.Thread(target=self._fit, daemon=True)
        fit_thread.start()
        signal, resize_reason = ControlSignal.CONTINUE, ""
        try:
            while True:
                # Checked before the records are drained, so that the last ones are not missed.
                is_running = fit_thread.is_alive()
                self._forward_records(ray.get(self._coordinator.drain.remote()), on_record)
                if stop_event.is_set() and not self._started:
                    return StoppedBeforeStart()
                if not is_running:
                    return self._outcome(resize_reason, stop_event.is_set())
                if stop_event.is_set() and signal < ControlSignal.STOP:
                    signal = ControlSignal.STOP
                    ray.get(self._coordinator.request.remote(signal))
                    on_record({"kind": "warning", "step": 0, "text": "stopping: the workers save after this step"})
                elif self._started and signal is ControlSignal.CONTINUE:
                    resize_reason = self._resize_reason(monitor)
                    if resize_reason:
                        signal = ControlSignal.RESIZE
                        ray.get(self._coordinator.request.remote(signal))
                fit_thread.join(_POLL_INTERVAL_S)
        finally:
            monitor.close()

    @property
    def _started(self) -> bool:
        return bool(self._events.node_ids)

    def _outcome(self, resize_reason: str, stop_requested: bool) -> Outcome:
        """Return the outcome of a group that has ended."""
        if self._result is not None:
            if self._result.is_finished or stop_requested:
                return Finished(self._result)
            return Resized(resize_reason)
        if not self._started and any(is_startup_timeout(error) for error in self._fit_errors):
            return StartupTimedOut()
        failure = self._events.failure
        cause = str(failure.error) if failure else _last_line(self._fit_errors)
        return Failed(cause, failure, self._started)

    def _resize_reason(self, monitor: ScaleUpMonitor) -> str:
        if draining_nodes() & set(self._events.node_ids.values()):
            return _DRAINING
        return _MORE_CAPACITY if monitor.poll() else ""

    def _forward_records(self, events: WorkerGroupEvents, on_record: RecordSink) -> None:
        self._events = events
        for record in events.records:
            if record["kind"] == "result":
                self._result = record["result"]
            else:
                on_record(record)

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            self._fit_errors.append(error)


def _worker_main(train_loop_config: dict[str, WorkerConfig]) -> None:
    """Entry point of each Ray worker."""
    import ray
    from ray import train as ray_train

    worker_config = train_loop_config["worker_config"]
    context, spec, coordinator = ray_train.get_context(), worker_config.spec, worker_config.coordinator
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device: Device = "gpu" if worker_config.use_gpu else "cpu"
    if device == "cpu":
        processes_per_node = max(1, context.get_local_world_size()) * worker_config.concurrent_runs
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes_per_node))
    ray.get(coordinator.register.remote(rank, ray.get_runtime_context().get_node_id()))
    try:
        result = run_training(
            spec, WorkerContext(rank, world_size, local_device(device), "ray", RayReporter(coordinator, spec.out_url))
        )
    except NonFiniteLossError as error:
        # Every worker raises it at the same step, so none has to be stopped.
        ray.get(coordinator.report_failure.remote(error, True))
        return
    except Exception as error:
        ray.get(coordinator.report_failure.remote(picklable_error(error), False))
        # Raised, so that Ray Train stops the workers that wait for this one.
        raise
    if rank == 0:
        ray.get(coordinator.record.remote({"kind": "result", "result": result}))


def ray_storage_options(out_url: str) -> dict[str, Any]:
    """Return the keyword arguments that make Ray keep its own files inside the run's folder."""
    url = storage.join(out_url, "ray")
    fs, path = storage.filesystem(url)
    if storage.is_local(out_url) and path == path.encode("utf-8", "ignore").decode():
        return {"storage_path": path}
    from fsspec.implementations.dirfs import DirFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    if storage.is_local(out_url):
        # Arrow accepts only paths in UTF-8, but those of local files can be any bytes.
        fs, path = DirFileSystem(os.path.dirname(path), fs), os.path.basename(path)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def picklable_error(error: Exception) -> Exception:
    """Return an error that another process can unpickle.

    Input errors stay ValueErrors. Storage that is unavailable and internal errors become RuntimeErrors; the latter name
    the file and line, because their traceback stays in the worker's log.
    """
    if isinstance(error, ValueError) and not isinstance(error, storage.StorageUnavailableError):
        return ValueError(str(error))
    if type(error) in (RuntimeError, storage.StorageUnavailableError):
        return RuntimeError(str(error))
    last_frame = traceback.extract_tb(error.__traceback__)[-1:]
    location = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last_frame)
    return RuntimeError(f"{type(error).__name__}: {error}{location}")


def _last_line(errors: list[Exception]) -> str:
    """Return the cause of a failed fit in one line."""
    lines = [line.strip() for error in errors for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "the workers were lost")
