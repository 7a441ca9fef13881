"""The models of a service, and who answers what: names, kinds, and which replicas can carry out a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bsq_ray import config
from bsq_ray.codec.container import read_header
from bsq_ray.serving.errors import Refused, loading
from bsq_ray.serving.media.video_io import is_clip

# What each role offers, as the last part of /v1/….
OFFERS = {
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


class Kind(NamedTuple):
    """What a model was trained as: the stage, and the frames that it sees at once, more than 1 if of clips."""

    stage: str
    frames: int


def kind_of(run: config.AnyConfig) -> Kind:
    """The kind of a model with this configuration."""
    return Kind(run.stage, run.model.frames if isinstance(run, config.TokenizerConfig) else run.model.grid[0])


@dataclass(eq=False)
class Model:
    """One model.

    Attributes:
        kind: what it was trained as.
        replicas: by role.
        facts: what the replicas say of themselves; empty until all are loaded.
    """

    name: str
    kind: Kind
    replicas: Mapping[str, Replicas]
    facts: dict[str, Any] = field(default_factory=dict)

    async def load(self) -> None:
        """Waits until the replicas of all roles answer."""
        found = await asyncio.gather(*(replicas.call("facts") for replicas in self.replicas.values()))
        self.facts = {name: value for facts in found for name, value in facts.items()}

    @property
    def offers(self) -> list[str]:
        """The requests it can carry out."""
        return [offer for role in self.replicas for offer in OFFERS[role]]

    def serving(self, offer: str) -> Replicas:
        """The replicas for a request.

        Raises:
            Refused: 503 they are not loaded yet.
        """
        if not self.facts:
            raise loading(f"the model {self.name}")
        return next(replicas for role, replicas in self.replicas.items() if offer in OFFERS[role])


class Models:
    """All models of a service."""

    def __init__(self, models: list[Model]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    @property
    def unloaded(self) -> list[str]:
        """Names of models that cannot answer yet."""
        return [model.name for model in self if not model.facts]

    def choose(self, offer: str, name: str | None) -> Model:
        """The model of that name or id, or the first one that can.

        Raises:
            Refused: 404 no model of that name, 422 it cannot do this.
        """
        able = [model for model in self if offer in model.offers]
        if name is None and able:
            return able[0]
        if name is None:
            raise Refused(404, f"no model here can {offer}")
        named = [model for model in self if name in (model.name, *map(model.facts.get, _IDS))]
        if not named:
            raise Refused(404, f"there is no model {name[:80]}; there are {', '.join(self._models)}")
        if not set(named) & set(able):
            raise Refused(422, f"the model {named[0].name} does not {offer}; {', '.join(named[0].offers)} it does")
        return next(model for model in named if model in able)

    def taker_of(self, data: bytes, offer: str, name: str | None) -> Model:
        """As `choose`, but without a name rather a model of clips for a video, and one of images for an image.

        Raises:
            Refused: as `choose`.
        """
        clip = is_clip(data)
        fitting = [model for model in self if offer in model.offers and (model.kind.frames > 1) == clip]
        return fitting[0] if name is None and fitting else self.choose(offer, name)

    def reader_of(self, data: bytes, name: str | None) -> Model:
        """The model that a .bsq file was written with.

        Raises:
            Refused: 415 not such a file, 422 damaged or of a model that is not here, 503 models are being loaded.
        """
        if data[:4] != b"BSQ1":
            raise Refused(415, "the body is not a .bsq file")
        if name is not None:
            return self.choose("decompress", name)
        try:
            header = read_header(data)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        wanted = header.tokenizer.hex(), header.prior.hex() if any(header.prior) else None
        for model in self:
            if "codec" in model.replicas:
                tokenizer, prior = (model.facts.get(key) for key in ("tokenizer_id", "prior_id"))
                if tokenizer and (tokenizer[:16], prior and prior[:16]) == wanted:
                    return model
        if self.unloaded:
            raise loading(f"the model {self.unloaded[0]}")
        raise Refused(422, f"the file was written with the model {wanted[1] or wanted[0]}, which is not served here")

    def described(self) -> list[dict[str, Any]]:
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


_IDS = ("tokenizer_id", "prior_id", "model_id")
