"""What the loop asks of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from bsq_ray.data.data_source import Batch
from bsq_ray.training.engines.engine import Engine

Engines = Mapping[str, Engine]


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles transformer blocks in place; a kernel is shared by all of the same shape.

    Raises:
        ValueError: a parameter's size would leave the next one, in ZeRO's flat buffer, where no kernel can read it.
    """
    for block in blocks:
        for name, parameter in block.named_parameters():
            if parameter.numel() % 4:
                raise ValueError(
                    f"training.engine.compile needs widths that are multiples of 4, and {name} of a block has "
                    f"{parameter.numel()} values; choose other widths, or leave compile off"
                )
        block.compile()


class Stage(ABC):
    """Builds the modules of a model and turns batches into losses; everything else is the loop's.

    Attributes:
        modules: what is optimised, by name; each gets an engine. The first is the model that is kept, averaged and
            published.
    """

    modules: dict[str, nn.Module]

    @abstractmethod
    def phases(self, step: int) -> list[str]:
        """Names of the modules to optimise in this step, in order."""

    @abstractmethod
    def loss(
        self, phase: str, batch: Batch, engines: Engines, context: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a phase on a micro batch.

        Args:
            phase: the module being optimised; the others are frozen.
            carry: passes values between the phases of a micro batch; starts empty.

        Returns:
            The scalar loss, and detached scalars for the log.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        """Figures of a held-out batch, and a picture of it as uint8 (3, H, W); every worker calls it."""

    @abstractmethod
    def pop_metrics(self) -> dict[str, float]:
        """Figures gathered since the last call, such as code usage."""

    def bundled_models(self) -> dict[str, str]:
        """Model folders to be copied into the trained one, URL by name: what it cannot be used without."""
        return {}
