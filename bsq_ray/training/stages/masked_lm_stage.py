"""The masked language model's stage: hide a random share of the tokens, predict them from the rest.

    bits ─▶ sub-tokens ─masked by the cosine schedule─▶ model ─▶ cross entropy at the masked places

Shape suffixes: B images, N tokens, S sub-tokens of a token, V values of a sub-token, L bits of a token.
"""

from __future__ import annotations

import hashlib
from math import log, pi
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.data.data_source import Batch
from bsq_ray.data.token_table import TokenSource
from bsq_ray.data.transforms import to_uint8
from bsq_ray.models.masked_lm import MaskedLM, masked_cross_entropy
from bsq_ray.models.quantizers.bits import unpack_bits
from bsq_ray.models.sampling import sample
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.training.stages.stage import Engines, Stage, compile_blocks

_PICTURED = 8


class MaskedLMStage(Stage):
    """Trains a `MaskedLM` on a token table."""

    def __init__(self, run: config.MaskedLMConfig, source: TokenSource, device: torch.device) -> None:
        self.run, self.device = run, device
        self.tokenizer_url = source.tokenizer_url
        model = MaskedLM(run.model).to(device)
        if run.training.engine.compile:
            compile_blocks(model.blocks)
        self.modules: dict[str, nn.Module] = {"masked_lm": model}
        self._tokenizer: Tokenizer | None = None

    def phases(self, step: int) -> list[str]:
        """The model, always."""
        return ["masked_lm"]

    def loss(
        self, phase: str, batch: Batch, engines: Engines, carry: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, smoothed, at masked places."""
        section, model = self.run.loss, self._model(engines)
        tokens_BNS = self._sub_tokens(model, batch)
        masked_BNS, dropped_B = self._hide(batch.keys, step, section.class_dropout)
        # Still on the host, where checking them waits for nothing.
        classes_BC = model.classes_of(batch.labels_B.masked_fill(dropped_B, model.any_class)).to(self.device)
        logits_BNSV = engines[phase](tokens_BNS.masked_fill(masked_BNS, model.mask), classes_BC)
        loss = masked_cross_entropy(logits_BNSV, tokens_BNS, masked_BNS, section.label_smoothing)
        right_BNS = (logits_BNSV.argmax(-1) == tokens_BNS) & masked_BNS
        accuracy = right_BNS.sum() / masked_BNS.sum()
        return loss, {"loss": loss.detach(), "accuracy": accuracy.detach()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        """Bits that a masked token costs, at masks of all sizes; pictured: decoded images over drawn ones.

        The masks depend on the samples alone, so that evaluations can be compared.
        """
        model = self._model(engines)
        tokens_BNS = self._sub_tokens(model, batch)
        masked_BNS, _ = self._hide(batch.keys, -1, 0.0)
        classes_BC = model.classes_of(batch.labels_B).to(self.device)
        logits_BNSV = engines["masked_lm"](tokens_BNS.masked_fill(masked_BNS, model.mask), classes_BC)
        nats = float(masked_cross_entropy(logits_BNSV, tokens_BNS, masked_BNS, 0.0))
        shown = slice(0, _PICTURED)
        drawn_BNL = sample(
            model, classes_BC[shown], self.run.sampling, self.run.training.seed, predict=engines["masked_lm"]
        )
        rows = [self._decode(bits_BNL) for bits_BNL in (model.join(tokens_BNS[shown]), drawn_BNL)]
        picture = torch.cat([torch.cat(list(to_uint8(row)), dim=2) for row in rows], dim=1)
        return {"bits_per_token": nats / log(2) * self.run.model.sub_tokens}, picture.cpu()

    def summarise(self) -> dict[str, float]:
        """Nothing is gathered."""
        return {}

    def companions(self) -> dict[str, str]:
        """The tokenizer goes into the model's folder, so that the folder alone can make pixels."""
        return {"tokenizer": self.tokenizer_url}

    def _model(self, engines: Engines) -> MaskedLM:
        return cast(MaskedLM, engines["masked_lm"].module)

    def _sub_tokens(self, model: MaskedLM, batch: Batch) -> Tensor:
        section = self.run.model
        bits_BNL = unpack_bits(batch.values_B.to(self.device), section.tokens * section.bits)
        return model.split(bits_BNL.unflatten(1, (section.tokens, section.bits)))

    def _hide(self, keys: list[str], step: int, class_dropout: float) -> tuple[Tensor, Tensor]:
        """What is masked (B, N, S), and on the host whose class is hidden (B,).

        Drawn from (seed, step, key) of each sample, so that it does not depend on the number of workers.
        """
        section = self.run.model
        units = section.tokens * (1 if section.mask_by == "token" else section.sub_tokens)
        masks, dropped = [], []
        for key in keys:
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            rng = np.random.default_rng((self.run.training.seed, step + 1, int.from_bytes(digest)))
            share = np.cos(pi / 2 * rng.random())
            order = rng.permutation(units)
            masks.append(order < max(1, round(units * share)))
            dropped.append(rng.random() < class_dropout)
        masked_BU = torch.from_numpy(np.stack(masks)).to(self.device)
        masked_BNS = masked_BU.view(len(keys), section.tokens, -1).expand(-1, -1, section.sub_tokens)
        return masked_BNS, torch.tensor(dropped)

    def _decode(self, bits_BNL: Tensor) -> Tensor:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_pretrained(self.tokenizer_url).to(self.device)
        images: Tensor = self._tokenizer.decode(Tokens(bits_BNL, self.run.model.grid))
        return images if images.ndim == 4 else images[:, :, 0]
