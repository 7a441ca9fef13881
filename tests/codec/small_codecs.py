"""Models small enough to be made in every test of the codec, and a prior that calculates on another machine."""

import torch
from small_models import save_tokenizer

from bsq_ray import Prior, Tokenizer, config

PRIOR_CONFIG = config.PriorModelConfig(grid=(1, 4, 4), bits=10, sub_bits=5, width=32, layers=2, heads=2, dropout=0)


def save_prior(url, tokenizer_url, prior_config=PRIOR_CONFIG):
    """A prior's model folder with its tokenizer; sharp enough to have an opinion."""
    torch.manual_seed(0)
    prior = Prior(prior_config)
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(15)
    prior.save_pretrained(str(url))
    Tokenizer.from_pretrained(str(tokenizer_url)).save_pretrained(f"{url}/tokenizer")
    return str(url)


def save_codec(folder, prior_config=PRIOR_CONFIG):
    """Folder of a prior over 4 x 4 tokens of 10 bits."""
    return save_prior(folder, save_tokenizer(folder.parent / f"{folder.name}-tokenizer", 0), prior_config)


def save_nested_tokenizer(url, frames=1, keep=(4, 7, 10)):
    """A tokenizer of 4 x 4 tokens of 10 bits at 32 px, trained for these numbers of bits in name only."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "heads": 2}
    model_config = config.TokenizerModelConfig(
        image_size=32,
        frames=frames,
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=10, keep=keep),
    )
    tokenizer = Tokenizer(model_config)
    with torch.no_grad():
        tokenizer.decoder.head[-1].weight.mul_(5)
    tokenizer.save_pretrained(str(url))
    return str(url)


def save_nested_codec(folder):
    """Folder of a prior over planes of 2 bits; the tokenizer has 4, 8 and 10 nested bits."""
    tokenizer_url = save_nested_tokenizer(folder.parent / f"{folder.name}-tokenizer", keep=(4, 8, 10))
    return save_prior(folder, tokenizer_url, PRIOR_CONFIG.model_copy(update={"sub_bits": 2, "order": "plane"}))


class NoisyPrior(torch.nn.Module):
    """A prior on another machine: every logit differs by up to an amount, at random."""

    def __init__(self, prior, noise):
        super().__init__()
        self.prior, self.noise = prior, noise
        self.config, self.start = prior.config, prior.start

    def start_decoding(self, batch_size, num_tokens):
        return self.prior.start_decoding(batch_size, num_tokens)

    def start_plane_decoding(self, batch_size, num_tokens):
        return self.prior.start_plane_decoding(batch_size, num_tokens)

    def node_logits(self, h_BND, earlier_BNs):
        logits = self.prior.node_logits(h_BND, earlier_BNs).double()
        return logits + (torch.rand_like(logits) * 2 - 1) * self.noise


def save_clip_codec(folder):
    """Folder of a prior over clips of 4 frames of 2 x 2 tokens of 6 bits, at 16 px."""
    torch.manual_seed(0)
    transformer_config = config.TransformerConfig(width=32, layers=1, heads=2)
    prior_config = config.TokenizerModelConfig(
        image_size=16,
        frames=4,
        encoder=transformer_config,
        decoder=config.DecoderConfig(width=32, layers=1, heads=2, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=6),
    )
    tokenizer = Tokenizer(prior_config)
    for part in (tokenizer.encoder, tokenizer.decoder):
        torch.nn.init.normal_(part.transformer.temporal_position, std=0.02)
    tokenizer_url = folder.parent / f"{folder.name}-tokenizer"
    tokenizer.save_pretrained(str(tokenizer_url))
    prior = PRIOR_CONFIG.model_copy(update={"grid": (4, 2, 2), "bits": 6, "sub_bits": 3})
    return save_prior(folder, tokenizer_url, prior)


def save_minimal_codecs(folder):
    """Folders of priors over images and over clips of two frames: one token of 4 bits a frame, at 16 px."""
    urls = []
    for frames in (1, 2):
        torch.manual_seed(frames)
        sizes = {"width": 8, "layers": 1, "heads": 1}
        prior_config = config.TokenizerModelConfig(
            image_size=16,
            patch_size=16,
            frames=frames,
            encoder=config.TransformerConfig(**sizes),
            decoder=config.DecoderConfig(**sizes, head_hidden_dim=8),
            quantizer=config.BSQConfig(bits=4),
        )
        Tokenizer(prior_config).save_pretrained(f"{folder}/tokenizer-{frames}")
        prior = config.PriorModelConfig(grid=(frames, 1, 1), bits=4, sub_bits=2, dropout=0, **sizes)
        urls.append(save_prior(f"{folder}/prior-{frames}", f"{folder}/tokenizer-{frames}", prior))
    return urls
