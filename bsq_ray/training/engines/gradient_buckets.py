"""Averages of gradients over all workers, started while the backward pass computes the rest.

    backward pass:  last layers ─────────▶ middle ─────────▶ first layers ─▶ finish: wait, set the averages
    bucket 0:                   all-reduce
    bucket 1:                                    all-reduce
    bucket 2:                                                        all-reduce

A bucket replaces the gradients that it was copied from, and after `finish` they are views of it. So the gradients exist
once, except for those of the bucket being copied.

DistributedDataParallel is not used: its reducer expects one forward pass before each backward pass, and a GAN calls
`autograd.grad` through the discriminator and calls it several times in a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray.runtime.collectives import num_workers

# 100 MB in fp32: large enough for the full bandwidth of a network, and small enough to overlap.
BUCKET_ELEMENTS = 25_000_000
# Gradients start at multiples of 16 bytes in fp32, as vectorized kernels read them.
_ALIGNED_ELEMENTS = 4


@dataclass
class _Bucket:
    """Parameters whose gradients are averaged together, and their all-reduce in progress."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    num_missing: int = 0
    sent: list[nn.Parameter] = field(default_factory=list)
    flat: Tensor | None = None
    work: dist.Work | None = None


class GradientBuckets:
    """Averages the gradients of a module in buckets; collective. One worker keeps its gradients.

    All workers start the buckets in the same order, that of the backward pass: from the last parameter to the first.

    Args:
        parameters: in the order of the forward pass; those that require gradients now are averaged.
        communication_dtype: data type that is sent and summed. bf16 rounds each gradient once, and each partial sum
            once per worker that adds to it.
        bucket_elements: number of elements that closes a bucket.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        communication_dtype: torch.dtype = torch.float32,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        self._communication_dtype = communication_dtype
        self._buckets: list[_Bucket] = []
        self._next: int | None = None
        if num_workers() == 1:
            return
        self._index_of: dict[nn.Parameter, int] = {}
        size = bucket_elements
        for parameter in reversed([parameter for parameter in parameters if parameter.requires_grad]):
            if size >= bucket_elements:
                self._buckets.append(_Bucket())
                size = 0
            self._buckets[-1].parameters.append(parameter)
            self._index_of[parameter] = len(self._buckets) - 1
            size += parameter.numel()
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def start(self) -> None:
        """Average the gradients of the next backward pass, the last one of a step, as they become complete."""
        self._next = 0
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    @torch.no_grad()
    def finish(self) -> None:
        """Average the remaining gradients and set all averages; parameters without a gradient stay without."""
        assert self._next is not None
        for bucket in self._buckets[self._next :]:
            self._start_all_reduce(bucket)
        self._next = None
        for bucket in self._buckets:
            if bucket.flat is None:
                continue
            if bucket.work is not None:
                bucket.work.wait()
            flat = bucket.flat.float()
            flat /= num_workers()
            parts = flat.split([_aligned(parameter.numel()) for parameter in bucket.sent])
            for parameter, part in zip(bucket.sent, parts, strict=True):
                parameter.grad = part[: parameter.numel()].view_as(parameter).to(parameter.dtype)
            bucket.sent, bucket.flat, bucket.work = [], None, None

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._next is None:
            return
        self._buckets[self._index_of[parameter]].num_missing -= 1
        # A bucket that is complete early waits for those before it, because the order must not differ among workers.
        while self._next < len(self._buckets) and not self._buckets[self._next].num_missing:
            self._start_all_reduce(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _start_all_reduce(self, bucket: _Bucket) -> None:
        parts = []
        for parameter in bucket.parameters:
            if parameter.grad is not None:
                bucket.sent.append(parameter)
                padding = parameter.grad.new_zeros(_aligned(parameter.numel()) - parameter.numel())
                parts += [parameter.grad.reshape(-1), padding]
                # The bucket has the only copy until `finish`.
                parameter.grad = None
        if parts:
            bucket.flat = torch.cat(parts).to(self._communication_dtype)
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _aligned(num_elements: int) -> int:
    """Round up to a multiple of the alignment."""
    return -(-num_elements // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
