"""Losses and gradients that are not finite numbers: noticed by all workers before the weights change, and told."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from bsq_ray import storage
from bsq_ray.training.worker_context import Worker


class NonFinite(RuntimeError):
    """A loss or gradient that is not a finite number; the weights were not touched by it."""


@dataclass(frozen=True)
class Loss:
    """The loss of a phase on one micro batch."""

    total: Tensor
    scalars: dict[str, Tensor]
    keys: list[str]


def unlike_numbers(losses: list[Loss], worker: Worker) -> tuple[str, list[str]] | None:
    """What is not finite in the losses of any worker, and the samples of this one that it comes from."""
    bad = not bool(torch.isfinite(torch.stack([loss.total for loss in losses])).all())
    [anywhere] = worker.greatest([float(bad)])
    if not anywhere:
        return None
    found = [loss for loss in losses if not bool(torch.isfinite(loss.total))]
    terms = {name for loss in found for name, value in loss.scalars.items() if not bool(torch.isfinite(value).all())}
    told = sorted({term for part in worker.gather(sorted(terms)) for term in part})
    what = f"the loss ({', '.join(told)})" if told else "the sum of the loss's terms"
    return what, [key for loss in found for key in loss.keys]


def non_finite(what: str, keys: list[str], step: int, out_url: str, worker: Worker) -> NonFinite:
    """What to raise; every worker comes here at the same step, with the samples it suspects."""
    suspected = [key for part in worker.gather(keys) for key in part]
    url = storage.join(out_url, "nonfinite.json")
    if worker.first:
        storage.write_bytes(url, json.dumps({"step": step, "what": what, "keys": suspected}, indent=1).encode())
    named = ", ".join(suspected[:4]) + (f" and {len(suspected) - 4} more" if len(suspected) > 4 else "")
    return NonFinite(
        f"step {step}: {what} is not finite; the batch was {named} (all in {url}). The weights were not "
        "changed by it; try a lower training.optimizer.learning_rate_per_256, a training.optimizer.gradient_clip, "
        "or training.engine.precision=fp32"
    )
