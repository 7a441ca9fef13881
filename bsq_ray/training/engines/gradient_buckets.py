"""Averages of gradients on all workers, by one all-reduce per bucket."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from bsq_ray.runtime.collectives import num_workers
from bsq_ray.training.engines.backward_buckets import BUCKET_ELEMENTS, BackwardBuckets, Bucket, align

# Gradients start at multiples of 16 bytes in fp32, as vectorized kernels read them.
_ALIGNED_ELEMENTS = 4


class GradientBuckets(BackwardBuckets):
    """Averages the gradients of a module, which are then views of the buckets; see `BackwardBuckets`."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        communication_dtype: torch.dtype = torch.float32,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        super().__init__(parameters, communication_dtype, bucket_elements)

    @torch.no_grad()
    def finish(self) -> None:
        """Average the remaining gradients and set all averages; parameters without a gradient stay without."""
        for bucket in self._summed_buckets():
            assert bucket.flat is not None
            flat = bucket.flat if bucket.flat.dtype == torch.float64 else bucket.flat.float()
            flat /= num_workers()
            parts = flat.split([align(parameter.numel(), _ALIGNED_ELEMENTS) for parameter in bucket.sent])
            for parameter, part in zip(bucket.sent, parts, strict=True):
                parameter.grad = part[: parameter.numel()].view_as(parameter).to(parameter.dtype)

    def _send(self, bucket: Bucket) -> None:
        parts = []
        for parameter in bucket.sent:
            assert parameter.grad is not None
            padding = align(parameter.numel(), _ALIGNED_ELEMENTS) - parameter.numel()
            parts += [parameter.grad.reshape(-1), parameter.grad.new_zeros(padding)]
            # The bucket has the only copy until `finish`.
            parameter.grad = None
        flat = torch.cat(parts)
        # Models in fp64, which only comparisons train, keep their precision.
        is_fp64 = flat.dtype == torch.float64 and self._communication_dtype == torch.float32
        bucket.flat = flat if is_fp64 else flat.to(self._communication_dtype)
        work = dist.all_reduce(bucket.flat, async_op=True)
        assert work is not None
        bucket.works = [work]
