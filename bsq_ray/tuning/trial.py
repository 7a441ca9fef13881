"""A trial as Ray Tune runs it: an actor that trains on workers of its own, as `bsq-ray train` does.

    Tune ──step──▶ Trial ──thread: launch.train──▶ Ray Train's workers
         ◀─figures─       ◀──records, wishes to stop──

A trial always ends by itself. Whoever wants it to stop tells `Wishes`; the workers then save, give everything back, and
the trial's last step says how it ended. Killing the actor instead would leave its workers' placement group behind.
"""

from __future__ import annotations

import os
import queue
import threading
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ray import tune

from bsq_ray import config, storage
from bsq_ray.config import load_config
from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.ray_trainer import ResourceBudget
from bsq_ray.training.worker_context import Device
from bsq_ray.tuning.study import config_url, trial_url

_POLL_SECONDS = 0.5
_CLEANUP_SECONDS = 300


class Wishes:
    """Actor that knows which trials are to stop."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._all = False

    def stop(self, number: int) -> None:
        self._numbers.add(number)

    def stop_all(self) -> None:
        self._all = True

    def of(self, number: int) -> str:
        """Why a trial is to stop: "stopped" by the scheduler, "interrupted" with the sweep; empty if it is not."""
        if self._all:
            return "interrupted"
        return "stopped" if number in self._numbers else ""


@dataclass(frozen=True)
class Task:
    """What all trials of a sweep have in common.

    Attributes:
        out_url: folder of the sweep.
        held_out_images: of the measurement after the training; None takes all.
        minutes: of training; None trains all steps of the configuration.
    """

    out_url: str
    data_url: str
    held_out_url: str
    workers: int
    device: Device
    share: ResourceBudget
    minutes: float | None
    held_out_images: int | None


@dataclass(frozen=True)
class Ending:
    """How a trial ended: a state of `study.Record`, or "interrupted"."""

    ending: str
    reason: str
    figures: dict[str, float]


class Trial(tune.Trainable):
    """Trains one configuration; each step is one evaluation along the way, the last one how it ended."""

    def setup(self, given: dict[str, Any], task: Task | None = None, wishes: Any = None) -> None:
        """Begins, or goes on from the newest checkpoint in its folder."""
        assert task is not None
        self._number, self._task, self._wishes = int(given["number"]), task, wishes
        self._folder = trial_url(task.out_url, self._number)
        if task.device == "cpu":
            # Ray allows one, by the small part of a CPU that it counts for this process.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // task.share.concurrent_runs))
        self._wish = ""
        self._stop = threading.Event()
        self._told: queue.Queue[dict[str, Any] | Ending | Exception] = queue.Queue()
        self._training = threading.Thread(target=self._run, daemon=True)
        self._training.start()

    def step(self) -> dict[str, Any]:
        """Waits for the next evaluation, or for the end."""
        while True:
            try:
                told = self._told.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                self._hear_wishes()
                continue
            self._hear_wishes()
            if isinstance(told, Exception):
                raise told
            if isinstance(told, Ending):
                return {**asdict(told), "done": True}
            if told["kind"] == "evaluation":
                figures = {name: value for name, value in told.items() if isinstance(value, float)}
                return {"reached": told["step"], "figures": figures, **figures}

    def cleanup(self) -> None:
        """Stops what Tune did not wait for."""
        self._stop.set()
        self._training.join(_CLEANUP_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run's own checkpoints are in its folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""

    def _hear_wishes(self) -> None:
        import ray

        if not self._stop.is_set():
            self._wish = ray.get(self._wishes.of.remote(self._number))
            if self._wish:
                self._stop.set()

    def _run(self) -> None:
        try:
            self._told.put(self._train())
        except storage.StorageUnavailableError as error:
            # Says nothing about the configuration.
            self._told.put(RuntimeError(str(error)))
        except ValueError as error:
            self._told.put(Ending("invalid", str(error), {}))
        except NonFiniteLossError as error:
            self._told.put(Ending("diverged", str(error), {}))
        except Exception as error:
            self._told.put(error)

    def _train(self) -> Ending:
        from bsq_ray.training.launch import Interrupted, train

        # Here and not in `setup`, after whose errors all that Tune knows is that the process was lost.
        run_config = load_config(config_url(self._folder))
        self._hear_wishes()
        if self._wish:
            return Ending(self._wish, "", {})
        task = self._task
        try:
            result = train(
                run_config,
                task.data_url,
                self._folder,
                task.workers,
                resume=True,
                held_out_url=task.held_out_url,
                minutes=task.minutes,
                device=task.device,
                on_record=self._told.put,
                stop_event=self._stop,
                budget=task.share,
            )
        except Interrupted:
            return Ending(self._wish, "", {})
        facts = {"steps": float(result.step), "train_seconds": result.seconds}
        return Ending("finished", "", {**result.metrics, **facts, **self._measure(run_config)})

    def _measure(self, run_config: config.AnyConfig) -> dict[str, float]:
        """Figures of the trained model on held-out images, for the stages that have such a measurement."""
        from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction

        if not isinstance(run_config, config.TokenizerConfig):
            return {}
        task = self._task
        results = evaluate_reconstruction(
            storage.join(self._folder, "model"),
            task.held_out_url,
            storage.join(self._folder, "evaluation"),
            # Without GPUs this process measures as fast as actors would, and starts none.
            workers=task.workers if task.device == "gpu" else 0,
            limit=task.held_out_images,
        )
        return {name: float(value) for name, value in results["rows"]["model"].items()}
