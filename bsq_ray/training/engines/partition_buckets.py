"""Average gradients on the worker that owns their optimizer state, by one reduction per bucket and owner.

    bucket:         │ slices of owner 1     │ slices of owner 2 │
                      reduce to worker 1      reduce to worker 2

Around a ring, these reductions send the bytes of one reduce-scatter of all gradients. A reduce-scatter of each bucket
would send more, because its slices belong to few owners: a partition is a range of the parameters in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray.runtime._deepspeed_internals import PartitionSlice
from bsq_ray.runtime.collectives import num_workers, worker_rank
from bsq_ray.training.engines.backward_buckets import BUCKET_ELEMENTS, BackwardBuckets, Bucket, align

# The slices of an owner start at multiples of 16 bytes in bf16, as NCCL's kernels read them.
_ALIGNED_ELEMENTS = 8


class PartitionBuckets(BackwardBuckets):
    """Averages the slices of gradients that this worker owns; see `BackwardBuckets`.

    Args:
        slices: owners of the elements of each parameter; parameters in the order of the forward pass.
    """

    def __init__(
        self,
        slices: Mapping[nn.Parameter, Sequence[PartitionSlice]],
        communication_dtype: torch.dtype = torch.float32,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        super().__init__(slices, communication_dtype, bucket_elements)
        self._slices = slices

    @torch.no_grad()
    def averages(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Send the remaining gradients; yield the parameters of which this worker owns a slice, and its flat average.

        Yield nothing outside of a step, or after a backward pass that failed.
        """
        if self._next is None:
            return
        for bucket in self._summed_buckets():
            assert bucket.flat is not None
            offset = 0
            for owner, slices in self._by_owner(bucket.sent).items():
                size = _num_elements(slices)
                if owner == worker_rank():
                    own = bucket.flat[offset : offset + size].float() / num_workers()
                    parts = own.split([part.stop - part.start for _, part in slices])
                    yield from zip([parameter for parameter, _ in slices], parts, strict=True)
                offset += align(size, _ALIGNED_ELEMENTS)

    def _send(self, bucket: Bucket) -> None:
        by_owner = self._by_owner(bucket.sent)
        parts, sizes = [], []
        for slices in by_owner.values():
            size = _num_elements(slices)
            sizes.append(align(size, _ALIGNED_ELEMENTS))
            for parameter, part in slices:
                assert parameter.grad is not None
                parts.append(parameter.grad.reshape(-1)[part.start : part.stop])
            parts.append(parts[-1].new_zeros(sizes[-1] - size))
        bucket.flat = torch.cat(parts).to(self._communication_dtype)
        for parameter in bucket.sent:
            # DeepSpeed expects a gradient and uses only the slice that is replaced by its average, so NaN takes one
            # element of memory and would reveal any other use.
            parameter.grad = parameter.new_full((), torch.nan).expand_as(parameter)
        for owner, part in zip(by_owner, bucket.flat.split(sizes), strict=True):
            work = dist.reduce(part, owner, async_op=True)
            assert work is not None
            bucket.works.append(work)

    def _by_owner(self, parameters: list[nn.Parameter]) -> dict[int, list[tuple[nn.Parameter, PartitionSlice]]]:
        """Return by owner its slices, in ascending order of owners and therefore in the same order on all workers."""
        by_owner: dict[int, list[tuple[nn.Parameter, PartitionSlice]]] = {}
        for parameter in parameters:
            for part in self._slices[parameter]:
                by_owner.setdefault(part.owner, []).append((parameter, part))
        # Ascending, so that a reduction around the ring starts at a worker that the one before has passed first.
        return dict(sorted(by_owner.items()))


def _num_elements(slices: list[tuple[nn.Parameter, PartitionSlice]]) -> int:
    return sum(part.stop - part.start for _, part in slices)
