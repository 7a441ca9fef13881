"""Gradients sent in buckets, while the backward pass computes the rest.

    backward pass:  last layers ─────────▶ middle ─────────▶ first layers ─▶ wait for the sums
    bucket 0:                   send
    bucket 1:                                send
    bucket 2:                                                            send

A bucket takes the place of the gradients that it was copied from. So the gradients exist once, except for those of the
bucket being copied.

DistributedDataParallel is not used: its reducer expects one forward pass before each backward pass, and a GAN calls
`autograd.grad` through the discriminator and calls it several times in a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray.runtime.collectives import num_workers

# 100 MB in fp32: large enough for the full bandwidth of a network, and small enough to overlap.
BUCKET_ELEMENTS = 25_000_000


@dataclass
class Bucket:
    """Parameters whose gradients are sent together.

    Attributes:
        parameters: in the order of the backward pass.
        num_missing: number of parameters whose gradients are not complete.
        sent: parameters that have a gradient in this step.
        flat: copy of their gradients that is sent and summed, in the communication data type.
        works: collectives in progress.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    num_missing: int = 0
    sent: list[nn.Parameter] = field(default_factory=list)
    flat: Tensor | None = None
    works: list[dist.Work] = field(default_factory=list)

    def clear(self) -> None:
        """Release the copy of the gradients."""
        self.num_missing = len(self.parameters)
        self.sent, self.flat, self.works = [], None, []


class BackwardBuckets(ABC):
    """Sends the gradients of a backward pass in buckets; collective. One worker keeps its gradients.

    All workers send the buckets in the same order, that of the backward pass: from the last parameter to the first.

    Args:
        parameters: in the order of the forward pass; those that require gradients now are sent.
        communication_dtype: data type that is sent and summed. bf16 rounds each gradient once, and each partial sum
            once per worker that adds to it.
        bucket_elements: number of elements that closes a bucket.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], communication_dtype: torch.dtype, bucket_elements: int
    ) -> None:
        self._communication_dtype = communication_dtype
        self._buckets: list[Bucket] = []
        self._next: int | None = None
        if num_workers() == 1:
            return
        self._index_of: dict[nn.Parameter, int] = {}
        size = bucket_elements
        for parameter in reversed([parameter for parameter in parameters if parameter.requires_grad]):
            if size >= bucket_elements:
                self._buckets.append(Bucket())
                size = 0
            self._buckets[-1].parameters.append(parameter)
            self._index_of[parameter] = len(self._buckets) - 1
            size += parameter.numel()
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def start(self) -> None:
        """Send the gradients of the next backward pass, the last one of a step, as they become complete."""
        self.cancel()
        self._next = 0

    def cancel(self) -> None:
        """Send nothing more of this step, after a backward pass that failed."""
        self._next = None
        for bucket in self._buckets:
            bucket.clear()

    @abstractmethod
    def _send(self, bucket: Bucket) -> None:
        """Copy the gradients of `bucket.sent` to `bucket.flat`, release them, and start `bucket.works`."""

    @torch.no_grad()
    def _summed_buckets(self) -> Iterator[Bucket]:
        """Send the remaining gradients, and yield each bucket when its sums are complete; then it is released."""
        assert self._next is not None
        for bucket in self._buckets[self._next :]:
            self._send_existing(bucket)
        self._next = None
        for bucket in self._buckets:
            # On a GPU only the stream waits.
            for work in bucket.works:
                work.wait()
            if bucket.sent:
                yield bucket
            bucket.clear()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._next is None:
            return
        self._buckets[self._index_of[parameter]].num_missing -= 1
        # A bucket that is complete early waits for those before it, because the order must not differ among workers.
        while self._next < len(self._buckets) and not self._buckets[self._next].num_missing:
            self._send_existing(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _send_existing(self, bucket: Bucket) -> None:
        bucket.sent = [parameter for parameter in bucket.parameters if parameter.grad is not None]
        if bucket.sent:
            self._send(bucket)


def align(num_elements: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-num_elements // multiple) * multiple
