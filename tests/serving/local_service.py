"""The service without Ray: the application and the replicas' classes in one process."""

import time

import torch

from bsq_ray import Tokenizer, config, model_folder
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.prior import Prior
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.registry import ROLES, ModelRegistry, ServedModel, model_kind
from bsq_ray.serving.replicas.deployments import replica_class


def save_models(folder):
    """Untrained models by name: a tokenizer of 8 x 8 tokens of 10 bits at 64 px, a prior and a masked LM on it."""
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
        "draws": MaskedLM(config.MaskedLMModelConfig(**tokens, classes=4)),
    }
    for name, model in models.items():
        model.save_pretrained(str(folder / name))
        if name != "small":
            tokenizer.save_pretrained(str(folder / name / "tokenizer"))
    return {name: str(folder / name) for name in models}


def save_video_models(folder):
    """Untrained models of 4 frames of 4 x 4 tokens of 10 bits at 32 px, by name; `whole` looks at later frames."""
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
        for name, causal in (("clips", True), ("whole", False))
    }  # fmt: skip
    models = tokenizers | {
        "clip-prior": Prior(config.PriorModelConfig(**tokens)),
        "moves": MaskedLM(config.MaskedLMModelConfig(**tokens, classes=2)),
    }
    for name, model in models.items():
        model.save_pretrained(str(folder / name))
    for name in ("clip-prior", "moves"):
        tokenizers["clips"].save_pretrained(str(folder / name / "tokenizer"))
    return {name: str(folder / name) for name in models}


class LocalReplicas:
    """A replica in this process, in place of a handle of Ray Serve."""

    def __init__(self, replica):
        self.replica = replica

    async def call(self, method, *arguments):
        return await getattr(self.replica, method)(*arguments)

    async def stream(self, method, *arguments):
        async for result in getattr(self.replica, method)(*arguments):
            yield result


def make_replicas(settings):
    """Replicas by model and role."""
    return {
        name: {
            role: replica_class(role)(url, settings) for role in ROLES[model_folder.load_model_folder_config(url).stage]
        }
        for name, url in settings.models.items()
    }


def make_app(settings, replicas, token_hash=None):
    """The application in front of replicas that are made already, as if it listened on loopback."""

    async def metrics():
        return "ray_serve_nothing 0\n"

    models = [
        ServedModel(
            name,
            model_kind(model_folder.load_model_folder_config(settings.models[name])),
            {k: LocalReplicas(v) for k, v in roles.items()},
        )
        for name, roles in replicas.items()
    ]
    return create_app(ModelRegistry(models), settings.limits, token_hash, True, metrics)


def wait_until_loaded(client):
    expires_at = time.monotonic() + 60
    while time.monotonic() < expires_at:
        if client.get("/healthz").status_code == 200:
            return
        time.sleep(0.02)
    raise AssertionError("the models were not loaded")
