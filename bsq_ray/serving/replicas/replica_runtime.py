"""Everything that the models of a replica share: threads, limits and verified batch sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bsq_ray.serving.batch_invariance import BatchInvariantRunner, BatchSizes, RowFunction
from bsq_ray.serving.replicas.model_thread import ModelThread, num_cores
from bsq_ray.serving.service_config import Batching, Limits, TorchScaling


@dataclass(frozen=True)
class ReplicaRuntime:
    """Threads, limits and verified batch sizes of a replica.

    Attributes:
        scaling: configuration of the replica.
        limits: limits of requests.
        batch_thread: computes the batches of tokenizers and generators.
        codec_thread: compresses and decompresses; a long request there does not delay batches.
        batch_sizes: verified batch sizes by function and architecture; they do not depend on the weights.
    """

    scaling: TorchScaling
    limits: Limits
    batch_thread: ModelThread
    codec_thread: ModelThread
    batch_sizes: dict[tuple[str, str], BatchSizes] = field(default_factory=dict)

    @classmethod
    def create(cls, scaling: TorchScaling, limits: Limits) -> ReplicaRuntime:
        """Start the threads of a replica."""
        return cls(scaling, limits, ModelThread(scaling.threads), ModelThread(scaling.threads))

    @property
    def device(self) -> str:
        """Device of the models."""
        return self.scaling.device

    @property
    def batching(self) -> Batching:
        """Configuration of batches; only codecs of priors have none."""
        assert isinstance(self.scaling, Batching)
        return self.scaling

    def make_runner(self, run: RowFunction, architecture: str, *rows: Tensor) -> BatchInvariantRunner:
        """Return a runner of a function; the first model of an architecture calibrates it.

        Args:
            architecture: description of everything but the weights.
            rows: example inputs, as many as the largest batch.
        """
        key = run.__name__, architecture
        known_sizes = self.batch_sizes.get(key)
        runner = BatchInvariantRunner(run, *rows, num_cores=num_cores(self.device), known_sizes=known_sizes)
        self.batch_sizes[key] = runner.batch_sizes
        return runner
