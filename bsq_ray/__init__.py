"""Binary Spherical Quantization tokenizers and what stands on their tokens, trained and served on Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsq_ray.models.generator import Generator
    from bsq_ray.models.masked_lm import MaskedLM
    from bsq_ray.models.tokenizer import Tokenizer

__all__ = ["Generator", "MaskedLM", "Tokenizer"]

_HOME = {"Generator": "generator", "MaskedLM": "masked_lm", "Tokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line must answer --help without loading torch.
    if name in _HOME:
        return getattr(import_module(f"bsq_ray.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bsq_ray' has no attribute '{name}'")
