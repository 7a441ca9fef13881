"""Interface between the training loop and the models that it trains.

micro batches of a step ─▶ stage.prepare_step ─▶ one context each
micro batch, context ─▶ for each phase: stage.loss(phase, …, context) ─▶ PhaseOutput ─▶ context of the next phase
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bsq_ray.data.data_source import Batch
from bsq_ray.training.engines.engine import Engine

Engines = Mapping[str, Engine]


@dataclass(frozen=True)
class StepContext:
    """Values of a micro batch that its phases receive from `prepare_step` and from each other; stages extend it."""


@dataclass(frozen=True)
class PhaseOutput:
    """Result of a phase on a micro batch.

    Attributes:
        loss: scalar, with its graph.
        scalars: detached scalars to record, by name.
        context: input of the next phase; None if it needs none.
    """

    loss: Tensor
    scalars: dict[str, Tensor]
    context: StepContext | None = None


@dataclass(frozen=True)
class MetricSum:
    """Sum of a metric over a batch; the metric of several batches is the sum of totals over the sum of counts.

    Attributes:
        total: sum of the values.
        count: number of values, such as masked tokens.
    """

    total: float
    count: float


# By name: the mean over the samples of a batch, or the sum over other units than samples.
Metrics = Mapping[str, float | MetricSum]


class Stage(ABC):
    """Modules of a model and their losses; everything else is done by the training loop.

    `training.stage_class` names a subclass outside this package. It is constructed as
    `StageClass(run_config, source, device, **training.stage_options)` on every worker, after the seed is set:
    the configuration, the opened training data, and the device that `modules` are created on.

    Attributes:
        modules: modules to optimize, by name; each gets an engine. The first one is averaged and published.
        notes: remarks on the initial weights, which the run logs when it starts.
        progress: fraction of the run that is done, by steps or by time; set by the training loop before each step.
    """

    modules: dict[str, nn.Module]
    notes: tuple[str, ...] = ()
    progress: float = 0.0

    def frozen_parts(self) -> Sequence[nn.Module]:
        """Return parts of the modules that are never trained: no gradients, no optimizer state. By default none.

        Call `requires_grad_(False)` on them before engines are built.
        """
        return ()

    def select_phase(self, phase: str) -> None:
        """Make the trained parameters of the phase's module require gradients, and no others."""
        for name, module in self.modules.items():
            module.requires_grad_(name == phase)
        for part in self.frozen_parts():
            part.requires_grad_(False)

    @abstractmethod
    def phases(self, step: int) -> list[str]:
        """Return the names of the modules to optimize in this step, in order."""

    def prepare_step(self, micro_batches: Sequence[Batch], engines: Engines, step: int) -> list[StepContext | None]:
        """Compute what a micro batch needs to know of the global batch, such as means over it; collective.

        By default nothing: losses that are means over samples are those of the global batch already.

        Args:
            micro_batches: this worker's part of the global batch.
            step: steps taken, from 0.

        Returns:
            The context of the first phase of each micro batch.
        """
        return [None] * len(micro_batches)

    @abstractmethod
    def loss(self, phase: str, batch: Batch, engines: Engines, context: StepContext | None, step: int) -> PhaseOutput:
        """Compute the loss of a phase on a micro batch.

        The mean over all micro batches and workers must be the loss of the global batch, and so must the gradient.

        Args:
            phase: the module being optimized; the others are frozen.
            context: from the previous phase of this micro batch; in the first phase, from `prepare_step`.
            step: steps taken, from 0.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[Metrics, Tensor]:
        """Evaluate a held-out batch; collective, called in evaluation mode.

        Returns:
            Metrics of the batch by name, and a sample image as uint8 (3, H, W) on the CPU.
        """

    @abstractmethod
    def pop_metrics(self) -> dict[str, float]:
        """Return metrics accumulated since the last call, such as code usage, and reset them; collective."""

    def bundled_models(self) -> dict[str, str]:
        """Return model folders that the trained model needs, URL by name; they are copied into its folder."""
        return {}


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile transformer blocks in place; blocks of the same shape share a kernel.

    Raises:
        ValueError: a parameter's size would misalign the next one in ZeRO's flat buffer, which kernels cannot read.
    """
    for block in blocks:
        for name, parameter in block.named_parameters():
            if parameter.numel() % 4:
                raise ValueError(
                    f"training.engine.compile needs widths that are multiples of 4, and {name} of a block has "
                    f"{parameter.numel()} values; choose other widths, or leave compile off"
                )
        block.compile()
