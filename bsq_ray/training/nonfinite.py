"""Losses and gradients that are not finite numbers: noticed by all workers before the weights change, and told."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from bsq_ray import storage
from bsq_ray.training.worker_context import WorkerContext


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is not a finite number; the weights were not touched by it."""


@dataclass(frozen=True)
class PhaseLoss:
    """The loss of a phase on one micro batch."""

    total: Tensor
    scalars: dict[str, Tensor]
    sample_keys: list[str]


def find_nonfinite(losses: list[PhaseLoss], worker: WorkerContext) -> tuple[str, list[str]] | None:
    """What is not finite in the losses of any worker, and the samples of this one that it comes from."""
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
    """What to raise; every worker comes here at the same step, with the samples it suspects."""
    suspect_keys = [key for part in worker.all_gather_object(sample_keys) for key in part]
    url = storage.join(out_url, "nonfinite.json")
    if worker.is_main:
        storage.write_bytes(
            url, json.dumps({"step": step, "what": description, "keys": suspect_keys}, indent=1).encode()
        )
    key_list = ", ".join(suspect_keys[:4]) + (f" and {len(suspect_keys) - 4} more" if len(suspect_keys) > 4 else "")
    return NonFiniteLossError(
        f"step {step}: {description} is not finite; the batch was {key_list} (all in {url}). The weights were not "
        "changed by it; try a lower training.optimizer.base_learning_rate, a training.optimizer.max_grad_norm, "
        "or training.engine.precision=fp32"
    )
