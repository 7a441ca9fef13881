"""Train a tokenizer and a prior on real photos for seconds, for tests that need trained models."""

from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

from bsq_ray import Prior, Tokenizer, config
from bsq_ray.data.transforms import to_float
from bsq_ray.models.prior import code_length
from bsq_ray.models.quantizers.bits import bits_to_integers
from bsq_ray.training.stages.nested_dropout import NestedDropout

SIDE = 64
_SIZES = {"width": 64, "layers": 2, "heads": 2}


def random_crops(photos, num_crops, rng):
    """Floats (count, 3, 64, 64) from anywhere in photos of 256 pixels."""
    images = []
    for _ in range(num_crops):
        photo = photos[rng.integers(len(photos))]
        left, top = (int(rng.integers(side - SIDE + 1)) for side in photo.size)
        images.append(np.asarray(photo)[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1))
    return to_float(torch.from_numpy(np.stack(images)))


def train(model, steps, learning_rate, compute_loss):
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20, 4 * (1 - step / steps))
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def train_tokenizer(photos, rng, steps, keep=()):
    """A tokenizer of 8 x 8 tokens of 18 bits at 64 px, trained on crops of photos of 256 pixels."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(
        config.TokenizerModelConfig(
            image_size=SIDE,
            encoder=config.TransformerConfig(**_SIZES),
            decoder=config.DecoderConfig(**_SIZES, head_hidden_dim=128),
            quantizer=config.BSQConfig(bits=18, keep=keep),
        )
    )
    dropout = NestedDropout(keep, 0, across_workers=True) if keep else None
    step_numbers = count()

    def reconstruction_loss():
        images = random_crops(photos, 8, rng)
        inputs = (None, *dropout.sample([8], next(step_numbers), torch.device("cpu"))) if dropout else ()
        out = tokenizer(images, *inputs)
        return F.l1_loss(out.images, images) + 0.02 * out.quantized.loss

    return train(tokenizer, steps, 3e-3, reconstruction_loss)


def save_trained(folder, photos, steps=300):
    """Model folder of a prior on 8 x 8 tokens of 18 bits at 64 px, with its tokenizer."""
    rng = np.random.default_rng(0)
    photos = [photo.resize((256, 256)) for photo in photos]
    tokenizer = train_tokenizer(photos, rng, steps)
    tokenizer.save_pretrained(f"{folder}/tokenizer")
    tokens = torch.cat([tokenizer.encode(random_crops(photos, 64, rng)).bits_BNL for _ in range(10)])
    sub_tokens_XNS = bits_to_integers(tokens, 9)
    prior = Prior(config.PriorModelConfig(grid=(1, 8, 8), bits=18, sub_bits=9, dropout=0, **_SIZES))

    def prior_loss():
        batch_BNS = sub_tokens_XNS[torch.from_numpy(rng.integers(len(sub_tokens_XNS), size=16))]
        return code_length(prior(batch_BNS), batch_BNS, 9).sum(2).mean() / 18

    train(prior, steps // 2, 3e-3, prior_loss).save_pretrained(str(folder))
    return str(folder)
