"""The deployments of a service and the resources they need, before any of them starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bsq_ray import model_folder
from bsq_ray.model_folder import ModelHeader
from bsq_ray.serving.registry import ModelKind, model_kind
from bsq_ray.serving.service_config import Scaling, Settings, TorchScaling

SHARED_DEPLOYMENT = "shared"
# Key of the settings with the replicas of a model of each stage; also the prefix of the names of their deployments.
_SCALING_KEYS = {"tokenizer": "tokenizer", "prior": "codec", "masked-lm": "generator"}


@dataclass(frozen=True)
class DeploymentPlan:
    """A deployment of one model, or of several small ones.

    Attributes:
        name: name of the deployment.
        model_urls: model folders by the names of the models.
        scaling: number of replicas, and their resources.
    """

    name: str
    model_urls: Mapping[str, str]
    scaling: TorchScaling


@dataclass(frozen=True)
class ServicePlan:
    """The deployments of a service.

    Attributes:
        kinds: stage and frames by model.
        deployments: all deployments with models; the ingress is not among them.
    """

    kinds: Mapping[str, ModelKind]
    deployments: tuple[DeploymentPlan, ...]

    def resources(self, settings: Settings) -> dict[str, float]:
        """Return the CPUs and GPUs of the smallest number of replicas, by Ray's names."""
        scalings: list[Scaling] = [settings.ingress, *(deployment.scaling for deployment in self.deployments)]
        return {
            "CPU": sum(scaling.min_replicas * scaling.num_cpus for scaling in scalings),
            "GPU": sum(scaling.min_replicas * _num_gpus(scaling) for scaling in scalings),
        }


def plan_service(settings: Settings) -> ServicePlan:
    """Assign each model to a deployment, by the size of its weights.

    Raises:
        ValueError: a model folder cannot be read.
    """
    headers = {name: model_folder.read_model_header(url) for name, url in settings.models.items()}
    small = [name for name, header in headers.items() if header.num_bytes <= settings.shared.max_model_mb * 1e6]
    shared = small if len(small) >= settings.shared.min_models else []
    deployments = [_own_deployment(name, headers[name], settings) for name in headers if name not in shared]
    if shared:
        urls = {name: settings.models[name] for name in shared}
        deployments.append(DeploymentPlan(SHARED_DEPLOYMENT, urls, settings.shared))
    return ServicePlan({name: model_kind(header.config) for name, header in headers.items()}, tuple(deployments))


def missing_capacity(needed: Mapping[str, float], available: Mapping[str, float]) -> str:
    """Return a sentence about the resources that a service needs and a cluster does not have; empty if it has them.

    Args:
        needed, available: amounts by Ray's names of resources.
    """
    for resource in ("CPU", "GPU"):
        amount = available.get(resource, 0.0)
        # Fractions of resources do not add up exactly.
        if needed[resource] > amount + 1e-6:
            return (
                f"the service needs {needed[resource]:g} {resource}s and the cluster has {amount:g}; serve fewer "
                "models, let several small models share replicas (shared.min_models, shared.max_model_mb), or reduce "
                f"num_{resource.lower()}s of ingress, tokenizer, codec, generator or shared"
            )
    return ""


def _own_deployment(name: str, header: ModelHeader, settings: Settings) -> DeploymentPlan:
    key = _SCALING_KEYS[header.config.stage]
    return DeploymentPlan(f"{key}-{name}", {name: settings.models[name]}, getattr(settings, key))


def _num_gpus(scaling: Scaling) -> float:
    return scaling.num_gpus if isinstance(scaling, TorchScaling) else 0.0
