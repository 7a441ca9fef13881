"""Random weights of DINO ViT-S/8 by their published names."""

import torch

WIDTH, DEPTH, PATCH = 384, 12, 8


def random_dino_weights(side=28):
    """Return weights for a grid of `side` x `side` positions."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return 0.05 * torch.randn(*shape, generator=generator)

    weights = {"cls_token": values(1, 1, WIDTH), "pos_embed": values(1, 1 + side**2, WIDTH)}
    weights |= {"patch_embed.proj.weight": values(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": values(WIDTH)}
    sizes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for index in range(DEPTH):
        for norm in ("norm1", "norm2"):
            weights[f"blocks.{index}.{norm}.weight"] = 1 + values(WIDTH)
            weights[f"blocks.{index}.{norm}.bias"] = values(WIDTH)
        for layer, (rows, columns) in sizes.items():
            weights[f"blocks.{index}.{layer}.weight"] = values(rows * WIDTH, columns * WIDTH)
            weights[f"blocks.{index}.{layer}.bias"] = values(rows * WIDTH)
    return weights | {"norm.weight": values(WIDTH), "norm.bias": values(WIDTH)}
