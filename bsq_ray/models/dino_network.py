"""DINO ViT-S/8 (Caron et al., ICCV 2021), frozen: feature maps of images.

    image ─normalize─▶ patches of 8 x 8 ─▶ + positions ─▶ 12 blocks ─▶ taps: patch embeddings, blocks 2, 5, 8 and 11

The published weights are not part of a package; they are read from a file.

Shape suffixes: B images, C channels, H and W pixels, N tokens (the class token and P positions), D width, h and w rows
and columns of patches, A attention heads.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import storage
from bsq_ray.runtime.wrong_files import describe_wrong_binary

DINO_WIDTH, DINO_DEPTH, DINO_HEADS, DINO_PATCH_SIZE = 384, 12, 6, 8
# Blocks whose outputs are feature maps, from 0; the patch embeddings are another one.
DINO_TAPS = (2, 5, 8, 11)
_NORM_EPS = 1e-6
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EXPECTED = "weights of DINO ViT-S/8 by their published names (patch_embed.proj.weight, blocks.0.attn.qkv.weight, …)"
_REMEDY = (
    "set loss.adversarial.features_weights to dino_deitsmall8_pretrain.pth of github.com/facebookresearch/dino, or to "
    "its tensors as .safetensors"
)


class DINOAttention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DINO_WIDTH, 3 * DINO_WIDTH)
        self.proj = nn.Linear(DINO_WIDTH, DINO_WIDTH)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        qkv = self.qkv(x_BND).unflatten(2, (3, DINO_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended_BAND = F.scaled_dot_product_attention(*qkv.unbind(0))
        return cast(Tensor, self.proj(attended_BAND.transpose(1, 2).flatten(2)))


class DINOMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DINO_WIDTH, 4 * DINO_WIDTH)
        self.fc2 = nn.Linear(4 * DINO_WIDTH, DINO_WIDTH)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x_BND))))


class DINOBlock(nn.Module):
    """Transformer block with norms before attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DINO_WIDTH, eps=_NORM_EPS)
        self.attn = DINOAttention()
        self.norm2 = nn.LayerNorm(DINO_WIDTH, eps=_NORM_EPS)
        self.mlp = DINOMLP()

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return cast(Tensor, x_BND + self.mlp(self.norm2(x_BND)))


class DINONetwork(nn.Module):
    """Frozen ViT-S/8 for images of one size, in evaluation mode; its weights have their published names.

    The position embeddings of the published network are those of 28 x 28 patches. For other sizes they are
    interpolated bicubically, as in the published code.

    Args:
        url: file with the published weights, see `read_dino_weights`.
        image_size: side of the images in pixels, a multiple of 8.

    Raises:
        ValueError: the file does not exist, or contains other weights.
    """

    def __init__(self, url: str, image_size: int) -> None:
        super().__init__()
        side = image_size // DINO_PATCH_SIZE
        # Weights on the meta device take no time to initialize.
        with torch.device("meta"):
            self.patch_embed = nn.ModuleDict(
                {"proj": nn.Conv2d(3, DINO_WIDTH, DINO_PATCH_SIZE, stride=DINO_PATCH_SIZE)}
            )
            self.blocks = nn.ModuleList(DINOBlock() for _ in range(DINO_DEPTH))
            self.register_buffer("cls_token", torch.empty(1, 1, DINO_WIDTH))
            self.register_buffer("pos_embed", torch.empty(1, 1 + side**2, DINO_WIDTH))
        weights = read_dino_weights(url)
        if problem := _find_misfit(weights, self.state_dict()):
            raise ValueError(f"the file {url} does not fit: {problem}; expected {_EXPECTED}; {_REMEDY}")
        weights["pos_embed"] = resize_position_grid(weights["pos_embed"], side)
        self.load_state_dict(weights, assign=True)
        self.register_buffer("mean", 2 * torch.tensor(_MEAN)[:, None, None] - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(_STD)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()

    def feature_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return five feature maps (B, D, h, w) of images in [-1, 1], without the class token."""
        x_BCHW = (images_BCHW - self.get_buffer("mean")) / self.get_buffer("std")
        patches_BDhw = self.patch_embed["proj"](x_BCHW)
        class_token_B1D = self.get_buffer("cls_token").expand(len(images_BCHW), -1, -1)
        x_BND = torch.cat([class_token_B1D, patches_BDhw.flatten(2).mT], 1) + self.get_buffer("pos_embed")
        taps = [x_BND]
        for index, block in enumerate(self.blocks):
            x_BND = block(x_BND)
            if index in DINO_TAPS:
                taps.append(x_BND)
        return [tap_BND[:, 1:].mT.unflatten(2, patches_BDhw.shape[2:]) for tap_BND in taps]


def resize_position_grid(positions_1ND: Tensor, side: int) -> Tensor:
    """Interpolate the position embeddings (1, 1 + h², D) of a square grid to (1, 1 + side², D).

    The first one, of the class token, does not change.
    """
    class_position_11D, grid_1PD = positions_1ND[:, :1], positions_1ND[:, 1:]
    source_side = round(grid_1PD.shape[1] ** 0.5)
    if source_side == side:
        return positions_1ND
    grid_1Dhw = grid_1PD.mT.unflatten(2, (source_side, source_side))
    resized_1Dhw = F.interpolate(grid_1Dhw, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_position_11D, resized_1Dhw.flatten(2).mT], 1)


def read_dino_weights(url: str) -> dict[str, Tensor]:
    """Read the fp32 weights of a DINO network by their published names, without its last norm and its head.

    Args:
        url: `.safetensors` file, or a file of `torch.save`: a state dict, or a training checkpoint with the state dict
            "teacher". Names may start with "module." and "backbone.". Pickled code is never executed.

    Raises:
        ValueError: the file does not exist, or cannot be read.
    """
    if not storage.exists(url):
        raise ValueError(f"the file {url} does not exist; expected {_EXPECTED}; {_REMEDY}")
    try:
        data = storage.read_bytes(url)
    except ValueError as error:
        raise ValueError(f"{error}; expected {_EXPECTED}; {_REMEDY}") from error
    if description := describe_wrong_binary(data):
        raise ValueError(f"the file {url} {description}; expected {_EXPECTED}; {_REMEDY}")
    weights = {}
    for key, value in _parse_state(data, url).items():
        name = str(key).removeprefix("module.").removeprefix("backbone.")
        if isinstance(value, Tensor) and not name.startswith(("norm.", "head.")):
            weights[name] = value.float()
    return weights


def _parse_state(data: bytes, url: str) -> Mapping[str, Any]:
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        # The published training checkpoint contains its arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"the file {url} cannot be read ({reason}); expected {_EXPECTED}; {_REMEDY}") from error
    if isinstance(state, Mapping) and isinstance(state.get("teacher"), Mapping):
        state = state["teacher"]
    return state if isinstance(state, Mapping) else {}


def _find_misfit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the first difference between names and shapes of a file and those of ViT-S/8, or ""."""
    if missing := [name for name in expected if name not in weights]:
        return f"{missing[0]} is missing"
    for name, value in weights.items():
        if name not in expected:
            return f"{name} does not belong to ViT-S/8"
        # The grid of the positions may have any size.
        shape = [*expected[name].shape]
        if name == "pos_embed" and value.ndim == 3:
            shape[1] = 1 + max(1, round((value.shape[1] - 1) ** 0.5)) ** 2
        if [*value.shape] != shape:
            return f"{name} has shape {[*value.shape]} instead of {shape}"
    return ""
