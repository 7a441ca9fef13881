"""The prior's stage: the cost of every bit, given the tokens before it.

Shape suffixes: B images, N tokens, S sub-tokens of a token, L bits of a token.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.data.data_source import Batch
from bsq_ray.data.token_table import TokenSource
from bsq_ray.data.transforms import to_uint8
from bsq_ray.models.prior import Prior, code_length
from bsq_ray.models.quantizers.bits import bits_to_integers, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.training.stages.stage import Engines, Stage, compile_blocks

_NUM_SAMPLE_IMAGES = 8


class PriorStage(Stage):
    """Trains a `Prior` on a token table."""

    def __init__(self, run_config: config.PriorConfig, source: TokenSource, device: torch.device) -> None:
        self.run_config, self.device = run_config, device
        self.tokenizer_url = source.tokenizer_url
        model = Prior(run_config.model).to(device)
        if run_config.training.engine.compile:
            compile_blocks(model.blocks)
        self.modules: dict[str, nn.Module] = {"prior": model}
        self._tokenizer: Tokenizer | None = None

    def phases(self, step: int) -> list[str]:
        """The model, always."""
        return ["prior"]

    def loss(
        self, phase: str, batch: Batch, engines: Engines, context: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cost of a bit in nats; logged too as bits per token."""
        cost = self._cost(batch, engines)
        loss = cost / self.run_config.model.bits
        return loss, {"loss": loss.detach(), "bits_per_token": cost.detach() / log(2)}

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        """Bits per token, exact; the picture shows what the tokens decode to."""
        metrics = {"bits_per_token": float(self._cost(batch, engines)) / log(2)}
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_pretrained(self.tokenizer_url).to(self.device)
        images = self._tokenizer.decode(Tokens(self._bits(batch)[:_NUM_SAMPLE_IMAGES], self.run_config.model.grid))
        images = images if images.ndim == 4 else images[:, :, 0]
        return metrics, torch.cat(list(to_uint8(images)), dim=2).cpu()

    def pop_metrics(self) -> dict[str, float]:
        """Nothing is gathered."""
        return {}

    def bundled_models(self) -> dict[str, str]:
        """The tokenizer goes into the model's folder, so that the folder alone can compress."""
        return {"tokenizer": self.tokenizer_url}

    def _bits(self, batch: Batch) -> Tensor:
        model_config = self.run_config.model
        bits_BNL = unpack_bits(batch.values_B.to(self.device), model_config.num_tokens * model_config.bits)
        return bits_BNL.unflatten(1, (model_config.num_tokens, model_config.bits))

    def _cost(self, batch: Batch, engines: Engines) -> Tensor:
        sub_tokens_BNS = bits_to_integers(self._bits(batch), self.run_config.model.sub_bits)
        logits_BNSK = engines["prior"](sub_tokens_BNS)
        return code_length(logits_BNSK, sub_tokens_BNS, self.run_config.model.sub_bits).sum(2).mean()
