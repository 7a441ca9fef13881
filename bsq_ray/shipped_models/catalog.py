"""Names of the models that are part of the package.

    bsq_ray/shipped_models/photo-prior/             a prior, a tokenizer or a generator
    bsq_ray/shipped_models/photo-prior/tokenizer/   its tokenizer, a model with a name of its own

A model has the name that its configuration contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bsq_ray import config

# Default models of commands: for files, and for reconstructions.
DEFAULT_CODEC, DEFAULT_TOKENIZER = "photo-prior", "photo"

MODELS_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ShippedModel:
    """A model of the package.

    Attributes:
        folder: its model folder.
        config: configuration of its training.
    """

    folder: Path
    config: config.AnyConfig

    @property
    def name(self) -> str:
        """Name by which commands and `from_pretrained` find the model."""
        return self.config.name


def list_shipped_models() -> list[ShippedModel]:
    """Return the models of the package, sorted by name.

    Raises:
        ValueError: two models have the same name.
    """
    models: dict[str, ShippedModel] = {}
    # The tokenizer of several token models is one model: the first copy in alphabetical order represents it.
    for path in sorted([*MODELS_FOLDER.glob("*/config.yaml"), *MODELS_FOLDER.glob("*/tokenizer/config.yaml")]):
        model = ShippedModel(path.parent, config.parse_config(path.read_text(), str(path)))
        known = models.setdefault(model.name, model)
        if known.config != model.config:
            raise ValueError(
                f"two models are named {model.name}: {known.folder} and {model.folder}; rename one of them"
            )
    return [models[name] for name in sorted(models)]


def find_shipped_model(name: str) -> ShippedModel | None:
    """Return the model of the package with this name; None if there is none."""
    return next((model for model in list_shipped_models() if model.name == name), None)


def default_model_folder(name: str) -> str:
    """Return the folder of a default model.

    Raises:
        ValueError: this version does not ship the model.
    """
    model = find_shipped_model(name)
    if model is None:
        raise ValueError(
            f"there is no default model {name}: {describe_shipped_models()}; name a model folder with --model"
        )
    return str(model.folder)


def describe_shipped_models() -> str:
    """Return a clause with the names of all models of the package."""
    names = [model.name for model in list_shipped_models()]
    return f"the shipped models are {', '.join(names)}" if names else "this version ships no models"
