"""Binary Spherical Quantization tokenizers, trained and served on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsq_ray.models.tokenizer import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line must answer --help without loading torch.
    if name == "Tokenizer":
        from bsq_ray.models.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'bsq_ray' has no attribute '{name}'")
