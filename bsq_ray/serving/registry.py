"""The models of a service: their names, capabilities and replicas, and the choice of a model for a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bsq_ray import config
from bsq_ray.codec.container import read_header
from bsq_ray.serving.errors import ApiError, model_loading_error
from bsq_ray.serving.media.video_io import is_video

# Capabilities of each role. Each is the last part of a path /v1/… and a method of the role's replicas.
CAPABILITIES = {
    "tokenizer": ("encode", "decode", "reconstruct"),
    "codec": ("compress", "decompress", "measure"),
    "generator": ("generate",),
}
# Roles that a model folder of each stage can have.
ROLES = {"tokenizer": ("tokenizer", "codec"), "prior": ("codec",), "masked-lm": ("generator",)}
_ID_KEYS = ("tokenizer_id", "prior_id", "model_id")


class Replicas(Protocol):
    """The replicas of one role of one model."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Return the result of a method of any replica."""

    def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """Yield the results of a generator method of any replica."""


class ModelKind(NamedTuple):
    """The training stage of a model and the frames of its input; more than 1 frame for a video model."""

    stage: str
    num_frames: int


def model_kind(run: config.AnyConfig) -> ModelKind:
    """Return the kind of a model with this configuration."""
    return ModelKind(run.stage, run.model.frames if isinstance(run, config.TokenizerConfig) else run.model.grid[0])


@dataclass(eq=False)
class ServedModel:
    """One model of the service.

    Attributes:
        kind: stage and frames.
        replicas: replicas by role.
        metadata: fields that the replicas report; empty until all roles are loaded.
    """

    name: str
    kind: ModelKind
    replicas: Mapping[str, Replicas]
    metadata: dict[str, Any] = field(default_factory=dict)

    async def load(self) -> None:
        """Wait until the replicas of all roles respond, and store their metadata."""
        results = await asyncio.gather(*(replicas.call("metadata") for replicas in self.replicas.values()))
        self.metadata = {name: value for fields in results for name, value in fields.items()}

    @property
    def capabilities(self) -> list[str]:
        """Requests that this model can carry out."""
        return [capability for role in self.replicas for capability in CAPABILITIES[role]]

    def replicas_for(self, capability: str) -> Replicas:
        """Return the replicas for a request.

        Raises:
            ApiError: 503 they are not loaded yet.
        """
        if not self.metadata:
            raise model_loading_error(f"the model {self.name}")
        return next(replicas for role, replicas in self.replicas.items() if capability in CAPABILITIES[role])


class ModelRegistry:
    """All models of a service, in the order of its configuration."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def loading(self) -> list[str]:
        """Names of models that are not loaded yet."""
        return [model.name for model in self if not model.metadata]

    def choose(self, capability: str, name: str | None) -> ServedModel:
        """Return the model with this name or ID, or without a name the first one with the capability.

        Raises:
            ApiError: 404 unknown model, 422 the model does not have the capability.
        """
        capable = [model for model in self if capability in model.capabilities]
        if name is None and capable:
            return capable[0]
        if name is None:
            raise ApiError(404, f"no model of this service can {capability}")
        matches = [model for model in self if name in (model.name, *map(model.metadata.get, _ID_KEYS))]
        if not matches:
            raise ApiError(404, f"unknown model {name[:80]}; available models: {', '.join(self._models)}")
        for model in matches:
            if model in capable:
                return model
        raise ApiError(
            422, f"the model {matches[0].name} cannot {capability}; it can {', '.join(matches[0].capabilities)}"
        )

    def model_for_upload(self, data: bytes, capability: str, name: str | None) -> ServedModel:
        """Choose as `choose`, but without a name prefer a video model for a video and an image model for an image.

        Raises:
            ApiError: as `choose`.
        """
        if name is not None:
            return self.choose(capability, name)
        is_video_upload = is_video(data)
        for model in self:
            if capability in model.capabilities and (model.kind.num_frames > 1) == is_video_upload:
                return model
        return self.choose(capability, None)

    def model_for_bsq(self, data: bytes, name: str | None) -> ServedModel:
        """Return the model that wrote a .bsq file.

        Raises:
            ApiError: 415 not a .bsq file, 422 damaged or written with an unknown model, 503 models are loading.
        """
        if data[:4] != b"BSQ1":
            raise ApiError(415, "the body is not a .bsq file")
        if name is not None:
            return self.choose("decompress", name)
        try:
            header = read_header(data)
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        for model in self:
            if "codec" in model.replicas:
                tokenizer, prior = (model.metadata.get(key) for key in ("tokenizer_id", "prior_id"))
                if tokenizer and header.is_written_with(bytes.fromhex(tokenizer), bytes.fromhex(prior or "")):
                    return model
        if self.loading:
            raise model_loading_error(f"the model {self.loading[0]}")
        raise ApiError(422, f"the file needs {header.models_text}, which this service does not have")

    def to_json(self) -> list[dict[str, Any]]:
        """Return the models of `GET /v1/models`."""
        return [
            {
                "name": model.name,
                "stage": model.kind.stage,
                "frames": model.kind.num_frames,
                "ready": bool(model.metadata),
                "capabilities": model.capabilities,
                **model.metadata,
            }
            for model in self
        ]
