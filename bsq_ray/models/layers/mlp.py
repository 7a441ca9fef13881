"""The MLP of a transformer block, and the initialization of its linear layers."""

from __future__ import annotations

from torch import nn


def build_mlp(width: int, mlp_ratio: float) -> nn.Sequential:
    """Build Linear-GELU-Linear with a hidden layer of `width * mlp_ratio` channels."""
    hidden_dim = int(width * mlp_ratio)
    return nn.Sequential(nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width))


def init_weights(root: nn.Module) -> None:
    """Fill the weights of all linear layers and embeddings with trunc_normal(0.02), and their biases with zeros."""
    for module in root.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
