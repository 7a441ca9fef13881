"""Class-conditional image generation: a masked language model and its tokenizer.

classes ─MaskedLM, iteratively─▶ tokens ─Tokenizer.decode─▶ images
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.sampling import interpolate_classes, sample, sample_steps
from bsq_ray.models.tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    from bsq_ray.model_folder import WeightsKind


class Generator:
    """Generates images of classes. A seed determines the images whatever the batch size.

    Attributes:
        sampling: default sampling options; the methods take overrides as keywords.
    """

    def __init__(self, model: MaskedLM, tokenizer: Tokenizer, sampling: config.SamplingConfig) -> None:
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer.eval(), sampling

    @classmethod
    def from_pretrained(cls, url: str, weights: WeightsKind = "ema", device: torch.device | str = "cpu") -> Generator:
        """Load the model folder of a masked language model, which contains its tokenizer in `tokenizer/`.

        Raises:
            ValueError: the folder does not exist, or its parts do not match.
        """
        from bsq_ray import model_folder

        run_config = config.require_stage(
            model_folder.load_model_folder(url, weights).config, config.MaskedLMConfig, url
        )
        model = MaskedLM.from_pretrained(url, weights)
        return cls(model.to(device), Tokenizer.from_token_model(url, run_config.model).to(device), run_config.sampling)

    def generate(self, labels: Sequence[int], seed: int = 0, first_index: int = 0, **sampling: Any) -> Tensor:
        """Generate images (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1].

        Args:
            labels: a class index for each image; the number of classes means "any class".
            seed, first_index: image b is sampled from (seed, first_index + b).
            sampling: overrides of `config.SamplingConfig`.

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
        """Yield the images after each sampling step, masked tokens in gray; shapes as in `generate`.

        Args:
            predict: replaces the model's forward pass, for example by a dynamically batched one.
            decode: replaces `decode`.
        """
        sampling_config, classes_BC = self._sampling_config(sampling), self._class_weights(labels)
        for tokens_BNS in sample_steps(self.model, classes_BC, sampling_config, seed, predict=predict):
            images_BCHW_or_BCTHW = (decode or self.decode)(self.model.join_bits(tokens_BNS))
            masked_BN = (tokens_BNS == self.model.mask_token).any(-1)
            yield images_BCHW_or_BCTHW * (1 - self._upsample_to_pixels(masked_BN.float(), images_BCHW_or_BCTHW))

    def inpaint(
        self, images_BCHW: Tensor, mask_B1HW: Tensor, labels: Sequence[int], seed: int = 0, **sampling: Any
    ) -> Tensor:
        """Generate the masked part of images (B, 3, H, W); every token that the mask touches is replaced.

        Args:
            images_BCHW: images in [-1, 1].
            mask_B1HW: above 0 where the image is generated.
            labels: a class index for each image.
        """
        tokens = self.tokenizer.encode(images_BCHW.to(self._device))
        patch = self.tokenizer.config.patch_size
        inpaint_mask_BN = F.max_pool2d(mask_B1HW.to(self._device).float(), patch).flatten(1) > 0
        known_BNS = self.model.split_bits(tokens.bits_BNL)
        sampling_config, classes_BC = self._sampling_config(sampling), self._class_weights(labels)
        return self.decode(sample(self.model, classes_BC, sampling_config, seed, 0, known_BNS, inpaint_mask_BN))

    def interpolate(self, labels: Sequence[int], num_images: int, seed: int = 0, **sampling: Any) -> Tensor:
        """Generate images (num_images, 3, H, W) between two classes, all with the same random numbers."""
        class_weights_BC = interpolate_classes(self.model, labels, num_images).to(self._device)
        sampling_config = self._sampling_config(sampling)
        samples = [sample(self.model, class_weights_BC[n : n + 1], sampling_config, seed) for n in range(num_images)]
        return self.decode(torch.cat(samples))

    def decode(self, bits_BNL: Tensor) -> Tensor:
        """Decode tokens to images (B, 3, H, W) or clips (B, 3, T, H, W)."""
        return self.tokenizer.decode(Tokens(bits_BNL, self.model.config.grid))

    @property
    def _device(self) -> torch.device:
        return self.model.position.device

    def _class_weights(self, labels: Sequence[int]) -> Tensor:
        return self.model.class_weights(torch.tensor(list(labels), dtype=torch.long)).to(self._device)

    def _sampling_config(self, overrides: dict[str, Any]) -> config.SamplingConfig:
        return config.SamplingConfig.model_validate(self.sampling.model_dump() | overrides)

    def _upsample_to_pixels(self, values_BN: Tensor, like: Tensor) -> Tensor:
        """Repeat the value of each token for each of its pixels; the result broadcasts over `like`."""
        frames, rows, columns = self.model.config.grid
        values = values_BN.view(-1, frames, rows, columns)
        values = F.interpolate(values, scale_factor=self.tokenizer.config.patch_size, mode="nearest")
        return values if like.ndim == 4 else values[:, None]
