"""A replica: one process with one model, or with several small ones that are loaded when they are used.

    request ─▶ ModelReplica ─model─▶ ServedRoles ─role─▶ TokenizerRole, CodecRole or GeneratorRole

The roles of a model share its weights and a process. PyTorch runs only in the two model threads of the replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from bsq_ray import config, model_folder
from bsq_ray.runtime.malloc import release_free_memory
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.replicas.codec_role import CodecRole
from bsq_ray.serving.replicas.generator_role import GeneratorRole
from bsq_ray.serving.replicas.model_cache import ModelCache
from bsq_ray.serving.replicas.model_metadata import stored_fields
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime
from bsq_ray.serving.replicas.tokenizer_role import TokenizerRole
from bsq_ray.serving.service_config import Limits, SharedReplicas, TorchScaling

_log = logging.getLogger("bsq_ray.serving")

ServedRoles = Mapping[str, TokenizerRole | CodecRole | GeneratorRole]


def load_roles(url: str, runtime: ReplicaRuntime) -> ServedRoles:
    """Load a model folder and return the roles of the model, by name.

    Raises:
        ValueError: the folder cannot be read.
    """
    run_config = model_folder.load_model_folder_config(url)
    if isinstance(run_config, config.TokenizerConfig):
        tokenizer = TokenizerRole(url, runtime)
        return {"tokenizer": tokenizer, "codec": CodecRole(url, runtime, tokenizer.tokenizer)}
    if isinstance(run_config, config.PriorConfig):
        return {"codec": CodecRole(url, runtime)}
    return {"generator": GeneratorRole(url, runtime)}


class ModelReplica:
    """Ray Serve deployment of one or several models.

    Args:
        model_urls: model folders by name.
        scaling: configuration of the replica; with `SharedReplicas` models are loaded when they are used.
        limits: limits of requests.
    """

    def __init__(self, model_urls: Mapping[str, str], scaling: TorchScaling, limits: Limits) -> None:
        self._model_urls, self._runtime = model_urls, ReplicaRuntime.create(scaling, limits)
        self._cache: ModelCache[ServedRoles] | None = None
        self._loaded: dict[str, ServedRoles] = {}
        if isinstance(scaling, SharedReplicas):
            self._cache = ModelCache(
                self._load,
                self._release_memory,
                max_models=scaling.max_num_models_per_replica,
                idle_timeout_s=scaling.model_idle_timeout_s,
            )
        else:
            self._loaded = {name: load_roles(url, self._runtime) for name, url in model_urls.items()}

    @property
    def loaded_models(self) -> list[str]:
        """Names of the models in memory."""
        return [*self._loaded, *(self._cache.names if self._cache else ())]

    async def call(self, model: str, role: str, method: str, *arguments: Any) -> Any:
        """Return the result of a method of a role; "metadata" needs no model in memory.

        Raises:
            ApiError: raised by the role; 503 the model cannot be loaded.
        """
        if method == "metadata" and self._cache is not None:
            return await asyncio.to_thread(stored_fields, self._model_urls[model])
        async with self._use(model) as roles:
            return await getattr(roles[role], method)(*arguments)

    async def stream(self, model: str, role: str, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """Yield the results of a generator method of a role.

        Raises:
            ApiError: as `call`.
        """
        async with self._use(model) as roles:
            async for result in getattr(roles[role], method)(*arguments):
                yield result

    @asynccontextmanager
    async def _use(self, model: str) -> AsyncIterator[ServedRoles]:
        if self._cache is None:
            yield self._loaded[model]
            return
        async with self._cache.use(model) as roles:
            yield roles

    async def _load(self, model: str) -> ServedRoles:
        try:
            return await asyncio.to_thread(load_roles, self._model_urls[model], self._runtime)
        except ValueError as error:
            _log.error("the model %s cannot be loaded", model, exc_info=error)
            raise ApiError(503, f"the model {model} cannot be loaded; see the log of the service", 10) from None

    def _release_memory(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, release_free_memory)
