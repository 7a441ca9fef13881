"""Untrained models small enough to be made in every test."""

import torch

from bsq_ray import Tokenizer, config, model_folder
from bsq_ray.model_ids import KeptTokens


def save_tokenizer(url, seed, frames=1, **model_changes):
    """A tokenizer of 4 x 4 tokens of 10 bits at 32 px, for images or clips, as a model folder."""
    torch.manual_seed(seed)
    decoder_config = config.DecoderConfig(width=32, layers=1, heads=2, head_hidden_dim=32)
    model_config = config.TokenizerModelConfig(
        image_size=32,
        frames=frames,
        encoder=config.TransformerConfig(width=32, layers=1, heads=2),
        decoder=decoder_config,
        **({"quantizer": config.BSQConfig(bits=10)} | model_changes),
    )
    Tokenizer(model_config).save_pretrained(str(url))
    return str(url)


def save_any_size(url, frames=1, causal=True):
    """A tokenizer for any size: patches of 8 px, 10 bits; all weights are large enough to have an effect."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "heads": 2}
    tokenizer = Tokenizer(
        config.TokenizerModelConfig(
            image_size=64,
            frames=frames,
            causal=causal,
            position="rotary",
            attention_radius=2,
            position_period=4,
            encoder=config.TransformerConfig(**sizes),
            decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
            quantizer=config.BSQConfig(bits=10),
        )
    )
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer.save_pretrained(str(url))
    return str(url)


def retrain_decoder(url, out):
    """A tokenizer with the tokens of the model folder `url` and another decoder, as a model folder."""
    folder = model_folder.load_model_folder(url)
    weights = {
        name: value + 0.02 if name.startswith("decoder.head") else value for name, value in folder.weights.items()
    }
    kept_tokens = KeptTokens(folder.tokens_id, (folder.model_id, *folder.same_tokens))
    text = config.dump_config(folder.config)
    model_folder.write_model_folder(str(out), text, weights, kept_tokens=kept_tokens)
    return str(out)
