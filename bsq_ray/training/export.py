"""The model folder that a run leaves: averaged weights, plain ones beside, and the other modules of the stage."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.training.run_spec import RunSpec

StateDict = dict[str, Tensor]


def write_model(
    spec: RunSpec,
    card_fields: dict[str, str],
    metrics: dict[str, float],
    weights: tuple[StateDict, StateDict | None],
    extra_modules: Mapping[str, StateDict],
    bundled_models: Mapping[str, str],
) -> None:
    """Writes `out/model`.

    Args:
        facts: lines of the model card.
        figures: what the published weights reach.
        weights: the published ones, and the plain ones if those are averaged.
        others: weights of the other modules, by name.
        companions: model folders to be copied into it, URL by name.
    """
    url = storage.join(spec.out_url, "model")
    card_fields = card_fields | ({"initialised from": spec.init_url} if spec.init_url else {})
    model_folder.write_model_folder(url, config.dump_config(spec.config), *weights, metrics, card_fields)
    for name, state in extra_modules.items():
        storage.write_bytes(storage.join(url, f"{name}.safetensors"), safetensors.torch.save(state))
    for name, bundled_url in bundled_models.items():
        storage.copy_folder(bundled_url, storage.join(url, name))
