"""Encode an image into binary tokens, write them as bytes, and decode them.

    python examples/01_encode_decode.py quickstart/run/model photo.png --out reconstruction.png

Writes the reconstruction, and the tokens next to it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from bsq_ray import Tokenizer
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokens


def load_image(path: str, size: int) -> torch.Tensor:
    """Read an image as floats (1, 3, size, size) in [-1, 1], cropped to a square around its center."""
    image = ImageOps.fit(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), (size, size))
    pixels_HWC = np.array(image)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 127.5 - 1


def save_image(path: str, images_BCHW: torch.Tensor) -> None:
    """Write the first image of a batch in [-1, 1]."""
    pixels_HWC = ((images_BCHW[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels_HWC).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder, URL or hub id of a tokenizer")
    parser.add_argument("image")
    parser.add_argument("--out", default="reconstruction.png")
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_pretrained(arguments.model)
    images_BCHW = load_image(arguments.image, tokenizer.config.image_size)
    tokens = tokenizer.encode(images_BCHW)
    length = tokens.bits_BNL.shape[-1]
    print(f"grid {tokens.grid}, {length} bits per token, first token {tokens.bits_BNL[0, 0].int().tolist()}")

    # Each token takes ceil(L / 8) bytes; the .bsq codec packs tighter and models the probabilities of the bits.
    packed = pack_bits(tokens.bits_BNL)
    Path(arguments.out).with_suffix(".tokens").write_bytes(packed.numpy().tobytes())

    restored = Tokens(unpack_bits(packed, length), tokens.grid)
    reconstruction_BCHW = tokenizer.decode(restored)
    save_image(arguments.out, reconstruction_BCHW)
    mse = (reconstruction_BCHW - images_BCHW).square().mean() / 4
    print(f"{packed.numel()} bytes, PSNR {-10 * mse.log10():.2f} dB")


if __name__ == "__main__":
    main()
