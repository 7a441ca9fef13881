"""The service without Ray: the application and its replicas in one process."""

import io
import time

import torch

from bsq_ray import Tokenizer, config, model_folder
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.prior import Prior
from bsq_ray.serving.deployment_plan import plan_service
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.registry import ModelRegistry, ServedModel, model_kind
from bsq_ray.serving.replicas.model_replica import load_roles
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime


def save_models(folder):
    """Save untrained models: a tokenizer (64 px, 8 x 8 tokens of 10 bits), a prior and a masked LM."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "heads": 2}
    tokenizer = Tokenizer(
        config.TokenizerModelConfig(
            image_size=64,
            encoder=config.TransformerConfig(**sizes),
            decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
            quantizer=config.BSQConfig(bits=10),
        )
    )
    tokens = {"grid": [1, 8, 8], "bits": 10, "sub_bits": 5, **sizes}
    models = {
        "small": tokenizer,
        "prior": Prior(config.PriorModelConfig(**tokens)),
        "generator": MaskedLM(config.MaskedLMModelConfig(**tokens, num_classes=4)),
    }
    for name, model in models.items():
        model.save_pretrained(str(folder / name))
        if name != "small":
            tokenizer.save_pretrained(str(folder / name / "tokenizer"))
    return {name: str(folder / name) for name in models}


def save_video_models(folder):
    """Save untrained video models (4 frames, 32 px, 4 x 4 tokens of 10 bits), causal but for `noncausal`."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "heads": 2}
    tokens = {"grid": [4, 4, 4], "bits": 10, "sub_bits": 5, **sizes}
    tokenizers = {
        name: Tokenizer(
            config.TokenizerModelConfig(
                image_size=32, frames=4, causal=causal, encoder=config.TransformerConfig(**sizes),
                decoder=config.DecoderConfig(**sizes, head_hidden_dim=32), quantizer=config.BSQConfig(bits=10),
            )
        )
        for name, causal in (("clips", True), ("noncausal", False))
    }  # fmt: skip
    models = tokenizers | {
        "clip-prior": Prior(config.PriorModelConfig(**tokens)),
        "video-generator": MaskedLM(config.MaskedLMModelConfig(**tokens, num_classes=2)),
    }
    for name, model in models.items():
        model.save_pretrained(str(folder / name))
    for name in ("clip-prior", "video-generator"):
        tokenizers["clips"].save_pretrained(str(folder / name / "tokenizer"))
    return {name: str(folder / name) for name in models}


class LocalReplicas:
    """A replica in this process, in place of a `ReplicaClient`."""

    def __init__(self, replica):
        self.replica = replica

    async def call(self, method, *arguments):
        return await getattr(self.replica, method)(*arguments)

    async def stream(self, method, *arguments):
        async for result in getattr(self.replica, method)(*arguments):
            yield result


def make_replicas(settings):
    """Return replicas by model and role."""
    return {
        name: load_roles(url, ReplicaRuntime.create(plan.scaling, settings.limits))
        for plan in plan_service(settings).deployments
        for name, url in plan.model_urls.items()
    }


def make_app(settings, replicas, token_hash=None):
    """Return the application for existing replicas, as if it listened on loopback."""

    async def metrics():
        return "ray_serve_nothing 0\n"

    models = [
        ServedModel(
            name,
            model_kind(model_folder.load_model_folder_config(settings.models[name])),
            {role: LocalReplicas(replica) for role, replica in roles.items()},
        )
        for name, roles in replicas.items()
    ]
    return create_app(
        ModelRegistry(models), settings.limits, token_hash=token_hash, loopback_only=True, collect_metrics=metrics
    )


def encode_image(image, image_format="PNG", **options):
    """Return the image as a file of this format."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def wait_until_loaded(client):
    expires_at = time.monotonic() + 60
    while time.monotonic() < expires_at:
        if client.get("/healthz").status_code == 200:
            return
        time.sleep(0.02)
    raise AssertionError("the models did not load in time")
