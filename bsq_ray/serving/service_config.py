"""Configuration of the service: models, limits, and scaling of each kind of deployment."""

from __future__ import annotations

import os
import re

from pydantic import Field, model_validator

from bsq_ray.config.base import StrictModel

TOKEN_VARIABLE = "BSQ_RAY_TOKEN"
# Names of models appear in HTTP headers and in names of deployments.
MODEL_NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]+")
# Ray Serve's proxies do not receive the settings, so they read these two variables.
MAX_RESPONSE_MB_VARIABLE = "BSQ_RAY_MAX_RESPONSE_MB"
PREFETCH_BODIES_VARIABLE = "BSQ_RAY_PREFETCH_BODIES"


class Scaling(StrictModel):
    """Number of replicas of a deployment, and their CPUs.

    With `max_replicas` Ray Serve adds replicas up to that number while each has more than `target_ongoing_requests`
    requests in progress, and removes them when they are idle.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float = Field(4.0, gt=0)
    num_cpus: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _check_replica_range(self) -> Scaling:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class IngressScaling(Scaling):
    """The deployment that receives HTTP requests.

    Attributes:
        prefetch_bodies: a small body travels with its request. It saves about 3 ms per request and relies on a private
            part of Ray Serve.
    """

    num_cpus: float = Field(0.25, ge=0)
    prefetch_bodies: bool = True


class TorchScaling(Scaling):
    """A deployment that computes with PyTorch.

    Attributes:
        num_gpus: GPUs of a replica, also a fraction of one; 0 computes on the CPU.
        threads: threads of PyTorch; 0 is one per core of the node.
    """

    num_gpus: float = Field(0.0, ge=0)
    threads: int = Field(0, ge=0)

    @property
    def device(self) -> str:
        """Device of the models of a replica."""
        return "cuda" if self.num_gpus else "cpu"


class Batching(TorchScaling):
    """A deployment that computes requests in batches.

    Attributes:
        max_batch_size: maximum number of images in a batch.
        batch_wait_timeout_ms: time for which an incomplete batch waits for more requests. The next batch fills while
            one is computed, whatever this value is.
    """

    max_batch_size: int = Field(16, ge=1)
    batch_wait_timeout_ms: float = Field(0.0, ge=0)


class SharedReplicas(Batching):
    """Replicas that several small models share. A model is loaded by its first request and unloaded when it is idle.

    Attributes:
        min_models: models share replicas if there are at least this many small ones.
        max_model_mb: size of the weights of a small model, 1e6 bytes; 0 never shares replicas.
        max_num_models_per_replica: models in memory of a replica; a further one replaces the model that was idle for
            longest.
        model_idle_timeout_s: time after which a model without requests is unloaded.
    """

    min_models: int = Field(8, ge=2)
    max_model_mb: float = Field(100.0, ge=0)
    max_num_models_per_replica: int = Field(16, ge=1)
    model_idle_timeout_s: float = Field(600.0, gt=0)


class Limits(StrictModel):
    """Limits of a request; a request that exceeds one is rejected.

    Attributes:
        max_body_mb: size of one body.
        max_total_body_mb: size of all bodies in one ingress replica.
        max_pixels: pixels of an image or a frame, checked before it is decoded.
        max_video_pixels: pixels of all frames of a video. A frame counts as at least the model's square; with local
            attention, as its whole patches.
        max_ongoing_requests: requests in progress in one ingress replica, after their bodies have arrived.
        upload_timeout_s: time for the body to arrive.
        request_timeout_s: time for the response.
        max_steps: forward passes of a generated image.
        max_retries: attempts with another replica after a replica died.
    """

    max_body_mb: float = Field(32.0, gt=0)
    max_total_body_mb: float = Field(512.0, gt=0)
    max_pixels: int = Field(2**24, ge=1)
    max_video_pixels: int = Field(2**27, ge=1)
    max_ongoing_requests: int = Field(64, ge=1)
    upload_timeout_s: float = Field(30.0, gt=0)
    request_timeout_s: float = Field(120.0, gt=0)
    max_steps: int = Field(256, ge=1)
    max_retries: int = Field(2, ge=0)


class Settings(StrictModel):
    """The service.

    Attributes:
        models: model folders (paths or URLs) by the name that requests use.
        authentication: requests must carry the bearer token.
        tokenizer: replicas of a tokenizer, which is also a codec.
        codec: replicas of a prior.
        generator: replicas of a masked language model.
        shared: replicas of several small models.
    """

    models: dict[str, str]
    authentication: bool = True
    limits: Limits = Limits()
    ingress: IngressScaling = IngressScaling()
    tokenizer: Batching = Batching()
    codec: TorchScaling = TorchScaling()
    generator: Batching = Batching()
    shared: SharedReplicas = SharedReplicas()

    @model_validator(mode="after")
    def _check_models(self) -> Settings:
        if not self.models:
            raise ValueError("models: name at least one model folder")
        for name in self.models:
            if not MODEL_NAME_PATTERN.fullmatch(name):
                raise ValueError(
                    f"models: invalid model name '{name}'; use letters, digits, '.', '_' and '-' (NAME=FOLDER)"
                )
        return self


def token_from_environment() -> str:
    """Return the bearer token that requests must carry.

    Raises:
        ValueError: the variable is not set, or the token is too short.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < 16:
        raise ValueError(
            f"authentication is on, so {TOKEN_VARIABLE} must be a token of at least 16 characters on every node; "
            "create one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token
