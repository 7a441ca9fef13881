"""A run on Ray Train's workers: starting them, listening to them, replacing those that are lost.

this process: progress line, Ctrl-C ──stop──▶ Board (actor) ◀──records── rank 0 … rank N-1: loop.run
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bsq_ray import storage
from bsq_ray.session import gpus_within_reach
from bsq_ray.training.board import Board, RayReporter
from bsq_ray.training.job import Job, NonFinite, Result
from bsq_ray.training.loop import run
from bsq_ray.training.worker import Device, Worker, local_device

_POLL_SECONDS = 0.5


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
    job: Job,
    workers: int,
    device: Device,
    max_failures: int,
    say: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    share: Share,
) -> tuple[Result, int]:
    """Trains with Ray Train's workers on the cluster this process is connected to.

    Returns:
        How the run ended, and how often its workers were started again.

    Raises:
        ValueError: the cluster can never have the GPUs that are asked for.
        RuntimeError: the training failed; the message says why.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside this process: what needs no CPU is else put anywhere, and would be lost with a server that is.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    use_gpu = train_on_gpus(device, workers, gpus_within_reach())
    # Whole CPUs for the workers, as long as some are left for the tasks that read.
    cpus = 1.0 if ray.cluster_resources().get("CPU", 0) > workers else 0.5
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"job": job, "board": board, "gpu": use_gpu, "runs": share.runs},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=share.resources or ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}),
        ),
        run_config=RunConfig(
            name=f"ray-{int(time.time() * 1000)}",
            failure_config=FailureConfig(max_failures=max_failures),
            **ray_storage(job.out_url),
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


def train_on_gpus(device: Device, workers: int, within_reach: float) -> bool:
    """Whether each worker takes a GPU.

    Args:
        device: "auto" takes GPUs where the cluster has any, up or still to be brought up.
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
    device: Device = "gpu" if settings["gpu"] else "cpu"
    if device == "cpu":
        neighbours = max(1, context.get_local_world_size()) * settings["runs"]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    if rank == 0:
        ray.get(board.start.remote())
    try:
        result = run(job, Worker(rank, world, local_device(device), "ray", RayReporter(board)))
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


def ray_storage(out_url: str) -> dict[str, Any]:
    """Where Ray keeps its own notes: inside the run's folder."""
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
