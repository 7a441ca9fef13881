"""The Ray Serve application: which deployments there are, how they scale, and how they are joined.

`import_path: bsq_ray.serving.app:build` in a configuration of Ray Serve; its `args` are the keys of `Settings`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from bsq_ray import model_folder
from bsq_ray.config.loader import validate_mapping
from bsq_ray.runtime.malloc import malloc_env
from bsq_ray.serving.http.admission import hash_token
from bsq_ray.serving.http.ingress import Ingress
from bsq_ray.serving.registry import ROLES, model_kind
from bsq_ray.serving.replicas.deployments import replica_class
from bsq_ray.serving.service_config import Batching, Scaling, Settings, TorchScaling, token_from_environment


def build(args: dict[str, Any]) -> Application:
    """The application for a configuration of Ray Serve.

    Raises:
        ValueError: the settings are not valid, a model folder cannot be read, or the token is missing.
    """
    settings = validate_mapping(args, [], Settings, "args of the application")
    token = token_from_environment() if settings.authentication else None
    # On which address Ray Serve listens is said elsewhere.
    return application(settings, token, loopback_only=False)


def application(settings: Settings, token: str | None, loopback_only: bool) -> Application:
    """The application.

    Args:
        token: what requests must carry; None admits everyone.
        loopback: whether only the machine that listens can reach the service.

    Raises:
        ValueError: a model folder cannot be read.
    """
    model_kinds = {
        name: model_kind(model_folder.load_model_folder_config(url)) for name, url in settings.models.items()
    }
    handles = {
        name: {role: _bind_deployment(role, name, url, settings) for role in ROLES[model_kinds[name].stage]}
        for name, url in settings.models.items()
    }
    ingress = serve.deployment(
        Ingress,
        name="front",
        **deployment_options(settings.ingress, settings.limits.max_ongoing_requests * 8, settings),
    )
    ingress_app: Application = ingress.bind(settings, token and hash_token(token), loopback_only, model_kinds, handles)
    return ingress_app


def _bind_deployment(role: str, name: str, url: str, settings: Settings) -> Application:
    role_config: TorchScaling = getattr(settings, role)
    # One batch is computed while the next one waits; a codec computes one request and has the next one's file at hand.
    max_ongoing_requests = 2 * role_config.max_batch_size if isinstance(role_config, Batching) else 2
    deployment = serve.deployment(
        replica_class(role), name=f"{role}-{name}", **deployment_options(role_config, max_ongoing_requests, settings)
    )
    bound_deployment: Application = deployment.bind(url, settings)
    return bound_deployment


def deployment_options(config: Scaling, max_ongoing_requests: int, settings: Settings) -> dict[str, Any]:
    """A deployment's options; `ongoing` requests are at a replica at once, and a limited number waits before it."""
    num_gpus = config.num_gpus if isinstance(config, TorchScaling) else 0
    is_cpu_model = isinstance(config, TorchScaling) and config.device == "cpu"
    base_options: dict[str, Any] = {
        "max_ongoing_requests": max_ongoing_requests,
        "max_queued_requests": settings.limits.max_ongoing_requests,
        "ray_actor_options": {
            "num_cpus": config.num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": malloc_env()} if is_cpu_model else {},
        },
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "health_check_period_s": 5,
    }
    if config.max_replicas is None:
        return base_options | {"num_replicas": config.min_replicas}
    autoscaling = AutoscalingConfig(
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        target_ongoing_requests=config.target_ongoing_requests,
    )
    return base_options | {"autoscaling_config": autoscaling}
