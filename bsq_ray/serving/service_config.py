"""What can be set about the service: models, limits, and how each kind of deployment scales."""

from __future__ import annotations

import os
import re

from pydantic import Field, model_validator

from bsq_ray.config.tokenizer_config import StrictModel

TOKEN_VARIABLE = "BSQ_RAY_TOKEN"
# Read by Ray Serve's proxies, which know nothing of these settings: MB of answers that clients are reading.
MAX_RESPONSE_MB_VARIABLE = "BSQ_RAY_ANSWERS_MB"


class Scaling(StrictModel):
    """Replicas of a deployment and what each one takes.

    With `most_replicas` Ray Serve adds replicas up to that number while more than `queue` requests a replica are under
    way, and takes them away again.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float = Field(4.0, gt=0)
    num_cpus: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _check_replica_range(self) -> Scaling:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"most_replicas {self.max_replicas} is below replicas {self.min_replicas}")
        return self


class TorchScaling(Scaling):
    """A deployment that computes with PyTorch."""

    # Share of a GPU; 0 computes on the CPU.
    num_gpus: float = Field(0.0, ge=0)
    # Threads of PyTorch; 0 is one for each core of the machine.
    threads: int = Field(0, ge=0)

    @property
    def device(self) -> str:
        """Where the models of a replica live."""
        return "cuda" if self.num_gpus else "cpu"


class Batching(TorchScaling):
    """A deployment whose requests are computed together.

    Attributes:
        largest_batch: images of a batch.
        wait_ms: how long an incomplete batch waits for more; while one batch is computed the next one fills anyway.
    """

    max_batch_size: int = Field(16, ge=1)
    batch_wait_timeout_ms: float = Field(0.0, ge=0)


class Limits(StrictModel):
    """What a request may cost; beyond it is refused."""

    # Body of a request, and of all that one replica of the front holds.
    max_body_mb: float = Field(32.0, gt=0)
    max_total_body_mb: float = Field(512.0, gt=0)
    # Of an image or a frame, before it is decoded.
    max_pixels: int = Field(2**24, ge=1)
    # Of all frames of a video together, each counted as at least the model's square.
    max_video_pixels: int = Field(2**27, ge=1)
    # Requests under way in one replica of the front, their bodies arrived; the next one is told to come again later.
    max_ongoing_requests: int = Field(64, ge=1)
    # For the body to arrive, and for the answer.
    upload_timeout_s: float = Field(30.0, gt=0)
    request_timeout_s: float = Field(120.0, gt=0)
    # Forward passes of a generated image.
    max_steps: int = Field(256, ge=1)
    # How often a request is given to another replica after one has died.
    max_retries: int = Field(2, ge=0)


class Settings(StrictModel):
    """The service.

    Attributes:
        models: model folders (paths or URLs) by the name that requests use.
        authentication: whether requests need the bearer token.
    """

    models: dict[str, str]
    authentication: bool = True
    limits: Limits = Limits()
    ingress: Scaling = Scaling(num_cpus=0.25)
    tokenizer: Batching = Batching()
    codec: TorchScaling = TorchScaling()
    generator: Batching = Batching()

    @model_validator(mode="after")
    def _check_models(self) -> Settings:
        if not self.models:
            raise ValueError("models: name at least one model folder")
        for name in self.models:
            # Names stand in HTTP headers and in those of deployments.
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise ValueError(f"models: '{name}' is no name; use letters, digits, '.', '_' and '-' (NAME=FOLDER)")
        return self


def token_from_environment() -> str:
    """The bearer token that requests must carry.

    Raises:
        ValueError: it is not set, or too short to be one.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < 16:
        raise ValueError(
            f"authentication is on, so {TOKEN_VARIABLE} must hold a token of 16 characters or more on every machine: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
        )
    return token
