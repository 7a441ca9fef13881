"""Base of the three models: load one from a model folder, save it to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor, nn

from bsq_ray import config

if TYPE_CHECKING:
    from bsq_ray.model_folder import WeightsKind

ConfigT = TypeVar("ConfigT")


class PretrainedModel(nn.Module, Generic[ConfigT]):
    """A model built from the `model` part of a run configuration.

    Attributes:
        run_config_class: class of the run configuration.
        config: the `model` part of the run configuration.
        model_id: SHA-256 of weights and configuration if read from a model folder, else None.
        tokens_id, same_tokens: see `model_folder.ModelFolder`.
    """

    run_config_class: ClassVar[type[config.AnyConfig]]

    def __init__(self, model_config: ConfigT) -> None:
        super().__init__()
        self.config = model_config
        self.model_id: str | None = None
        self.tokens_id: str | None = None
        self.same_tokens: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, url: str, weights: WeightsKind = "ema") -> Self:
        """Load a model folder; return the model on the CPU in evaluation mode.

        Args:
            url: path, fsspec URL, name of a shipped model, or model hub id.
            weights: "ema" for the main weights of the folder, which are averaged if the training averaged them;
                "raw" for the weights without averaging.

        Raises:
            ValueError: the folder does not exist, its parts do not match, or it contains another kind of model.
        """
        # Imported here so that the networks can be used without the storage layer.
        from bsq_ray import model_folder

        folder = model_folder.load_model_folder(url, weights)
        run_config: Any = config.require_stage(folder.config, cls.run_config_class, url)
        model = cls(run_config.model)
        model_folder.load_weights(model, folder.weights, url)
        model.model_id, model.tokens_id, model.same_tokens = folder.model_id, folder.tokens_id, folder.same_tokens
        return model.eval()

    def save_pretrained(
        self,
        url: str,
        run_config: config.AnyConfig | None = None,
        raw_weights: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
        card_fields: Mapping[str, str] | None = None,
    ) -> str:
        """Write a model folder and return the model's id.

        Args:
            url: path or fsspec URL of the folder.
            run_config: configuration of the training run; by default this model with default training options.
            raw_weights: raw weights, if this module contains the EMA.
            metrics: measured values for the model card, by name.
            card_fields: further rows of the model card, see `model_folder.write_model_folder`.
        """
        from bsq_ray import model_folder

        fields: dict[str, Any] = {"name": url.rstrip("/").rsplit("/", 1)[-1], "model": self.config}
        run_config = run_config or self.run_config_class(**fields)
        return model_folder.write_model_folder(
            url, config.dump_config(run_config), self.state_dict(), raw_weights, metrics, card_fields
        )
