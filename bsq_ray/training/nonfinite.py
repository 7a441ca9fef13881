"""Detection of nonfinite losses and gradients on all workers, before the weights change."""

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
        "unchanged; try a lower training.optimizer.base_learning_rate, a training.optimizer.max_grad_norm, "
        "or training.engine.precision=fp32"
    )
