"""The deployment that HTTP requests reach, and how it asks the replicas that hold the models.

    Ray Serve's proxy ─▶ Front (api.py) ─handle─▶ TokenizerReplica, CodecReplica, GeneratorReplica

Every request to a replica can be repeated: it depends on its arguments alone. So when a replica dies, those that it
was working on are given to another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from bsq_ray.serving.errors import ApiError, model_loading, too_many_requests
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.http.service_metrics import cluster_metrics
from bsq_ray.serving.registry import ModelKind, ModelRegistry, ServedModel
from bsq_ray.serving.service_config import Settings

_REPLICA_DIED = (RayActorError, ReplicaUnavailableError)


class ReplicaClient:
    """The replicas behind a handle of Ray Serve.

    Args:
        retries: how often a request is repeated after a replica has died under it.
    """

    def __init__(self, handle: DeploymentHandle, max_retries: int) -> None:
        self._handle, self._max_retries = handle, max_retries

    async def call(self, method: str, *arguments: Any) -> Any:
        """See `Replicas`.

        Raises:
            Refused: by the replica; 429 its queue is full; 503 there is none.
        """
        for attempt in range(self._max_retries + 1):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except _REPLICA_DIED:
                await self._backoff(attempt)
            except Exception as error:
                raise _to_api_error(error) from None
        raise model_loading("the model")

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """See `Replicas`; what was given already is not given again.

        Raises:
            Refused: as `call`.
        """
        num_yielded = 0
        for attempt in range(self._max_retries + 1):
            try:
                results = getattr(self._handle.options(stream=True), method).remote(*arguments)
                num_received = 0
                async for result in results:
                    num_received += 1
                    if num_received > num_yielded:
                        num_yielded = num_received
                        yield result
                return
            except _REPLICA_DIED:
                await self._backoff(attempt)
            except Exception as error:
                raise _to_api_error(error) from None
        raise model_loading("the model")

    async def _backoff(self, attempt: int) -> None:
        """Gives Ray Serve the time to notice that the replica is gone."""
        await asyncio.sleep(0.05 * 4**attempt)


@serve.ingress()
class Ingress:
    """The HTTP interface as a deployment.

    Args:
        token_digest, loopback: see `Guard`.
        kinds: what each model is.
        handles: by model and role.
    """

    def __init__(
        self,
        settings: Settings,
        token_hash: str | None,
        loopback_only: bool,
        kinds: Mapping[str, ModelKind],
        handles: Mapping[str, Mapping[str, DeploymentHandle]],
    ) -> None:
        self._settings, self._token_hash, self._loopback_only = settings, token_hash, loopback_only
        max_retries = settings.limits.max_retries
        self._models = [
            ServedModel(name, kinds[name], {role: ReplicaClient(handle, max_retries) for role, handle in roles.items()})
            for name, roles in handles.items()
        ]

    def __serve_build_asgi_app__(self) -> FastAPI:
        models, limits = ModelRegistry(self._models), self._settings.limits
        return create_app(models, limits, self._token_hash, self._loopback_only, cluster_metrics)


def _to_api_error(error: Exception) -> Exception:
    """What a failure of a replica means for the one who asked."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ApiError):
        return ApiError(*cause.args)
    if isinstance(error, BackPressureError):
        return too_many_requests()
    if isinstance(error, DeploymentUnavailableError):
        return model_loading("the model")
    return error
