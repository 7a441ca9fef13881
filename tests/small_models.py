"""Untrained models small enough to be made in every test."""

import torch

from bsq_ray import Tokenizer, config


def save_tokenizer(url, seed, frames=1):
    """A tokenizer of 4 x 4 tokens of 10 bits at 32 px, for images or clips, as a model folder."""
    torch.manual_seed(seed)
    sizes = config.Decoder(width=32, layers=1, heads=2, head_width=32)
    section = config.TokenizerModel(
        image_size=32,
        frames=frames,
        encoder=config.Transformer(width=32, layers=1, heads=2),
        decoder=sizes,
        quantizer=config.BSQ(bits=10),
    )
    Tokenizer(section).save_pretrained(str(url))
    return str(url)
