"""What a run tells at its end, about all groups of workers that had a part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bsq_ray.training.run_spec import RunResult

RecordSink = Callable[[dict[str, Any]], None]


class RunSummary:
    """Listens to a run's records."""

    def __init__(self) -> None:
        self._restart_reasons: list[str] = []
        self._skipped_samples: list[str] = []
        self._blocking_seconds: list[float] = []

    def tracking(self, on_record: RecordSink) -> RecordSink:
        """Passes records on, and keeps what the summary needs."""

        def track(record: dict[str, Any]) -> None:
            if record["kind"] == "restart":
                self._restart_reasons.append(record["reason"])
            elif record["kind"] == "damaged":
                self._skipped_samples.extend(
                    sample for sample in record["samples"] if sample not in self._skipped_samples
                )
            elif record["kind"] == "checkpoint":
                self._blocking_seconds.append(record["stall"])
            on_record(record)

        return track

    def complete(self, result: RunResult) -> RunResult:
        """The last group's result, with what happened before."""
        return replace(
            result,
            restart_reasons=self._restart_reasons,
            skipped_samples=[
                *self._skipped_samples,
                *(sample for sample in result.skipped_samples if sample not in self._skipped_samples),
            ],
            num_checkpoints=len(self._blocking_seconds),
            checkpoint_blocking_seconds=sum(self._blocking_seconds),
        )


def format_summary(result: RunResult, out_url: str) -> list[str]:
    """The summary as a person reads it."""
    metrics_text = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    checkpoints_text = f"{result.num_checkpoints} checkpoint{'s' * (result.num_checkpoints != 1)}"
    lines = [
        f"trained {result.step} steps at {result.images_per_second:.1f} images/s; {metrics_text}",
        f"{100 * result.data_wait:.1f} % of the time waiting for data, {result.checkpoint_blocking_seconds:.2f} s for {checkpoints_text}",
    ]
    if result.restart_reasons:
        lines += [f"restarts: {len(result.restart_reasons)}", *(f"  {reason}" for reason in result.restart_reasons)]
    if result.skipped_samples:
        lines += [
            f"samples skipped: {len(result.skipped_samples)}",
            *(f"  {sample}" for sample in result.skipped_samples[:10]),
        ]
        lines += ["  … all of them in summary.json"] * (len(result.skipped_samples) > 10)
    return [*lines, f"model: {out_url.rstrip('/')}/model"]
