"""Stages: what differs between the models that the one loop trains."""

from __future__ import annotations

import torch

from bsq_ray import config
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.token_table import TokenSource
from bsq_ray.training.stages.masked_lm_stage import MaskedLMStage
from bsq_ray.training.stages.prior_stage import PriorStage
from bsq_ray.training.stages.stage import Stage
from bsq_ray.training.stages.tokenizer_stage import TokenizerStage

__all__ = ["Stage", "build_stage"]


def build_stage(
    run_config: config.AnyConfig, source: DataSource, device: torch.device, init_url: str | None = None
) -> Stage:
    """The stage that a configuration names, with its modules on the device.

    Args:
        init_url: folder of a tokenizer whose weights the stage's own tokenizer begins with.
    """
    if isinstance(run_config, config.TokenizerConfig):
        return TokenizerStage(run_config, device, init_url)
    assert isinstance(source, TokenSource)
    if isinstance(run_config, config.MaskedLMConfig):
        return MaskedLMStage(run_config, source, device)
    return PriorStage(run_config, source, device)
