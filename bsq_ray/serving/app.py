"""The Ray Serve application: which deployments there are, how they scale, and how they are joined.

`import_path: bsq_ray.serving.app:build` in a configuration of Ray Serve; its `args` are the keys of `Settings`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from bsq_ray import model_folder
from bsq_ray.config.loader import check_section
from bsq_ray.runtime.malloc import malloc_env
from bsq_ray.serving.http.admission import digest
from bsq_ray.serving.http.ingress import Front
from bsq_ray.serving.registry import ROLES, kind_of
from bsq_ray.serving.replicas.deployments import replica_class
from bsq_ray.serving.service_config import Batching, Computing, Scaling, Settings, token_from_environment


def build(args: dict[str, Any]) -> Application:
    """The application for a configuration of Ray Serve.

    Raises:
        ValueError: the settings are not valid, a model folder cannot be read, or the token is missing.
    """
    settings = check_section(args, [], Settings, "args of the application")
    token = token_from_environment() if settings.authentication else None
    # On which address Ray Serve listens is said elsewhere.
    return application(settings, token, loopback=False)


def application(settings: Settings, token: str | None, loopback: bool) -> Application:
    """The application.

    Args:
        token: what requests must carry; None admits everyone.
        loopback: whether only the machine that listens can reach the service.

    Raises:
        ValueError: a model folder cannot be read.
    """
    kinds = {name: kind_of(model_folder.load_model_folder_config(url)) for name, url in settings.models.items()}
    handles = {
        name: {role: _models(role, name, url, settings) for role in ROLES[kinds[name].stage]}
        for name, url in settings.models.items()
    }
    front = serve.deployment(Front, name="front", **options(settings.front, settings.limits.waiting * 8, settings))
    bound: Application = front.bind(settings, token and digest(token), loopback, kinds, handles)
    return bound


def _models(role: str, name: str, url: str, settings: Settings) -> Application:
    section: Computing = getattr(settings, role)
    # One batch is computed while the next one waits; a codec computes one request and has the next one's file at hand.
    ongoing = 2 * section.largest_batch if isinstance(section, Batching) else 2
    deployment = serve.deployment(replica_class(role), name=f"{role}-{name}", **options(section, ongoing, settings))
    bound: Application = deployment.bind(url, settings)
    return bound


def options(section: Scaling, ongoing: int, settings: Settings) -> dict[str, Any]:
    """A deployment's options; `ongoing` requests are at a replica at once, and a limited number waits before it."""
    gpus = section.gpus if isinstance(section, Computing) else 0
    on_cpu = isinstance(section, Computing) and section.device == "cpu"
    fixed: dict[str, Any] = {
        "max_ongoing_requests": ongoing,
        "max_queued_requests": settings.limits.waiting,
        "ray_actor_options": {
            "num_cpus": section.cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": malloc_env()} if on_cpu else {},
        },
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "health_check_period_s": 5,
    }
    if section.most_replicas is None:
        return fixed | {"num_replicas": section.replicas}
    scaling = AutoscalingConfig(
        min_replicas=section.replicas, max_replicas=section.most_replicas, target_ongoing_requests=section.queue
    )
    return fixed | {"autoscaling_config": scaling}
