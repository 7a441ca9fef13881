"""The ingress as a client of replicas.

    ReplicaClient ─handle─▶ ModelReplica
          └─ replica died? wait, repeat with another one

Calls are idempotent: the result depends on the arguments alone. So a call whose replica dies is repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from bsq_ray.serving.errors import ApiError, model_loading_error, too_many_requests_error

_REPLICA_DIED = (RayActorError, ReplicaUnavailableError)


class ReplicaClient:
    """Calls a role of a model through the handle of its deployment.

    Args:
        model, role: names of the model and of the role.
        max_retries: how often a call is repeated after its replica died.
    """

    def __init__(self, handle: DeploymentHandle, model: str, role: str, max_retries: int) -> None:
        self._handle, self._target, self._max_retries = handle, (model, role), max_retries

    async def call(self, method: str, *arguments: Any) -> Any:
        """See `Replicas`.

        Raises:
            ApiError: raised by the replica; 429 its queue is full; 503 no replica is running.
        """
        for attempt in range(self._max_retries + 1):
            try:
                return await self._handle.call.remote(*self._target, method, *arguments)
            except _REPLICA_DIED:
                await self._backoff(attempt)
            except Exception as error:
                raise _to_api_error(error) from None
        raise model_loading_error("the model")

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """See `Replicas`; a repeated call skips the results that were already yielded.

        Raises:
            ApiError: as `call`.
        """
        num_yielded = 0
        for attempt in range(self._max_retries + 1):
            try:
                results: Any = self._handle.options(stream=True).stream.remote(*self._target, method, *arguments)
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
        raise model_loading_error("the model")

    async def _backoff(self, attempt: int) -> None:
        """Wait until Ray Serve has noticed that the replica died: 0.05 s, 0.2 s, 0.8 s …"""
        await asyncio.sleep(0.05 * 4**attempt)


def _to_api_error(error: Exception) -> Exception:
    """Convert an error of Ray Serve to the error for the client."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ApiError):
        return ApiError(*cause.args)
    if isinstance(error, BackPressureError):
        return too_many_requests_error()
    if isinstance(error, DeploymentUnavailableError):
        return model_loading_error("the model")
    return error
