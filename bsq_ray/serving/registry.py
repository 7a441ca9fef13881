"""The models of a service, and who answers what: names, kinds, and which replicas can carry out a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bsq_ray import config
from bsq_ray.codec.container import read_header
from bsq_ray.serving.errors import ApiError, model_loading
from bsq_ray.serving.media.video_io import is_video

# What each role offers, as the last part of /v1/….
CAPABILITIES = {
    "tokenizer": ("encode", "decode", "reconstruct"),
    "codec": ("compress", "decompress", "measure"),
    "generator": ("generate",),
}
# The roles that a model folder of each stage can play.
ROLES = {"tokenizer": ("tokenizer", "codec"), "prior": ("codec",), "masked-lm": ("generator",)}


class Replicas(Protocol):
    """The replicas that play one role of one model."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method, from whichever replica is free."""

    def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """The results of a method that has several, as they come."""


class ModelKind(NamedTuple):
    """What a model was trained as: the stage, and the frames that it sees at once, more than 1 if of clips."""

    stage: str
    num_frames: int


def model_kind(run: config.AnyConfig) -> ModelKind:
    """The kind of a model with this configuration."""
    return ModelKind(run.stage, run.model.frames if isinstance(run, config.TokenizerConfig) else run.model.grid[0])


@dataclass(eq=False)
class ServedModel:
    """One model.

    Attributes:
        kind: what it was trained as.
        replicas: by role.
        facts: what the replicas say of themselves; empty until all are loaded.
    """

    name: str
    kind: ModelKind
    replicas: Mapping[str, Replicas]
    metadata: dict[str, Any] = field(default_factory=dict)

    async def load(self) -> None:
        """Waits until the replicas of all roles answer."""
        results = await asyncio.gather(*(replicas.call("facts") for replicas in self.replicas.values()))
        self.metadata = {name: value for facts in results for name, value in facts.items()}

    @property
    def capabilities(self) -> list[str]:
        """The requests it can carry out."""
        return [offer for role in self.replicas for offer in CAPABILITIES[role]]

    def replicas_for(self, capability: str) -> Replicas:
        """The replicas for a request.

        Raises:
            Refused: 503 they are not loaded yet.
        """
        if not self.metadata:
            raise model_loading(f"the model {self.name}")
        return next(replicas for role, replicas in self.replicas.items() if capability in CAPABILITIES[role])


class ModelRegistry:
    """All models of a service."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    @property
    def loading(self) -> list[str]:
        """Names of models that cannot answer yet."""
        return [model.name for model in self if not model.facts]

    def choose(self, capability: str, name: str | None) -> ServedModel:
        """The model of that name or id, or the first one that can.

        Raises:
            Refused: 404 no model of that name, 422 it cannot do this.
        """
        capable = [model for model in self if capability in model.offers]
        if name is None and capable:
            return capable[0]
        if name is None:
            raise ApiError(404, f"no model here can {capability}")
        matches = [model for model in self if name in (model.name, *map(model.facts.get, _ID_KEYS))]
        if not matches:
            raise ApiError(404, f"there is no model {name[:80]}; there are {', '.join(self._models)}")
        if not set(matches) & set(capable):
            raise ApiError(
                422, f"the model {matches[0].name} does not {capability}; {', '.join(matches[0].offers)} it does"
            )
        return next(model for model in matches if model in capable)

    def model_for_upload(self, data: bytes, capability: str, name: str | None) -> ServedModel:
        """As `choose`, but without a name rather a model of clips for a video, and one of images for an image.

        Raises:
            Refused: as `choose`.
        """
        is_video_upload = is_video(data)
        matching = [
            model for model in self if capability in model.offers and (model.kind.frames > 1) == is_video_upload
        ]
        return matching[0] if name is None and matching else self.choose(capability, name)

    def model_for_bsq(self, data: bytes, name: str | None) -> ServedModel:
        """The model that a .bsq file was written with.

        Raises:
            Refused: 415 not such a file, 422 damaged or of a model that is not here, 503 models are being loaded.
        """
        if data[:4] != b"BSQ1":
            raise ApiError(415, "the body is not a .bsq file")
        if name is not None:
            return self.choose("decompress", name)
        try:
            header = read_header(data)
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        required_ids = header.tokenizer.hex(), header.prior.hex() if any(header.prior) else None
        for model in self:
            if "codec" in model.replicas:
                tokenizer, prior = (model.facts.get(key) for key in ("tokenizer_id", "prior_id"))
                if tokenizer and (tokenizer[:16], prior and prior[:16]) == required_ids:
                    return model
        if self.loading:
            raise model_loading(f"the model {self.loading[0]}")
        raise ApiError(
            422, f"the file was written with the model {required_ids[1] or required_ids[0]}, which is not served here"
        )

    def to_json(self) -> list[dict[str, Any]]:
        """What `GET /v1/models` says."""
        return [
            {
                "name": model.name,
                "stage": model.kind.stage,
                "frames": model.kind.frames,
                "ready": bool(model.facts),
                "offers": model.offers,
                **model.facts,
            }
            for model in self
        ]


_ID_KEYS = ("tokenizer_id", "prior_id", "model_id")
