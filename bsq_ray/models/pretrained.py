"""What the three models share: reading one from a model folder, and writing it into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from torch import Tensor, nn

from bsq_ray import config, model_folder

ConfigT = TypeVar("ConfigT")


class PretrainedModel(nn.Module, Generic[ConfigT]):
    """A model that is made of the model section of a configuration.

    Attributes:
        run_type: the configuration that has such a section.
        config: the model section of the configuration.
        model_id: SHA-256 of weights and configuration when read from a model folder, else None.
    """

    run_config_class: ClassVar[type[config.AnyConfig]]

    def __init__(self, model_config: ConfigT) -> None:
        super().__init__()
        self.config = model_config
        self.model_id: str | None = None

    @classmethod
    def from_pretrained(cls, url: str, weights: Literal["ema", "plain"] = "ema") -> Self:
        """Reads a model folder from a path, any fsspec URL or a hub id; in evaluation mode, on the CPU.

        Args:
            weights: "ema" for the folder's main weights (averaged if the training averaged them), "plain" for the
                weights as the optimiser left them.

        Raises:
            ValueError: there is no such folder, its parts do not belong together, or it holds another kind of model.
        """
        folder = model_folder.load_model_folder(url, weights)
        run_config: Any = config.require_stage(folder.config, cls.run_config_class, url)
        model = cls(run_config.model)
        model_folder.load_weights(model, folder.weights, url)
        model.model_id = folder.model_id
        return model.eval()

    def save_pretrained(
        self,
        url: str,
        run_config: config.AnyConfig | None = None,
        raw_weights: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
        card_fields: Mapping[str, str] | None = None,
    ) -> str:
        """Writes a model folder and returns the model's id.

        Args:
            url: path or fsspec URL of the folder.
            run: the configuration it was trained with; by default this model with default training.
            plain_weights: the weights as the optimiser left them, if this module holds averaged ones.
            metrics, facts: rows of the model card, see `hub.write_model_folder`.
        """
        fields: dict[str, Any] = {"name": url.rstrip("/").rsplit("/", 1)[-1], "model": self.config}
        run_config = run_config or self.run_config_class(**fields)
        return model_folder.write_model_folder(
            url, config.dump_config(run_config), self.state_dict(), raw_weights, metrics, card_fields
        )
