"""DINO ViT-S/8: against PyTorch's own Transformer layers, at other image sizes, and from files that do not fit."""

import argparse

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from reference_dino import DEPTH, PATCH, WIDTH, random_dino_weights
from torch import nn

from bsq_ray.models.dino_network import DINO_TAPS, DINONetwork, read_dino_weights, resize_position_grid

HEADS = 6


@pytest.fixture(scope="module")
def weights():
    return random_dino_weights()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "vits8.pth"
    torch.save(weights, path)
    return str(path)


def reference_layer(weights, index):
    """Return a block as a layer of PyTorch."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight",
        "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state, prefix = {}, f"blocks.{index}."
    for name in (name.removeprefix(prefix) for name in weights if name.startswith(prefix)):
        new_name = name
        for published, own in names.items():
            new_name = new_name.replace(published, own)
        state[new_name] = weights[prefix + name]
    layer.load_state_dict(state)
    return layer.eval()


@torch.no_grad()
def test_dino_maps_equal_those_of_pytorch_layers(weights, path):
    """All five maps at the published size of 224 pixels equal an independent computation."""
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    maps = DINONetwork(path, 224).feature_maps(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = ((images + 1) / 2 - mean) / std
    patches = F.unfold(normalized, PATCH, stride=PATCH).mT
    tokens = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    tokens = torch.cat([weights["cls_token"], tokens], 1) + weights["pos_embed"]
    expected = [tokens]
    for index in range(DEPTH):
        tokens = reference_layer(weights, index)(tokens)
        if index in DINO_TAPS:
            expected.append(tokens)
    assert len(maps) == len(expected) == 5
    for map_BDhw, tokens_BND in zip(maps, expected, strict=True):
        assert map_BDhw.shape == (1, WIDTH, 28, 28)
        torch.testing.assert_close(map_BDhw.flatten(2).mT, tokens_BND[:, 1:], rtol=1e-4, atol=1e-4)


def test_dino_positions_are_interpolated_for_other_sizes(weights, path):
    """The grid is resized bicubically and the class token keeps its position; 224 pixels change nothing."""
    positions = weights["pos_embed"]
    assert torch.equal(resize_position_grid(positions, 28), positions)
    for side in (2, 8, 32):
        resized = resize_position_grid(positions, side)
        assert torch.equal(resized[:, 0], positions[:, 0])
        grid = positions[0, 1:].T.reshape(1, WIDTH, 28, 28)
        expected = F.interpolate(grid, size=(side, side), mode="bicubic").flatten(2).mT
        assert torch.equal(resized[:, 1:], expected)
    # A linear function of the position stays one, inside the grid.
    ramp = torch.arange(28.0).repeat_interleave(28)
    ramp = torch.cat([torch.zeros(1), ramp])[None, :, None]
    rows = resize_position_grid(ramp, 14)[0, 1:, 0].view(14, 14)
    torch.testing.assert_close(rows[2:-2, 0], 2 * torch.arange(2.0, 12.0) + 0.5)
    assert DINONetwork(path, 64).feature_maps(torch.zeros(2, 3, 64, 64))[0].shape == (2, WIDTH, 8, 8)


def as_state_dict(weights):
    return weights


def as_training_checkpoint(weights):
    teacher = {f"backbone.{name}": value for name, value in weights.items()} | {"head.mlp.0.weight": torch.ones(2, 2)}
    student = {f"module.backbone.{name}": value + 1 for name, value in weights.items()}
    return {"student": student, "teacher": teacher, "epoch": 300, "args": argparse.Namespace(arch="vit_small")}


def as_wrapped_state_dict(weights):
    return {f"module.backbone.{name}": value.double() for name, value in weights.items()}


@pytest.mark.parametrize("pack", [as_state_dict, as_training_checkpoint, as_wrapped_state_dict])
def test_dino_reads_every_published_form(weights, tmp_path, pack):
    torch.save(pack(weights), tmp_path / "dino.pth")
    read = read_dino_weights(str(tmp_path / "dino.pth"))
    assert read.keys() == weights.keys() - {"norm.weight", "norm.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in read.items())


def test_dino_reads_safetensors(weights, tmp_path):
    safetensors.torch.save_file(weights, tmp_path / "dino.safetensors")
    read = read_dino_weights(str(tmp_path / "dino.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in read.items())


class Unsafe:
    def __reduce__(self):
        return print, ("executed",)


def shapes_of_another_model(weights):
    return weights | {"blocks.3.attn.proj.weight": torch.zeros(768, 768)}


REJECTED = {
    "missing": (None, "does not exist"),
    "folder": ("folder", "cannot read .*: Is a directory"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "truncated": (b"PK\x03\x04" + bytes(range(256)) * 4, "cannot be read"),
    "pickled code": (lambda weights: {"state": Unsafe()}, "cannot be read"),
    "list": (lambda weights: [torch.zeros(2)], "does not fit: cls_token is missing"),
    "other model": (lambda weights: {"conv.weight": torch.zeros(2)}, "does not fit: cls_token is missing"),
    "other width": (
        shapes_of_another_model,
        r"blocks.3.attn.proj.weight has shape \[768, 768\] instead of \[384, 384\]",
    ),
    "deeper": (
        lambda weights: weights | {"blocks.12.norm1.bias": torch.zeros(384)},
        "blocks.12.norm1.bias does not bel",
    ),
    "other grid": (
        lambda weights: weights | {"pos_embed": weights["pos_embed"][:, :-1]},
        r"pos_embed has shape \[1, 784, 384\] instead of \[1, 785, 384\]",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_dino_file_that_does_not_fit_raises(weights, tmp_path, capsys, case):
    """The error names the file, what was expected and what to do."""
    content, reason = REJECTED[case]
    path = tmp_path / "dino.pth"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content(weights), path)
    with pytest.raises(ValueError, match=reason) as error:
        DINONetwork(str(path), 64)
    message = str(error.value)
    assert str(path) in message
    assert "expected weights of DINO ViT-S/8" in message
    assert "set loss.adversarial.features_weights to dino_deitsmall8_pretrain.pth" in message
    assert "executed" not in capsys.readouterr().out
