"""Metrics of an evaluation during training, together with what they were measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bsq_ray import config, model_folder

# Samples that training does not see, or training samples if there are no others.
Split = Literal["held_out", "train"]
_SPLIT_TEXTS = {"held_out": "held-out", "train": "training"}


@dataclass(frozen=True)
class Measurement:
    """Metrics of an evaluation and their provenance.

    Attributes:
        metrics: values by name; each name starts with the split, such as "held_out/psnr".
        split: origin of the samples.
        data_url: URL of the data set.
        data_hash: SHA-256 of the data set.
        num_samples: number of samples over all workers.
        unit: name of a sample, plural.
        precision: precision of the forward passes.
        weights: kind of the evaluated weights.
    """

    metrics: dict[str, float]
    split: Split
    data_url: str
    data_hash: str
    num_samples: int
    unit: str
    precision: str
    weights: model_folder.WeightsKind

    @property
    def measured_on(self) -> str:
        """Samples, data set, precision and weights in words."""
        return (
            f"{self.num_samples} {_SPLIT_TEXTS[self.split]} {self.unit} of {self.data_url} "
            f"({self.data_hash[:12]}), {self.precision}, {'averaged' if self.weights == 'ema' else 'raw'} weights"
        )


def sample_unit(run_config: config.AnyConfig) -> str:
    """Return the name of a sample of this run, plural."""
    model = run_config.model
    num_frames = model.frames if isinstance(model, config.TokenizerModelConfig) else model.grid[0]
    return "images" if num_frames == 1 else "clips"


def format_evaluation(record: dict[str, object]) -> str:
    """Format an evaluation record as a line: metrics, number of samples, split, precision and weights."""
    split = str(record["split"])
    metrics_text = "  ".join(f"{key} {value:.4g}" for key, value in record.items() if key.startswith(f"{split}/"))
    weights_text = ", averaged weights" if record["weights"] == "ema" else ""
    return (
        f"step {record['step']}  {metrics_text}  on {record['samples']} {_SPLIT_TEXTS[split]} {record['unit']}, "
        f"{record['precision']}{weights_text}"
    )
