"""The deployment that receives HTTP requests.

Ray Serve's proxy ─▶ Ingress (api.py) ─▶ ReplicaClient ─handle─▶ replicas of each model
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.http.replica_client import ReplicaClient
from bsq_ray.serving.http.service_metrics import cluster_metrics
from bsq_ray.serving.registry import ROLES, ModelKind, ModelRegistry, ServedModel
from bsq_ray.serving.service_config import Settings


# Documented in `serve.ingress`: without an argument, each replica builds its app after the constructor. A builder
# function as argument would not receive the settings and handles, which reach a replica only through its constructor.
@serve.ingress()
class Ingress:
    """Ray Serve deployment of the HTTP API.

    Args:
        token_hash, loopback_only: see `AdmissionControl`.
        kinds: stage and frames by model.
        handles: deployment handles by model.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        token_hash: str | None,
        loopback_only: bool,
        kinds: Mapping[str, ModelKind],
        handles: Mapping[str, DeploymentHandle],
    ) -> None:
        self._settings, self._token_hash, self._loopback_only = settings, token_hash, loopback_only
        max_retries = settings.limits.max_retries
        self._registry = ModelRegistry(
            [
                ServedModel(
                    name,
                    kind,
                    {role: ReplicaClient(handles[name], name, role, max_retries) for role in ROLES[kind.stage]},
                )
                for name, kind in kinds.items()
            ]
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self._registry,
            self._settings.limits,
            token_hash=self._token_hash,
            loopback_only=self._loopback_only,
            collect_metrics=cluster_metrics,
            prefetch_bodies=self._settings.ingress.prefetch_bodies,
        )
