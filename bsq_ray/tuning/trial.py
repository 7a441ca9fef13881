"""Trial of a sweep as a Tune trainable: an actor that trains on its own Ray workers, as `bsq-ray train` does.

    Tune ──step()──▶ SweepTrainable ──thread: launch.train──▶ Ray Train's workers
         ◀─result──                 ◀──records; stop_event──▶

    ┌─────────┐ evaluation record: report it, stay                        ┌──────────────────────────────────────┐
    │ training│──────────────────────────────────────────────────────────▶│ result with "state" and done=True    │
    └─────────┘ run ended: finished, stopped, interrupted,                │ (a TrialOutcome)                     │
         │      invalid or diverged                                       └──────────────────────────────────────┘
         └─ any other error ─▶ raised from step(): Tune retries the trial, up to max_failures

A trial is never killed. On a stop request its workers save and release their resources, and the last step returns the
outcome. Killing the actor instead would leave the placement group of its workers behind.
"""

from __future__ import annotations

import os
import queue
import threading
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from ray import tune

from bsq_ray import config, storage
from bsq_ray.config import load_config
from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.worker_context import Device
from bsq_ray.training.worker_resources import ResourceBudget
from bsq_ray.tuning.study import config_url, trial_url

_POLL_INTERVAL_S = 0.5
_CLEANUP_TIMEOUT_S = 300

StopReason = Literal["", "stopped", "interrupted"]
OutcomeState = Literal["finished", "stopped", "interrupted", "invalid", "diverged"]


class StopRequests:
    """Actor that stores the stop requests of a sweep."""

    def __init__(self) -> None:
        self._trial_numbers: set[int] = set()
        self._all_requested = False

    def request_stop(self, number: int) -> None:
        """Request that one trial stops early."""
        self._trial_numbers.add(number)

    def request_stop_all(self) -> None:
        """Request that every trial saves and exits, because the sweep is interrupted."""
        self._all_requested = True

    def reason_for(self, number: int) -> StopReason:
        """Return why a trial has to stop: "stopped" by the scheduler, "interrupted" with the sweep, or empty."""
        if self._all_requested:
            return "interrupted"
        return "stopped" if number in self._trial_numbers else ""


@dataclass(frozen=True)
class TrialContext:
    """Input that all trials of a sweep share.

    Attributes:
        out_url: folder of the sweep.
        data_url: packed training data.
        held_out_url: packed held-out data.
        workers: number of training processes of each trial.
        device: device of each worker.
        resource_budget: resources of each trial.
        minutes: time limit of the training; None trains all steps of the configuration.
        held_out_images: size of the final evaluation; None uses all held-out images.
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
    """Outcome of a trial: its final state, the reason if it is an error, and its metrics."""

    state: OutcomeState
    reason: str
    metrics: dict[str, float]


class SweepTrainable(tune.Trainable):
    """Trains one configuration; each step returns one evaluation, the last one the outcome."""

    def setup(
        self, trial_config: dict[str, Any], context: TrialContext | None = None, stop_requests: Any = None
    ) -> None:
        """Start the training, or resume it from the newest checkpoint in the trial's folder."""
        assert context is not None
        self._number, self._context, self._stop_requests = int(trial_config["number"]), context, stop_requests
        self._trial_url = trial_url(context.out_url, self._number)
        if context.device == "cpu":
            # Ray sets one thread, for the fraction of a CPU that this process reserves.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.resource_budget.concurrent_runs))
        self._stop_reason: StopReason = ""
        self._stop_event = threading.Event()
        self._events: queue.Queue[dict[str, Any] | TrialOutcome | Exception] = queue.Queue()
        self._training_thread = threading.Thread(target=self._run, daemon=True)
        self._training_thread.start()

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation or the outcome, and return it as Tune's result.

        Raises:
            Exception: the training failed in a way that a retry may fix.
        """
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
                metrics = _without_split({name: value for name, value in event.items() if isinstance(value, float)})
                # Nested for the study, flat for Tune's schedulers.
                return {"step": event["step"], "metrics": metrics, **metrics}

    def cleanup(self) -> None:
        """Stop a training that Tune did not wait for."""
        self._stop_event.set()
        self._training_thread.join(_CLEANUP_TIMEOUT_S)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the run has its own checkpoints in its folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing, see `save_checkpoint`."""

    def _poll_stop_requests(self) -> None:
        import ray

        if not self._stop_event.is_set():
            self._stop_reason = ray.get(self._stop_requests.reason_for.remote(self._number))
            if self._stop_reason:
                self._stop_event.set()

    def _run(self) -> None:
        """Train, and put the outcome or the error on the queue."""
        try:
            self._events.put(self._train())
        except storage.StorageUnavailableError as error:
            # A ValueError, but not one of the configuration.
            self._events.put(RuntimeError(str(error)))
        except ValueError as error:
            self._events.put(TrialOutcome("invalid", str(error), {}))
        except NonFiniteLossError as error:
            self._events.put(TrialOutcome("diverged", str(error), {}))
        except Exception as error:
            self._events.put(error)

    def _train(self) -> TrialOutcome:
        from bsq_ray.training.launch import Interrupted, train

        # Not in `setup`: Tune reports an error there as a lost process, without its message.
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
            # `cleanup` sets the event without a reason; its outcome is never read.
            return TrialOutcome(self._stop_reason or "interrupted", "", {})
        run_metrics = {"steps": float(result.step), "train_seconds": result.duration_s}
        return TrialOutcome(
            "finished", "", {**_without_split(result.metrics), **run_metrics, **self._evaluate(run_config)}
        )

    def _evaluate(self, run_config: config.AnyConfig) -> dict[str, float]:
        """Return metrics of the trained model on held-out images; empty for stages without such an evaluation."""
        from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction

        if not isinstance(run_config, config.TokenizerConfig):
            return {}
        context = self._context
        results = evaluate_reconstruction(
            storage.join(self._trial_url, "model"),
            context.held_out_url,
            storage.join(self._trial_url, "evaluation"),
            # On a CPU this process is as fast as actors would be.
            workers=context.workers if context.device == "gpu" else 0,
            limit=context.held_out_images,
        )
        return {name: float(value) for name, value in results["rows"]["model"].items()}


def _without_split(metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics without the prefix "held_out/": all metrics of a sweep are of held-out samples."""
    return {name.removeprefix("held_out/"): value for name, value in metrics.items()}
