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

_POLL_INTERVAL_S = 0.5
_CLEANUP_TIMEOUT_S = 300


class StopRequests:
    """Actor that knows which trials are to stop."""

    def __init__(self) -> None:
        self._trial_numbers: set[int] = set()
        self._all_requested = False

    def request_stop(self, number: int) -> None:
        self._trial_numbers.add(number)

    def request_stop_all(self) -> None:
        self._all_requested = True

    def reason_for(self, number: int) -> str:
        """Why a trial is to stop: "stopped" by the scheduler, "interrupted" with the sweep; empty if it is not."""
        if self._all_requested:
            return "interrupted"
        return "stopped" if number in self._trial_numbers else ""


@dataclass(frozen=True)
class TrialContext:
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
    resource_budget: ResourceBudget
    minutes: float | None
    held_out_images: int | None


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended: a state of `study.Record`, or "interrupted"."""

    state: str
    reason: str
    metrics: dict[str, float]


class SweepTrainable(tune.Trainable):
    """Trains one configuration; each step is one evaluation along the way, the last one how it ended."""

    def setup(
        self, trial_config: dict[str, Any], context: TrialContext | None = None, stop_requests: Any = None
    ) -> None:
        """Begins, or goes on from the newest checkpoint in its folder."""
        assert context is not None
        self._number, self._context, self._stop_requests = int(trial_config["number"]), context, stop_requests
        self._trial_url = trial_url(context.out_url, self._number)
        if context.device == "cpu":
            # Ray allows one, by the small part of a CPU that it counts for this process.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.resource_budget.concurrent_runs))
        self._stop_reason = ""
        self._stop_event = threading.Event()
        self._events: queue.Queue[dict[str, Any] | TrialOutcome | Exception] = queue.Queue()
        self._training_thread = threading.Thread(target=self._run, daemon=True)
        self._training_thread.start()

    def step(self) -> dict[str, Any]:
        """Waits for the next evaluation, or for the end."""
        while True:
            try:
                event = self._events.get(timeout=_POLL_INTERVAL_S)
            except queue.Empty:
                self._poll_stop_requests()
                continue
            self._poll_stop_requests()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, TrialOutcome):
                return {**asdict(event), "done": True}
            if event["kind"] == "evaluation":
                metrics = {name: value for name, value in event.items() if isinstance(value, float)}
                return {"reached": event["step"], "figures": metrics, **metrics}

    def cleanup(self) -> None:
        """Stops what Tune did not wait for."""
        self._stop_event.set()
        self._training_thread.join(_CLEANUP_TIMEOUT_S)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run's own checkpoints are in its folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""

    def _poll_stop_requests(self) -> None:
        import ray

        if not self._stop_event.is_set():
            self._stop_reason = ray.get(self._stop_requests.of.remote(self._number))
            if self._stop_reason:
                self._stop_event.set()

    def _run(self) -> None:
        try:
            self._events.put(self._train())
        except storage.StorageUnavailableError as error:
            # Says nothing about the configuration.
            self._events.put(RuntimeError(str(error)))
        except ValueError as error:
            self._events.put(TrialOutcome("invalid", str(error), {}))
        except NonFiniteLossError as error:
            self._events.put(TrialOutcome("diverged", str(error), {}))
        except Exception as error:
            self._events.put(error)

    def _train(self) -> TrialOutcome:
        from bsq_ray.training.launch import Interrupted, train

        # Here and not in `setup`, after whose errors all that Tune knows is that the process was lost.
        run_config = load_config(config_url(self._trial_url))
        self._poll_stop_requests()
        if self._stop_reason:
            return TrialOutcome(self._stop_reason, "", {})
        context = self._context
        try:
            result = train(
                run_config,
                context.data_url,
                self._trial_url,
                context.workers,
                resume=True,
                held_out_url=context.held_out_url,
                minutes=context.minutes,
                device=context.device,
                on_record=self._events.put,
                stop_event=self._stop_event,
                budget=context.resource_budget,
            )
        except Interrupted:
            return TrialOutcome(self._stop_reason, "", {})
        run_metrics = {"steps": float(result.step), "train_seconds": result.seconds}
        return TrialOutcome("finished", "", {**result.metrics, **run_metrics, **self._evaluate(run_config)})

    def _evaluate(self, run_config: config.AnyConfig) -> dict[str, float]:
        """Figures of the trained model on held-out images, for the stages that have such a measurement."""
        from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction

        if not isinstance(run_config, config.TokenizerConfig):
            return {}
        context = self._context
        results = evaluate_reconstruction(
            storage.join(self._trial_url, "model"),
            context.held_out_url,
            storage.join(self._trial_url, "evaluation"),
            # Without GPUs this process measures as fast as actors would, and starts none.
            workers=context.workers if context.device == "gpu" else 0,
            limit=context.held_out_images,
        )
        return {name: float(value) for name, value in results["rows"]["model"].items()}
