"""What a run tells at its end, about all groups of workers that had a part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bsq_ray.training.run_spec import Result

Say = Callable[[dict[str, Any]], None]


class Summary:
    """Listens to a run's records."""

    def __init__(self) -> None:
        self._restarts: list[str] = []
        self._damaged: list[str] = []
        self._stalls: list[float] = []

    def heard(self, say: Say) -> Say:
        """Passes records on, and keeps what the summary needs."""

        def hear(record: dict[str, Any]) -> None:
            if record["kind"] == "restart":
                self._restarts.append(record["reason"])
            elif record["kind"] == "damaged":
                self._damaged.extend(sample for sample in record["samples"] if sample not in self._damaged)
            elif record["kind"] == "checkpoint":
                self._stalls.append(record["stall"])
            say(record)

        return hear

    def complete(self, result: Result) -> Result:
        """The last group's result, with what happened before."""
        return replace(
            result,
            restarts=self._restarts,
            damaged=[*self._damaged, *(sample for sample in result.damaged if sample not in self._damaged)],
            checkpoints=len(self._stalls),
            checkpoint_stall=sum(self._stalls),
        )


def summary_lines(result: Result, out_url: str) -> list[str]:
    """The summary as a person reads it."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
    saves = f"{result.checkpoints} checkpoint{'s' * (result.checkpoints != 1)}"
    lines = [
        f"trained {result.step} steps at {result.images_per_second:.1f} images/s; {figures}",
        f"{100 * result.data_wait:.1f} % of the time waiting for data, {result.checkpoint_stall:.2f} s for {saves}",
    ]
    if result.restarts:
        lines += [f"restarts: {len(result.restarts)}", *(f"  {reason}" for reason in result.restarts)]
    if result.damaged:
        lines += [f"samples skipped: {len(result.damaged)}", *(f"  {sample}" for sample in result.damaged[:10])]
        lines += ["  … all of them in summary.json"] * (len(result.damaged) > 10)
    return [*lines, f"model: {out_url.rstrip('/')}/model"]
