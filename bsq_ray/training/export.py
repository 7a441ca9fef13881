"""Export of a trained model: a folder with averaged weights, raw weights and the stage's other modules."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.training.engines.engine import Engine
from bsq_ray.training.measurement import Measurement
from bsq_ray.training.run_spec import RunSpec

StateDict = dict[str, Tensor]


def gather_weights(engines: Mapping[str, Engine]) -> dict[str, StateDict]:
    """Copy the complete state dict of every engine's module to the CPU, by name; collective."""
    states: dict[str, StateDict] = {}
    for name, engine in engines.items():
        with engine.gathered_parameters():
            states[name] = {key: value.detach().cpu().clone() for key, value in engine.module.state_dict().items()}
    return states


def write_model(
    spec: RunSpec,
    *,
    card_fields: dict[str, str],
    measurement: Measurement,
    weights: tuple[StateDict, StateDict | None],
    extra_modules: Mapping[str, StateDict],
    bundled_models: Mapping[str, str],
) -> None:
    """Write the model folder `out/model`.

    Args:
        card_fields: rows of the model card.
        measurement: evaluation of the published weights.
        weights: the published weights, and the raw ones if the published ones are averaged.
        extra_modules: weights of the other modules, by name.
        bundled_models: model folders to copy into it, URL by name.

    Raises:
        StorageUnavailableError: storage is unavailable; the call can be repeated.
    """
    url = storage.join(spec.out_url, "model")
    card_fields = card_fields | ({"initialized from": spec.init_url} if spec.init_url else {})
    model_folder.write_model_folder(
        url,
        config.dump_config(spec.config),
        *weights,
        measurement.metrics,
        card_fields,
        measurement.measured_on,
        spec.kept_tokens,
    )
    for name, state in extra_modules.items():
        storage.write_bytes(storage.join(url, f"{name}.safetensors"), safetensors.torch.save(state))
    for name, bundled_url in bundled_models.items():
        storage.copy_folder(bundled_url, storage.join(url, name))
