"""Detection of nonfinite losses and gradients without waiting for the device.

loss not finite ─▶ NaN gradient ─▶ averaged over workers ─▶ gradient norm not finite
                ─▶ `found` on the device ─▶ engines leave weights and optimizer state unchanged
                ─▶ one step later the host reads `found`, and finds step, term and samples
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from bsq_ray import storage
from bsq_ray.training.worker_context import WorkerContext


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is not finite; the weights are unchanged."""


@dataclass(frozen=True)
class PhaseLoss:
    """Loss of a phase on one micro batch.

    Attributes:
        total: detached scalar.
        scalars: detached terms of the loss, by name.
        sample_keys: keys of the micro batch.
    """

    total: Tensor
    scalars: dict[str, Tensor]
    sample_keys: list[str]


@dataclass(frozen=True)
class PhaseResult:
    """Losses and gradient norm of a phase in one step.

    Attributes:
        step: number of the step, from 1.
        losses: of each micro batch.
        grad_norm: scalar, equal on all workers.
    """

    step: int
    phase: str
    losses: list[PhaseLoss]
    grad_norm: Tensor


class NonFiniteDetector:
    """Remembers the results of the last two steps, so that an error one step later names its cause.

    Attributes:
        found: fp32 scalar on the device, which engines set to 1 at the first gradient norm that is not finite. From
            then on they leave weights and optimizer state unchanged.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)
        self._results: list[PhaseResult] = []

    def add(self, result: PhaseResult) -> None:
        """Remember the result of a phase, and forget those of steps before the previous one."""
        self._results = [each for each in self._results if each.step >= result.step - 1] + [result]

    def error(self, out_url: str, worker: WorkerContext) -> NonFiniteLossError:
        """Return the error of the first result that is not finite; read the device; collective.

        Call it on all workers after the same step, if `found` is set.
        """
        for result in self._results:
            nonfinite = find_nonfinite(result.losses, worker)
            if nonfinite is None and not bool(torch.isfinite(result.grad_norm)):
                keys = [key for loss in result.losses for key in loss.sample_keys]
                nonfinite = f"the gradient of the {result.phase}", keys
            if nonfinite is not None:
                return nonfinite_error(*nonfinite, result.step, out_url, worker)
        raise AssertionError("no result of the last two steps is nonfinite")


def nan_gradient_if_nonfinite(loss: Tensor) -> Tensor:
    """Return the same scalar; its gradients are NaN if it is not finite.

    A loss can be infinite and have finite gradients. With NaN, averaging the gradients informs all workers.
    """
    value = loss.detach()
    return loss * (value - value + 1)


def find_nonfinite(losses: list[PhaseLoss], worker: WorkerContext) -> tuple[str, list[str]] | None:
    """Find nonfinite losses on any worker; collective.

    Returns:
        A description that names the terms, and this worker's sample keys; None if all losses are finite.
    """
    has_nonfinite = not bool(torch.isfinite(torch.stack([loss.total for loss in losses])).all())
    [any_rank] = worker.all_reduce_max([float(has_nonfinite)])
    if not any_rank:
        return None
    nonfinite_losses = [loss for loss in losses if not bool(torch.isfinite(loss.total))]
    terms = {
        name
        for loss in nonfinite_losses
        for name, value in loss.scalars.items()
        if not bool(torch.isfinite(value).all())
    }
    all_terms = sorted({term for part in worker.all_gather_object(sorted(terms)) for term in part})
    description = f"the loss ({', '.join(all_terms)})" if all_terms else "the sum of the loss's terms"
    return description, [key for loss in nonfinite_losses for key in loss.sample_keys]


def nonfinite_error(
    description: str, sample_keys: list[str], step: int, out_url: str, worker: WorkerContext
) -> NonFiniteLossError:
    """Write `nonfinite.json` and return the error to raise; collective.

    Args:
        description: subject of the message, such as "the loss (reconstruction)".
        sample_keys: suspect samples of this worker.
        step: step that failed, from 1.
    """
    suspect_keys = [key for part in worker.all_gather_object(sample_keys) for key in part]
    url = storage.join(out_url, "nonfinite.json")
    if worker.is_main:
        storage.write_text(url, json.dumps({"step": step, "what": description, "keys": suspect_keys}, indent=1))
    key_list = ", ".join(suspect_keys[:4]) + (f" and {len(suspect_keys) - 4} more" if len(suspect_keys) > 4 else "")
    return NonFiniteLossError(
        f"step {step}: {description} is not finite; the batch was {key_list} (all in {url}). The weights are "
        "unchanged; try a lower training.optimizer.base_learning_rate (and training.optimizer.muon.base_learning_rate "
        "with Muon), a training.optimizer.max_grad_norm, "
        "or training.engine.precision=fp32"
    )
