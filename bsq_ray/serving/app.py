"""The Ray Serve application: its deployments, their scaling, and how they are connected.

    ingress ─handles─▶ tokenizer-NAME, codec-NAME, generator-NAME     one deployment per model, with all of its roles
                    └▶ shared                                        one deployment of several small models

A Ray Serve configuration names `import_path: bsq_ray.serving.app:build`; its `args` are the keys of `Settings`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from bsq_ray.config.loader import validate_mapping
from bsq_ray.runtime.malloc import malloc_env
from bsq_ray.serving.deployment_plan import DeploymentPlan, ServicePlan, plan_service
from bsq_ray.serving.http.admission import hash_token
from bsq_ray.serving.http.ingress import Ingress
from bsq_ray.serving.replicas.model_replica import ModelReplica
from bsq_ray.serving.service_config import (
    Batching,
    Scaling,
    Settings,
    SharedReplicas,
    TorchScaling,
    token_from_environment,
)


def build(args: dict[str, Any]) -> Application:
    """Build the application of a Ray Serve configuration.

    Raises:
        ValueError: the settings are invalid, a model folder cannot be read, or the token is missing.
    """
    settings = validate_mapping(args, [], Settings, "args of the application")
    token = token_from_environment() if settings.authentication else None
    # The address to listen on is not part of `args`, so the Host header is not restricted to loopback.
    return application(settings, plan_service(settings), token=token, loopback_only=False)


def application(settings: Settings, plan: ServicePlan, *, token: str | None, loopback_only: bool) -> Application:
    """Build the application.

    Args:
        plan: deployments of the settings.
        token: bearer token that requests must carry; None accepts every request.
        loopback_only: only this node can reach the service.
    """
    handles: dict[str, Application] = {}
    for deployment in plan.deployments:
        bound_deployment = _bind_deployment(deployment, settings)
        handles |= dict.fromkeys(deployment.model_urls, bound_deployment)
    options = deployment_options(settings.ingress, settings.limits.max_ongoing_requests * 8, settings)
    ingress = serve.deployment(name="ingress", **options)(Ingress)
    ingress_app: Application = ingress.bind(
        settings,
        token_hash=token and hash_token(token),
        loopback_only=loopback_only,
        kinds=plan.kinds,
        handles=handles,
    )
    return ingress_app


def _bind_deployment(plan: DeploymentPlan, settings: Settings) -> Application:
    # A replica with batches computes one batch while the next one fills; its compressions run one after the other. A
    # codec of a prior computes one request while the file of the next one is already there.
    max_ongoing_requests = 2 * plan.scaling.max_batch_size if isinstance(plan.scaling, Batching) else 2
    options = deployment_options(plan.scaling, max_ongoing_requests, settings)
    deployment = serve.deployment(name=plan.name, **options)(ModelReplica)
    bound_deployment: Application = deployment.bind(plan.model_urls, plan.scaling, settings.limits)
    return bound_deployment


def deployment_options(scaling: Scaling, max_ongoing_requests: int, settings: Settings) -> dict[str, Any]:
    """Return the options of a deployment.

    Args:
        max_ongoing_requests: requests in one replica at a time; further ones wait in a queue of limited length.
    """
    num_gpus = scaling.num_gpus if isinstance(scaling, TorchScaling) else 0
    # Replicas that unload models return their memory to the kernel.
    keeps_memory = isinstance(scaling, TorchScaling) and not isinstance(scaling, SharedReplicas) and num_gpus == 0
    base_options: dict[str, Any] = {
        "max_ongoing_requests": max_ongoing_requests,
        "max_queued_requests": settings.limits.max_ongoing_requests,
        "ray_actor_options": {
            "num_cpus": scaling.num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": malloc_env()} if keeps_memory else {},
        },
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "health_check_period_s": 5,
    }
    if scaling.max_replicas is None:
        return base_options | {"num_replicas": scaling.min_replicas}
    autoscaling = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_ongoing_requests,
    )
    return base_options | {"autoscaling_config": autoscaling}
