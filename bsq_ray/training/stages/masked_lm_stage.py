"""Training stage of the masked language model: mask a random fraction of the tokens and predict them.

    bits ─▶ sub-tokens ─masked by the cosine schedule─▶ model ─▶ cross entropy at masked positions

Shape suffixes: B images, N tokens, S sub-tokens of a token, V values of a sub-token, L bits of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.data.data_source import Batch, DataSource
from bsq_ray.data.mixture import MixtureSource
from bsq_ray.data.token_table import TokenSource
from bsq_ray.data.transforms import to_uint8
from bsq_ray.models.masked_lm import MaskedLM, masked_cross_entropy
from bsq_ray.models.quantizers.bits import unpack_bits
from bsq_ray.models.sampling import sample
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.runtime.collectives import average_over_workers
from bsq_ray.runtime.device import to_device
from bsq_ray.runtime.random_streams import RandomStream, stream_rng
from bsq_ray.training.stages.stage import Engines, Metrics, MetricSum, PhaseOutput, Stage, StepContext, compile_blocks

_NUM_SAMPLE_IMAGES = 8


@dataclass(frozen=True)
class MaskedLMStepContext(StepContext):
    """Masks of a micro batch.

    Attributes:
        masked_BNS: bool, on the device.
        dropped_B: images without their class, bool, on the host.
        num_masked: masked sub-tokens of a micro batch, mean over all micro batches of all workers; scalar.
    """

    masked_BNS: Tensor
    dropped_B: Tensor
    num_masked: Tensor


class MaskedLMStage(Stage):
    """Trains a `MaskedLM` on a token table."""

    def __init__(self, run_config: config.MaskedLMConfig, source: DataSource, device: torch.device) -> None:
        self.run_config, self.device = run_config, device
        assert isinstance(source, TokenSource | MixtureSource)
        self.tokenizer_url = source.tokenizer_url
        model = MaskedLM(run_config.model).to(device)
        if run_config.training.engine.compile:
            compile_blocks(model.blocks)
        self.modules: dict[str, nn.Module] = {"masked_lm": model}
        self._tokenizer: Tokenizer | None = None

    def phases(self, step: int) -> list[str]:
        """Return the model, the only phase."""
        return ["masked_lm"]

    def prepare_step(self, micro_batches: Sequence[Batch], engines: Engines, step: int) -> list[StepContext | None]:
        """Sample the masks, and count the masked sub-tokens of the global batch, over which the loss is a mean."""
        samples = [self._sample_masks(batch.keys, step, self.run_config.loss.class_dropout) for batch in micro_batches]
        num_masked = average_over_workers(torch.stack([masked_BNS.sum() for masked_BNS, _ in samples]).double().mean())
        return [MaskedLMStepContext(masked_BNS, dropped_B, num_masked) for masked_BNS, dropped_B in samples]

    def loss(self, phase: str, batch: Batch, engines: Engines, context: StepContext | None, step: int) -> PhaseOutput:
        """Compute the label-smoothed cross entropy at masked positions; see `Stage.loss`."""
        assert isinstance(context, MaskedLMStepContext)
        loss_config, model = self.run_config.loss, self._model(engines)
        tokens_BNS = self._sub_tokens(model, batch)
        masked_BNS, dropped_B, num_masked = context.masked_BNS, context.dropped_B, context.num_masked
        # Built on the host, where validating the labels does not synchronize with the GPU.
        labels_B = batch.labels_B.masked_fill(dropped_B, model.null_class)
        classes_BC = to_device(model.class_weights(labels_B), self.device)
        logits_BNSV = engines[phase](tokens_BNS.masked_fill(masked_BNS, model.mask_token), classes_BC)
        loss = masked_cross_entropy(logits_BNSV, tokens_BNS, masked_BNS, loss_config.label_smoothing, num_masked)
        correct_BNS = (logits_BNSV.argmax(-1) == tokens_BNS) & masked_BNS
        accuracy = correct_BNS.sum() / num_masked
        return PhaseOutput(loss, {"loss": loss.detach(), "accuracy": accuracy.detach()})

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[Metrics, Tensor]:
        """Compute the bits per masked token, over masks of all sizes.

        The sample image shows decoded images above generated ones. Masks depend on the samples alone, so that
        evaluations are comparable.
        """
        model = self._model(engines)
        tokens_BNS = self._sub_tokens(model, batch)
        masked_BNS, _ = self._sample_masks(batch.keys, -1, 0.0)
        classes_BC = model.class_weights(batch.labels_B).to(self.device)
        logits_BNSV = engines["masked_lm"](tokens_BNS.masked_fill(masked_BNS, model.mask_token), classes_BC)
        nats = float(masked_cross_entropy(logits_BNSV, tokens_BNS, masked_BNS, 0.0))
        selected = slice(0, _NUM_SAMPLE_IMAGES)
        sampled_BNL = sample(
            model,
            classes_BC[selected],
            self.run_config.sampling,
            self.run_config.training.seed,
            predict=engines["masked_lm"],
        )
        rows = [self._decode(bits_BNL) for bits_BNL in (model.join_bits(tokens_BNS[selected]), sampled_BNL)]
        image = torch.cat([torch.cat(list(to_uint8(row)), dim=2) for row in rows], dim=1)
        bits_per_token = nats / log(2) * self.run_config.model.num_sub_tokens
        num_masked = int(masked_BNS.sum())
        return {"bits_per_token": MetricSum(bits_per_token * num_masked, num_masked)}, image.cpu()

    def pop_metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}

    def bundled_models(self) -> dict[str, str]:
        """Return the tokenizer, which decodes the generated tokens."""
        return {"tokenizer": self.tokenizer_url}

    def _model(self, engines: Engines) -> MaskedLM:
        return cast(MaskedLM, engines["masked_lm"].module)

    def _sub_tokens(self, model: MaskedLM, batch: Batch) -> Tensor:
        model_config = self.run_config.model
        bits_BNL = unpack_bits(to_device(batch.values_B, self.device), model_config.num_tokens * model_config.bits)
        return model.split_bits(bits_BNL.unflatten(1, (model_config.num_tokens, model_config.bits)))

    def _sample_masks(self, keys: list[str], step: int, class_dropout: float) -> tuple[Tensor, Tensor]:
        """Sample masks (B, N, S) on the device, and class dropout (B,) on the host; both bool.

        They are drawn from (seed, step, key) of each sample, so they do not depend on the number of workers.
        """
        model_config = self.run_config.model
        num_units = model_config.num_tokens * (1 if model_config.mask_unit == "token" else model_config.num_sub_tokens)
        masks, dropped = [], []
        for key in keys:
            rng = stream_rng(RandomStream.TOKEN_MASK, self.run_config.training.seed, step + 1, key)
            mask_ratio = np.cos(pi / 2 * rng.random())
            order = rng.permutation(num_units)
            masks.append(order < max(1, round(num_units * mask_ratio)))
            dropped.append(rng.random() < class_dropout)
        masked_BU = to_device(torch.from_numpy(np.stack(masks)), self.device)
        masked_BNS = masked_BU.view(len(keys), model_config.num_tokens, -1).expand(-1, -1, model_config.num_sub_tokens)
        return masked_BNS, torch.tensor(dropped)

    def _decode(self, bits_BNL: Tensor) -> Tensor:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_pretrained(self.tokenizer_url).to(self.device)
        images: Tensor = self._tokenizer.decode(Tokens(bits_BNL, self.run_config.model.grid))
        return images if images.ndim == 4 else images[:, :, 0]
