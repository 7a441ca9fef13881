"""Train a tokenizer with a quantizer of your own, and one with BSQ on the same images.

    python examples/03_custom_quantizer.py photos 300

It keeps the sign of tanh(v) instead of v / |v|. CONTRIBUTING.md explains how to add one to the package.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bsq_ray import Tokenizer, config
from bsq_ray.models.quantizers.quantizer import Quantized, Quantizer, straight_through

SMALL = ["model.encoder.width=128", "model.encoder.layers=2", "model.decoder.width=128", "model.decoder.layers=2"]


class TanhQuantizer(Quantizer):
    """Keep the sign of tanh(v); codes are -1 and 1."""

    bits = channels = 18

    def quantize(self, v_BNC: Tensor) -> Quantized:
        u_BNC = torch.tanh(v_BNC)
        codes_BNC = self.dequantize(u_BNC >= 0)
        penalty = 0.25 * (u_BNC - codes_BNC).square().mean()
        return Quantized(straight_through(codes_BNC, u_BNC), u_BNC >= 0, penalty, {})

    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        return bits_BNL.float() * 2 - 1


def train(tokenizer: Tokenizer, images_BCHW: Tensor, steps: int) -> float:
    """Train on batches of 16 images; return the PSNR in dB."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-3)
    for _ in range(steps):
        batch_BCHW = images_BCHW[torch.randint(len(images_BCHW), (16,))]
        output_BCHW, quantized = tokenizer(batch_BCHW)
        optimizer.zero_grad()
        ((output_BCHW - batch_BCHW).abs().mean() + 0.02 * quantized.loss).backward()
        optimizer.step()
    return float(-10 * ((tokenizer.reconstruct(images_BCHW) - images_BCHW) / 2).square().mean().log10())


if __name__ == "__main__":
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    files = sorted(folder.glob("*.[jp][pn]g"))
    images_BHWC = np.stack([np.array(ImageOps.fit(Image.open(path).convert("RGB"), (64, 64))) for path in files])
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    for quantizer in (None, TanhQuantizer()):
        torch.manual_seed(0)
        tokenizer = Tokenizer(config.load_config("demo", SMALL).model)
        tokenizer.quantizer = quantizer or tokenizer.quantizer  # its bits and channels are those of the preset
        print(f"{type(tokenizer.quantizer).__name__}: PSNR {train(tokenizer, images_BCHW, steps):.2f} dB")
