"""Build the optimizers of a module, and decide which of them a parameter belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.training.optimizers.muon import Muon

# Transformer blocks are elements of a module list with this name.
_IN_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.")
_MIN_KERNEL_DIMS = 4


def build_adamw(parameters: Iterable[nn.Parameter], optimizer_config: config.OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW with the configured rates for the parameters that require gradients."""
    return torch.optim.AdamW(
        sorted(_trained(parameters), key=_is_unaligned),
        lr=optimizer_config.base_learning_rate,
        betas=optimizer_config.betas,
        weight_decay=optimizer_config.weight_decay,
        eps=optimizer_config.eps,
        fused=True,
    )


def build_optimizers(
    module: nn.Module, optimizer_config: config.OptimizerConfig, *, use_bf16: bool
) -> dict[str, torch.optim.Optimizer]:
    """Build the optimizers of the parameters that require gradients, by the name of their state in a checkpoint.

    Args:
        use_bf16: orthogonalize matrices in bf16 instead of fp32.
    """
    matrices, rest = _split_parameters(module, optimizer_config)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if rest:
        optimizers["optimizer"] = build_adamw(rest, optimizer_config)
    if matrices:
        rate = optimizer_config.muon.base_learning_rate or optimizer_config.base_learning_rate
        optimizers["muon"] = Muon(
            matrices,
            lr=rate,
            lr_ratio=rate / optimizer_config.base_learning_rate,
            momentum=optimizer_config.muon.momentum,
            weight_decay=optimizer_config.muon.weight_decay,
            ns_steps=optimizer_config.muon.ns_steps,
            dtype=torch.bfloat16 if use_bf16 else torch.float32,
        )
    return optimizers


def muon_matrices(module: nn.Module, *, convolutions: bool) -> dict[str, nn.Parameter]:
    """Return the parameters that Muon optimizes, by name: matrices of linear layers in transformer blocks.

    Embeddings, positions, heads, quantizer projections, norms and biases are not among them.

    Args:
        convolutions: include the kernels of convolutions, (out, in, height, width) or (out, in, time, height, width).
    """
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if (parameter.ndim == 2 and _IN_BLOCK.search(name)) or (convolutions and parameter.ndim >= _MIN_KERNEL_DIMS)
    }


def describe_optimizers(modules: Mapping[str, nn.Module], optimizer_config: config.OptimizerConfig) -> str:
    """Describe the split in a line, such as `muon: 32 matrices (6.29 M); adamw: 40 tensors (0.61 M)`.

    Args:
        modules: trained modules by name; those after the first are described only if Muon optimizes some of them.
    """
    descriptions: list[str] = []
    for name, module in modules.items():
        matrices, rest = _split_parameters(module, optimizer_config)
        if descriptions and not matrices:
            continue
        parts = [f"muon: {len(matrices)} matrices ({_millions(matrices)})"] if matrices else []
        description = "; ".join([*parts, f"adamw: {len(rest)} tensors ({_millions(rest)})"])
        descriptions.append(f"{name}: {description}" if descriptions else description)
    return "; ".join(descriptions)


def _split_parameters(
    module: nn.Module, optimizer_config: config.OptimizerConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of Muon and those of AdamW; those that require no gradients have no optimizer."""
    matrices: dict[str, nn.Parameter] = {}
    if optimizer_config.kind == "muon":
        matrices = muon_matrices(module, convolutions=optimizer_config.muon.convolutions)
    rest = [value for name, value in module.named_parameters() if name not in matrices]
    return _trained(matrices.values()), _trained(rest)


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M"


def _is_unaligned(parameter: Tensor) -> bool:
    """Return True if the next parameter in ZeRO's flat buffer would not start at a multiple of 16 bytes.

    Compiled kernels require that alignment, so unaligned parameters are sorted to the end.
    """
    return parameter.numel() * parameter.element_size() % 16 > 0
