"""The schema of a sweep's YAML: what is trained, what is varied and how, who is stopped, what it may cost.

What each key means is said beside it in `jobs/sweeps/loss-weights.yaml`, which writes out all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from bsq_ray import storage
from bsq_ray.config.loader import STAGES, beside, known_keys, load_config, nearest, read_section
from bsq_ray.config.tokenizer_config import Strict
from bsq_ray.tuning.space import Parameter, leaves

Direction = Literal["min", "max"]

# Figures that the training's own evaluations give, and those of the measurement after the last step.
ALONG = {"tokenizer": ("psnr", "perceptual"), "masked-lm": ("bits_per_token",), "prior": ("bits_per_token",)}
_AFTER = {
    "tokenizer": (
        *("lpips", "lpips_vgg", "ssim", "ms_ssim", "rfid", "kid"),
        *("bits_per_pixel", "code_usage", "bit_entropy", "images_per_second"),
    ),
    "masked-lm": (),
    "prior": (),
}


class Scheduler(Strict):
    """Who is stopped before the end: ASHA's worst at each rung, or who is worse than the median of the others."""

    kind: Literal["none", "asha", "median"] = "none"
    metric: str | None = None
    direction: Direction | None = None
    grace_steps: int = Field(100, ge=1)
    reduction: float = Field(3.0, gt=1)
    trials_before: int = Field(3, ge=1)


class Budget(Strict):
    """What the sweep may cost: trials, the length of each, and its share of the cluster."""

    trials: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    concurrency: int | None = Field(None, ge=1)
    workers: int = Field(1, ge=1)
    resources: dict[str, float] | None = None
    retries: int = Field(1, ge=0)
    held_out_images: int | None = Field(None, ge=2)


class Sweep(Strict):
    """A whole sweep."""

    name: str = Field(min_length=1)
    description: str = ""
    stage: Literal["tokenizer", "masked-lm", "prior"] = "tokenizer"
    preset: str
    set: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Parameter]
    searcher: Literal["grid", "random", "tpe"] = "grid"
    seed: int = Field(0, ge=0)
    scheduler: Scheduler = Scheduler()
    metrics: dict[str, Direction]
    budget: Budget = Budget()

    @property
    def first_metric(self) -> tuple[str, Direction]:
        """The metric that decides which trial is the best."""
        return next(iter(self.metrics.items()))

    @property
    def watched(self) -> tuple[str, Direction]:
        """The metric by which the scheduler stops trials."""
        name, direction = self.first_metric
        watched = self.scheduler.metric or name
        return watched, self.scheduler.direction or self.metrics.get(watched, direction)

    @property
    def trials(self) -> int:
        """How many there are."""
        if self.budget.trials is not None:
            return self.budget.trials
        combinations = 1
        for parameter in self.space.values():
            combinations *= len(parameter.listed())
        return combinations

    @model_validator(mode="after")
    def _space_can_be_searched(self) -> Sweep:
        if not self.space:
            raise ValueError("space is empty; name at least one key of the configuration to vary")
        if self.searcher != "grid":
            if self.budget.trials is None:
                raise ValueError(f"budget.trials is missing; the searcher {self.searcher} has no end of its own")
            return self
        for name, parameter in self.space.items():
            if not parameter.listed():
                raise ValueError(f"space: {name} is a range of real numbers; a grid needs values, choices or integers")
        if self.budget.trials is not None:
            raise ValueError("budget.trials is not for a grid, which tries every combination; leave it out")
        return self

    @model_validator(mode="after")
    def _metrics_are_measured(self) -> Sweep:
        if not self.metrics:
            raise ValueError("metrics is empty; name at least one, such as lpips: min")
        along, known = ALONG[self.stage], (*ALONG[self.stage], *_AFTER[self.stage])
        for name in self.metrics:
            if name not in known:
                told = nearest(name, known, "metrics")
                raise ValueError(f"metrics: no evaluation of a {self.stage} gives {name}; {told}")
        if self.scheduler.kind != "none" and self.watched[0] not in along:
            raise ValueError(
                f"scheduler: {self.watched[0]} is not measured along the way, so nobody can be stopped by it; "
                f"scheduler.metric can be {' or '.join(along)}"
            )
        if self.scheduler.metric and self.scheduler.metric not in self.metrics and not self.scheduler.direction:
            raise ValueError(f"scheduler.direction is missing; is {self.scheduler.metric} good at its min or its max?")
        return self

    @model_validator(mode="after")
    def _workers_take_something(self) -> Sweep:
        resources = self.budget.resources
        if resources is not None and not any(amount > 0 for amount in resources.values()):
            raise ValueError(f"budget.resources {resources} is nothing; give each worker a CPU or a GPU")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Sweep:
        if self.budget.steps is not None and self.budget.minutes is not None:
            raise ValueError("budget has steps and minutes; a trial ends by one of them")
        return self


def load_sweep(source: str) -> Sweep:
    """Reads a sweep's YAML and checks it, its preset and every key that it names.

    Raises:
        ValueError: one sentence that names the file, the key and what would be right.
    """
    sweep = read_section(source, Sweep)
    # Trials stand in other folders than the sweep.
    sweep = sweep.model_copy(update={"preset": beside(sweep.preset, storage.absolute(source))})
    run = load_config(sweep.preset)
    if run.stage != sweep.stage:
        raise ValueError(f"{source}: stage {sweep.stage} is not that of preset {sweep.preset}, which is {run.stage}")
    known = known_keys(STAGES[sweep.stage])
    for where, key in _named_keys(sweep):
        if key not in known:
            raise ValueError(f"{source}: {where}: unknown key {key}; {nearest(key, known, 'valid keys')}")
    return sweep


def _named_keys(sweep: Sweep) -> Iterator[tuple[str, str]]:
    """Every key of the configuration that the sweep names, and where."""
    yield from (("set", key) for key in leaves(sweep.set))
    for name, parameter in sweep.space.items():
        yield from (("space", key) for key in parameter.named(name))
