"""Stages: the parts of training that differ between the models.

training.stage_class or the kind of the configuration ─▶ stage class ─▶ stage, with its modules on the device
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch

from bsq_ray import config
from bsq_ray.data.data_source import DataSource
from bsq_ray.models.warm_start import initial_discriminator, initial_weights
from bsq_ray.training.stages.masked_lm_stage import MaskedLMStage
from bsq_ray.training.stages.prior_stage import PriorStage
from bsq_ray.training.stages.stage import Stage
from bsq_ray.training.stages.tokenizer_stage import TokenizerStage

__all__ = ["Stage", "build_stage", "find_stage_class"]

_STAGE_CLASSES: dict[type[config.AnyConfig], Callable[..., Stage]] = {
    config.TokenizerConfig: TokenizerStage,
    config.MaskedLMConfig: MaskedLMStage,
    config.PriorConfig: PriorStage,
}


def build_stage(
    run_config: config.AnyConfig, source: DataSource, device: torch.device, init_url: str | None = None
) -> Stage:
    """Build the stage of a configuration, with its modules on the device.

    Args:
        init_url: model folder that initializes the first module and the discriminator, if both have one; only with a
            tokenizer configuration.

    Raises:
        ValueError: see `find_stage_class`; or the model folder does not fit.
    """
    stage = find_stage_class(run_config)(run_config, source, device, **run_config.training.stage_options)
    if init_url:
        assert isinstance(run_config, config.TokenizerConfig)
        main_module = next(iter(stage.modules.values()))
        main_module.load_state_dict(initial_weights(run_config.model, init_url))
        if "discriminator" in stage.modules:
            weights, reason = initial_discriminator(stage.modules["discriminator"], init_url)
            if weights is None:
                stage.notes = (reason,)
            else:
                stage.modules["discriminator"].load_state_dict(weights)
    return stage


def find_stage_class(run_config: config.AnyConfig) -> Callable[..., Stage]:
    """Return the class that `training.stage_class` names, by default the stage of the configuration's kind.

    Raises:
        ValueError: the name is malformed, cannot be imported, is not a subclass of `Stage`, or does not accept
            `training.stage_options`.
    """
    name = run_config.training.stage_class
    if name is None:
        return _STAGE_CLASSES[type(run_config)]
    module_name, separator, class_name = name.partition(":")
    if not module_name or not separator:
        raise ValueError(f"training.stage_class: '{name}' is malformed; write module:Class")
    try:
        stage_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"training.stage_class: cannot import '{name}' ({error}); install its package on every node, or add its "
            "folder to PYTHONPATH"
        ) from error
    if not (isinstance(stage_class, type) and issubclass(stage_class, Stage)):
        raise ValueError(f"training.stage_class: '{name}' is not a subclass of bsq_ray.training.stages.Stage")
    try:
        inspect.signature(stage_class).bind(run_config, None, None, **run_config.training.stage_options)
    except TypeError as error:
        raise ValueError(f"training.stage_options: {name}: {error}") from error
    return stage_class
