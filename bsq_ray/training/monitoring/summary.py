"""Summary of a run over all its worker groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bsq_ray.runtime.text_format import plural
from bsq_ray.training.run_spec import RunResult
from bsq_ray.training.worker_context import RecordSink

_MAX_LISTED_SAMPLES = 10


class RunSummary:
    """Collects restarts, skipped samples and checkpoints from the records of a run."""

    def __init__(self) -> None:
        self._restart_reasons: list[str] = []
        # Keys of a dictionary are unique and keep their order.
        self._skipped_samples: dict[str, None] = {}
        self._blocking_seconds: list[float] = []

    def tracking(self, on_record: RecordSink) -> RecordSink:
        """Return a sink that collects from each record and forwards it to `on_record`."""

        def track(record: dict[str, Any]) -> None:
            if record["kind"] == "restart":
                self._restart_reasons.append(record["reason"])
            elif record["kind"] == "skipped_samples":
                self._skipped_samples.update(dict.fromkeys(record["samples"]))
            elif record["kind"] == "checkpoint":
                self._blocking_seconds.append(record["blocking_seconds"])
            on_record(record)

        return track

    def complete(self, result: RunResult) -> RunResult:
        """Return the last worker group's result, completed with what was collected from all groups."""
        self._skipped_samples.update(dict.fromkeys(result.skipped_samples))
        return replace(
            result,
            restart_reasons=self._restart_reasons,
            skipped_samples=list(self._skipped_samples),
            num_checkpoints=len(self._blocking_seconds),
            checkpoint_blocking_seconds=sum(self._blocking_seconds),
        )


def format_summary(result: RunResult, out_url: str) -> list[str]:
    """Format the summary as lines of text."""
    metrics_text = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    measured_text = f"; {metrics_text} on {result.measured_on}" if result.metrics else ""
    lines = [
        f"trained {result.step} steps at {result.images_per_second:.1f} images/s{measured_text}",
        f"{100 * result.data_wait_fraction:.1f} % of the time waiting for data, "
        f"{result.checkpoint_blocking_seconds:.2f} s for {plural(result.num_checkpoints, 'checkpoint')}",
    ]
    if result.restart_reasons:
        lines += [f"restarts: {len(result.restart_reasons)}", *(f"  {reason}" for reason in result.restart_reasons)]
    if result.skipped_samples:
        lines.append(f"samples skipped: {len(result.skipped_samples)}")
        lines += [f"  {sample}" for sample in result.skipped_samples[:_MAX_LISTED_SAMPLES]]
        if len(result.skipped_samples) > _MAX_LISTED_SAMPLES:
            lines.append("  … all of them in summary.json")
    return [*lines, f"model: {out_url.rstrip('/')}/model"]
