"""Masked language model and tokenizer together: classes in, images out.

classes ─MaskedLM, step by step─▶ tokens ─Tokenizer.decode─▶ images
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray import config, model_folder
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.sampling import interpolate_classes, sample, sample_steps
from bsq_ray.models.tokenizer import Tokenizer, Tokens


class Generator:
    """Draws images of classes; the same seed draws the same images, whatever the batch.

    Attributes:
        sampling: what is used where a call does not say otherwise.
    """

    def __init__(self, model: MaskedLM, tokenizer: Tokenizer, sampling: config.SamplingConfig) -> None:
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer.eval(), sampling

    @classmethod
    def from_pretrained(cls, url: str, weights: Literal["ema", "plain"] = "ema", device: str = "cpu") -> Generator:
        """Reads the model folder of a masked language model, whose `tokenizer/` is its tokenizer.

        Raises:
            ValueError: there is no such folder, or its parts do not belong together.
        """
        run_config = config.require_stage(
            model_folder.load_model_folder(url, weights).config, config.MaskedLMConfig, url
        )
        model = MaskedLM.from_pretrained(url, weights)
        return cls(model.to(device), Tokenizer.from_token_model(url, run_config.model).to(device), run_config.sampling)

    def generate(self, labels: Sequence[int], seed: int = 0, first_index: int = 0, **sampling: Any) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], or clips, of the classes.

        Args:
            labels: a class for each image; the number of classes itself stands for "any class".
            seed, first: image b is drawn from (seed, first + b).
            sampling: keys of `config.Sampling` to change.

        Raises:
            ValueError: an unknown class or an invalid value.
        """
        classes_BC = self._class_weights(labels)
        return self.decode(sample(self.model, classes_BC, self._sampling_config(sampling), seed, first_index))

    def iter_steps(
        self,
        labels: Sequence[int],
        seed: int = 0,
        predict: Callable[[Tensor, Tensor], Tensor] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Images after each step; what is still masked is grey.

        Args:
            predict, decode: what to call instead of the model and of `decode`, such as a batch shared with others.
        """
        sampling_config, classes_BC = self._sampling_config(sampling), self._class_weights(labels)
        for tokens_BNS in sample_steps(self.model, classes_BC, sampling_config, seed, predict=predict):
            images = (decode or self.decode)(self.model.join_bits(tokens_BNS))
            masked_BN = (tokens_BNS == self.model.mask_token).any(-1)
            yield images * (1 - self._upsample_to_pixels(masked_BN.float(), images))

    def inpaint(
        self, images: Tensor, mask_B1HW: Tensor, labels: Sequence[int], seed: int = 0, **sampling: Any
    ) -> Tensor:
        """Images (B, 3, H, W) whose holes are drawn anew; every token that a hole touches is replaced.

        Args:
            images: as `generate` gives them.
            holes_B1HW: above 0 where the image is to be drawn.
            labels: a class for each image.
        """
        tokens = self.tokenizer.encode(images.to(self._device))
        patch = self.tokenizer.config.patch_size
        inpaint_mask_BN = F.max_pool2d(mask_B1HW.to(self._device).float(), patch).flatten(1) > 0
        known_BNS = self.model.split_bits(tokens.bits_BNL)
        sampling_config, classes_BC = self._sampling_config(sampling), self._class_weights(labels)
        return self.decode(sample(self.model, classes_BC, sampling_config, seed, 0, known_BNS, inpaint_mask_BN))

    def interpolate(self, labels: Sequence[int], num_images: int, seed: int = 0, **sampling: Any) -> Tensor:
        """Images from one class to another, all drawn with the same randomness."""
        class_weights_BC = interpolate_classes(self.model, labels, num_images).to(self._device)
        sampling_config = self._sampling_config(sampling)
        samples = [sample(self.model, class_weights_BC[n : n + 1], sampling_config, seed) for n in range(num_images)]
        return self.decode(torch.cat(samples))

    def decode(self, bits_BNL: Tensor) -> Tensor:
        """Images of tokens, (B, 3, H, W) or clips."""
        return self.tokenizer.decode(Tokens(bits_BNL, self.model.config.grid))

    @property
    def _device(self) -> torch.device:
        return self.model.position.device

    def _class_weights(self, labels: Sequence[int]) -> Tensor:
        return self.model.class_weights(torch.tensor(list(labels), dtype=torch.long)).to(self._device)

    def _sampling_config(self, overrides: dict[str, Any]) -> config.SamplingConfig:
        return config.SamplingConfig.model_validate(self.sampling.model_dump() | overrides)

    def _upsample_to_pixels(self, values_BN: Tensor, like: Tensor) -> Tensor:
        """A value for each token to one for each of its pixels."""
        frames, rows, columns = self.model.config.grid
        values = values_BN.view(-1, frames, rows, columns)
        values = F.interpolate(values, scale_factor=self.tokenizer.config.patch_size, mode="nearest")
        return values if like.ndim == 4 else values[:, None]
