"""Binary Spherical Quantization tokenizers and token models, trained and served on Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsq_ray.codec.codec import Codec
    from bsq_ray.models.generator import Generator
    from bsq_ray.models.masked_lm import MaskedLM
    from bsq_ray.models.prior import Prior
    from bsq_ray.models.tokenizer import Tokenizer

    __version__: str

__all__ = ["Codec", "Generator", "MaskedLM", "Prior", "Tokenizer", "__version__"]

_MODULES = {
    "Codec": "codec.codec",
    "Generator": "models.generator",
    "MaskedLM": "models.masked_lm",
    "Prior": "models.prior",
    "Tokenizer": "models.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bsq-ray")
    # Imported on first use, so that `bsq-ray --help` does not load torch.
    if name in _MODULES:
        return getattr(import_module(f"bsq_ray.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bsq_ray' has no attribute '{name}'")
