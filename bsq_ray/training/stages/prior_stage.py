"""Training stage of the prior: code length of every bit given the previous tokens.

    bits ─▶ sub-tokens ─causal model─▶ logits ─▶ code length in nats

Shape suffixes: B images, N tokens, S sub-tokens of a token, L bits of a token.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.data.data_source import Batch, DataSource
from bsq_ray.data.mixture import MixtureSource
from bsq_ray.data.token_table import TokenSource
from bsq_ray.data.transforms import to_uint8
from bsq_ray.models.prior import Prior, code_length
from bsq_ray.models.quantizers.bits import bits_to_integers, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.runtime.device import to_device
from bsq_ray.training.stages.stage import Engines, PhaseOutput, Stage, StepContext, compile_blocks

_NUM_SAMPLE_IMAGES = 8


class PriorStage(Stage):
    """Trains a `Prior` on a token table."""

    def __init__(self, run_config: config.PriorConfig, source: DataSource, device: torch.device) -> None:
        self.run_config, self.device = run_config, device
        assert isinstance(source, TokenSource | MixtureSource)
        self.tokenizer_url = source.tokenizer_url
        model = Prior(run_config.model).to(device)
        if run_config.training.engine.compile:
            compile_blocks(model.blocks)
        self.modules: dict[str, nn.Module] = {"prior": model}
        self._tokenizer: Tokenizer | None = None

    def phases(self, step: int) -> list[str]:
        """Return the prior, the only module to optimize."""
        return ["prior"]

    def loss(self, phase: str, batch: Batch, engines: Engines, context: StepContext | None, step: int) -> PhaseOutput:
        """Return the mean code length per bit in nats as the loss, and bits per token as a metric."""
        token_nats = self._token_nats(batch, engines)
        loss = token_nats / self.run_config.model.bits
        return PhaseOutput(loss, {"loss": loss.detach(), "bits_per_token": token_nats.detach() / log(2)})

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        """Return the exact bits per token, and a sample image with the decoded tokens of the first images."""
        metrics = {"bits_per_token": float(self._token_nats(batch, engines)) / log(2)}
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_pretrained(self.tokenizer_url).to(self.device)
        images = self._tokenizer.decode(Tokens(self._bits(batch)[:_NUM_SAMPLE_IMAGES], self.run_config.model.grid))
        images = images if images.ndim == 4 else images[:, :, 0]
        return metrics, torch.cat(list(to_uint8(images)), dim=2).cpu()

    def pop_metrics(self) -> dict[str, float]:
        """Return an empty dictionary, because no metric is accumulated between steps."""
        return {}

    def bundled_models(self) -> dict[str, str]:
        """Return the URL of the tokenizer, which the codec needs."""
        return {"tokenizer": self.tokenizer_url}

    def _bits(self, batch: Batch) -> Tensor:
        model_config = self.run_config.model
        bits_BNL = unpack_bits(to_device(batch.values_B, self.device), model_config.num_tokens * model_config.bits)
        return bits_BNL.unflatten(1, (model_config.num_tokens, model_config.bits))

    def _token_nats(self, batch: Batch, engines: Engines) -> Tensor:
        sub_tokens_BNS = bits_to_integers(self._bits(batch), self.run_config.model.sub_bits)
        logits_BNSK = engines["prior"](sub_tokens_BNS)
        return code_length(logits_BNSK, sub_tokens_BNS, self.run_config.model.sub_bits).sum(2).mean()
