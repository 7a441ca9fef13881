"""Generate images of a class, watch one being generated step by step, and interpolate between two classes.

    python examples/06_generate.py quickstart-generate/masked-lm/model --label 3 --to 7

The same seed gives the same image, alone or in a batch.
"""

import argparse

import torch
from PIL import Image

from bsq_ray import Generator


def save_row(path: str, images_BCHW: torch.Tensor) -> None:
    """Write images in [-1, 1] next to each other."""
    row_CHW = torch.cat(list(images_BCHW), dim=2)
    pixels_HWC = ((row_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels_HWC).save(path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder, URL or hub id of a masked language model")
    parser.add_argument("--label", type=int, default=0)
    parser.add_argument("--to", type=int, default=1, help="class at the end of the interpolation")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.model, device=arguments.device)

    images_BCHW = generator.generate([arguments.label] * arguments.num_images, seed=0, steps=arguments.steps)
    save_row("generated.png", images_BCHW)

    # Tokens that are still masked are gray.
    steps = list(generator.iter_steps([arguments.label], seed=0, steps=arguments.steps))
    save_row("steps.png", torch.cat(steps))

    between_BCHW = generator.interpolate(
        [arguments.label, arguments.to], arguments.num_images, seed=0, steps=arguments.steps
    )
    save_row("interpolation.png", between_BCHW)


if __name__ == "__main__":
    main()
