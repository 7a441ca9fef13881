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

from bsq_ray.serving.errors import Refused, busy, loading
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.http.service_metrics import cluster_metrics
from bsq_ray.serving.registry import Kind, Model, Models
from bsq_ray.serving.service_config import Settings

_LOST = (RayActorError, ReplicaUnavailableError)


class RayReplicas:
    """The replicas behind a handle of Ray Serve.

    Args:
        retries: how often a request is repeated after a replica has died under it.
    """

    def __init__(self, handle: DeploymentHandle, retries: int) -> None:
        self._handle, self._retries = handle, retries

    async def call(self, method: str, *arguments: Any) -> Any:
        """See `Replicas`.

        Raises:
            Refused: by the replica; 429 its queue is full; 503 there is none.
        """
        for attempt in range(self._retries + 1):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except _LOST:
                await self._pause(attempt)
            except Exception as error:
                raise _refusal(error) from None
        raise loading("the model")

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """See `Replicas`; what was given already is not given again.

        Raises:
            Refused: as `call`.
        """
        given = 0
        for attempt in range(self._retries + 1):
            try:
                results = getattr(self._handle.options(stream=True), method).remote(*arguments)
                place = 0
                async for result in results:
                    place += 1
                    if place > given:
                        given = place
                        yield result
                return
            except _LOST:
                await self._pause(attempt)
            except Exception as error:
                raise _refusal(error) from None
        raise loading("the model")

    async def _pause(self, attempt: int) -> None:
        """Gives Ray Serve the time to notice that the replica is gone."""
        await asyncio.sleep(0.05 * 4**attempt)


@serve.ingress()
class Front:
    """The HTTP interface as a deployment.

    Args:
        token_digest, loopback: see `Guard`.
        kinds: what each model is.
        handles: by model and role.
    """

    def __init__(
        self,
        settings: Settings,
        token_digest: str | None,
        loopback: bool,
        kinds: Mapping[str, Kind],
        handles: Mapping[str, Mapping[str, DeploymentHandle]],
    ) -> None:
        self._settings, self._token_digest, self._loopback = settings, token_digest, loopback
        retries = settings.limits.retries
        self._models = [
            Model(name, kinds[name], {role: RayReplicas(handle, retries) for role, handle in roles.items()})
            for name, roles in handles.items()
        ]

    def __serve_build_asgi_app__(self) -> FastAPI:
        models, limits = Models(self._models), self._settings.limits
        return create_app(models, limits, self._token_digest, self._loopback, cluster_metrics)


def _refusal(error: Exception) -> Exception:
    """What a failure of a replica means for the one who asked."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, Refused):
        return Refused(*cause.args)
    if isinstance(error, BackPressureError):
        return busy()
    if isinstance(error, DeploymentUnavailableError):
        return loading("the model")
    return error
