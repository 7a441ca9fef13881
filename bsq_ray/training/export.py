"""The model folder that a run leaves: averaged weights, plain ones beside, and the other modules of the stage."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.training.run_spec import Job

Weights = dict[str, Tensor]


def write_model(
    job: Job,
    facts: dict[str, str],
    figures: dict[str, float],
    weights: tuple[Weights, Weights | None],
    others: Mapping[str, Weights],
    companions: Mapping[str, str],
) -> None:
    """Writes `out/model`.

    Args:
        facts: lines of the model card.
        figures: what the published weights reach.
        weights: the published ones, and the plain ones if those are averaged.
        others: weights of the other modules, by name.
        companions: model folders to be copied into it, URL by name.
    """
    url = storage.join(job.out_url, "model")
    facts = facts | ({"initialised from": job.init_url} if job.init_url else {})
    model_folder.write_model_folder(url, config.dump_config(job.config), *weights, figures, facts)
    for name, state in others.items():
        storage.write_bytes(storage.join(url, f"{name}.safetensors"), safetensors.torch.save(state))
    for name, companion in companions.items():
        storage.copy_folder(companion, storage.join(url, name))
