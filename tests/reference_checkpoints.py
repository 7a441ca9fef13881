"""The published reference tokenizer and discriminator, and checkpoints as its training script writes them.

`ReferenceTokenizer` states that code's forward pass and its names of weights independently, with PyTorch's own
attention module, from their description; no file of it is at hand here.
"""

import argparse
import collections
import pathlib
import sys
import types

import numpy as np
import torch
from torch import nn

WIDTH, LAYERS, HEADS, SIDE, PATCH, BITS = 32, 2, 4, 32, 8, 12
CONFIG = f"""
base: imagenet128-bsq18
name: small
model:
  image_size: {SIDE}
  encoder: {{width: {WIDTH}, layers: {LAYERS}, heads: {HEADS}}}
  decoder: {{width: {WIDTH}, layers: {LAYERS}, heads: {HEADS}, head_hidden_dim: 3072}}
  quantizer: {{bits: {BITS}}}
loss: {{adversarial: {{channel_base: 512, channel_max: 32}}}}
"""


class ReferenceBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_2 = nn.LayerNorm(WIDTH)
        parts = {"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * WIDTH, WIDTH)}
        self.mlp = nn.Sequential(collections.OrderedDict(parts))

    def forward(self, x):
        sequence_first = self.ln_1(x).transpose(0, 1)
        x = x + self.attn(sequence_first, sequence_first, sequence_first, need_weights=False)[0].transpose(0, 1)
        return x + self.mlp(self.ln_2(x))


class ReferenceTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty((SIDE // PATCH) ** 2, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ReferenceBlock() for _ in range(LAYERS))

    def body(self, x):
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x)


class ReferenceTokenizer(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.encoder, self.decoder = ReferenceTransformer(), ReferenceTransformer()
        self.encoder.conv1 = nn.Linear(3 * PATCH**2, WIDTH, bias=False)
        self.decoder.ffn = nn.Sequential(nn.Linear(WIDTH, 3072), nn.Tanh())
        self.decoder.conv_out = nn.Linear(3072, 3 * PATCH**2)
        self.quant_embed, self.post_quant_embed = nn.Linear(WIDTH, BITS), nn.Linear(BITS, WIDTH)
        self.quantize = nn.Module()
        self.quantize.register_buffer("basis", 2 ** torch.arange(BITS - 1, -1, -1))
        self.quantize.register_buffer("group_basis", 2 ** torch.arange(8, -1, -1))
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2, generator=generator)

    def forward(self, images):
        grid = SIDE // PATCH
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        v = self.quant_embed(self.encoder.body(self.encoder.conv1(patches)))
        u = v / v.norm(dim=-1, keepdim=True)
        code = torch.where(u > 0, 1.0, -1.0) / BITS**0.5
        x = self.decoder.body(self.post_quant_embed(code))
        patches = self.decoder.conv_out(self.decoder.ffn(x))
        assert patches.shape[1] == grid * grid
        return nn.functional.fold(patches.transpose(1, 2), SIDE, PATCH, stride=PATCH).clamp(-1, 1)


def discriminator_tensors(seed=2):
    """Weights of the reference's residual discriminator under its names: 32 px, channel base 512, at most 32."""
    channels = {32: 16, 16: 32, 8: 32, 4: 32}
    shapes = {"b32.fromrgb.weight": (16, 3, 1, 1), "b32.fromrgb.bias": (16,)}
    for size in (32, 16, 8):
        inputs, outputs = channels[size], channels[size // 2]
        shapes |= {f"b{size}.conv0.weight": (inputs, inputs, 3, 3), f"b{size}.conv0.bias": (inputs,)}
        shapes |= {f"b{size}.conv1.weight": (outputs, inputs, 3, 3), f"b{size}.conv1.bias": (outputs,)}
        shapes |= {f"b{size}.skip.weight": (outputs, inputs, 1, 1)}
    shapes |= {"b4.conv.weight": (32, 33, 3, 3), "b4.conv.bias": (32,), "b4.fc.weight": (32, 512), "b4.fc.bias": (32,)}
    shapes |= {"b4.out.weight": (1, 32), "b4.out.bias": (1,)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    convolutions = [name.removesuffix("weight") for name, shape in shapes.items() if len(shape) == 4]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return tensors | {f"{name}resample_filter": torch.outer(taps, taps) for name in convolutions}


def discriminator_logits(tensors, images):
    """Compute the reference discriminator's logits of at most four images."""

    def convolution(name, x, gain=2**0.5, **how):
        weight = tensors[f"{name}.weight"]
        x = nn.functional.conv2d(x, weight / weight[0].numel() ** 0.5, **how)
        return nn.functional.leaky_relu(x + tensors[f"{name}.bias"][:, None, None], 0.2) * gain

    def low_pass(name, x, pad):
        x = nn.functional.pad(x, [pad] * 4).flatten(0, 1).unsqueeze(1)
        return nn.functional.conv2d(x, tensors[f"{name}.resample_filter"][None, None]).unflatten(0, (len(images), -1))

    x = convolution("b32.fromrgb", images)
    for block in ("b32", "b16", "b8"):
        weight = tensors[f"{block}.skip.weight"]
        skip = low_pass(f"{block}.skip", x, 1).squeeze(2)[..., ::2, ::2]
        skip = nn.functional.conv2d(skip, weight / weight[0].numel() ** 0.5) * 0.5**0.5
        x = convolution(f"{block}.conv0", x, padding=1)
        x = convolution(f"{block}.conv1", low_pass(f"{block}.conv1", x, 2).squeeze(2), gain=1.0, stride=2) + skip
    deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
    x = convolution("b4.conv", torch.cat([x, deviation.expand(len(x), 1, 4, 4)], 1), padding=1).flatten(1)
    x = nn.functional.leaky_relu(x @ tensors["b4.fc.weight"].T / 512**0.5 + tensors["b4.fc.bias"], 0.2) * 2**0.5
    return x @ tensors["b4.out.weight"].T / 32**0.5 + tensors["b4.out.bias"]


def prefixed(prefix, tensors):
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in tensors.items())


def checkpoint_contents(prefix="module.", **changes):
    """A checkpoint's dictionary: plain weights of seed 0, averaged ones of seed 1, objects of the training script."""
    arguments = argparse.Namespace(resume="", output_dir=pathlib.PurePosixPath("/out"), lr=np.float64(4e-7))
    parts = {
        "iter": 7000,
        "state_dict": prefixed(prefix, ReferenceTokenizer(0).state_dict()),
        "ema_state_dict": prefixed(prefix * 2, ReferenceTokenizer(1).state_dict()),
        "optimizer_generator": {"state": {0: {"step": torch.tensor(7000.0)}}, "param_groups": [{"lr": 1e-4}]},
        "optimizer_discriminator": {"state": {}, "param_groups": []},
        "state_dict_discriminator": None,
        "scaler": {},
        "config": fake_omegaconf_object(),
        "args": arguments,
        "best_fid": np.float64(1.5),
    }
    return parts | changes


def fake_omegaconf_object():
    """An object of a package that is absent where the checkpoint is read, with the structure OmegaConf's have."""
    package, container = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.dictconfig")
    container.DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    sys.modules |= {"omegaconf": package, "omegaconf.dictconfig": container}
    instance = container.DictConfig()
    instance.__dict__ |= {
        "_content": {"width": 32},
        "_parent": None,
        "flags": collections.defaultdict(dict, a={"b": 1}),
    }
    return instance


def save_checkpoint(folder, contents):
    """Save a checkpoint without the packages of the reference code; return its path."""
    torch.save(contents, folder / "checkpoint.pt")
    for name in ("omegaconf", "omegaconf.dictconfig"):
        sys.modules.pop(name, None)
    return str(folder / "checkpoint.pt")


def write_small_config(folder):
    """Write the configuration of the small model; return its path."""
    (folder / "small.yaml").write_text(CONFIG)
    return str(folder / "small.yaml")


class MaliciousObject:
    """An object whose unpickling would run a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
