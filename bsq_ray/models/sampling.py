"""Sampling from a masked language model by iterative decoding (MaskGIT; Chang et al., CVPR 2022).

    masked tokens ─model with guidance─▶ a sample and a confidence for each ─▶ keep the most confident, mask the others
          ▲                                                                                     │
          └──────────────────────────────────── next step ──────────────────────────────────────┘

After step t of T, a fraction cos(π/2 · t/T) of the tokens is still masked. Each image has its own random generator,
seeded with (seed, index of the image), so an image does not depend on its batch.

Shape suffixes: B images, N tokens, S sub-tokens of a token, V values of a sub-token, C classes and the null class,
U units of an image that are masked as a whole (tokens or sub-tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import cos, pi

import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.runtime.random_streams import RandomStream, stream_seed


def num_masked(step: int, steps: int, units: int) -> int:
    """Return the units masked after `step` of `steps` steps: a cosine schedule, at least one fewer each step."""
    if step >= steps:
        return 0
    return max(0, min(int(units * cos(pi / 2 * step / steps)), units - step))


@torch.no_grad()
def sample_steps(
    model: MaskedLM,
    classes_BC: Tensor,
    sampling_config: config.SamplingConfig,
    seed: int,
    first_index: int = 0,
    known_BNS: Tensor | None = None,
    inpaint_mask_BN: Tensor | None = None,
    predict: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the sub-tokens (B, N, S) after each step; masked ones have the value `model.mask_token`.

    Args:
        classes_BC: weights of the classes, see `MaskedLM.class_weights`.
        sampling_config: number of steps, temperature of the noise on confidences, guidance.
        seed, first_index: image b uses the generator of (seed, first_index + b).
        known_BNS: for inpainting: sub-tokens of the images.
        inpaint_mask_BN: for inpainting: True for the tokens to sample.
        predict: replaces the model's forward pass.

    Raises:
        ValueError: only one of `known_BNS` and `inpaint_mask_BN` is given.
    """
    device, batch = classes_BC.device, len(classes_BC)
    if (known_BNS is None) != (inpaint_mask_BN is None):
        raise ValueError("inpainting needs both the tokens of the images and the mask of the tokens to sample")
    shape = (model.config.num_tokens, model.config.num_sub_tokens)
    if known_BNS is None or inpaint_mask_BN is None:
        inpaint_mask_BN = torch.ones(batch, shape[0], dtype=torch.bool, device=device)
        known_BNS = torch.full((batch, *shape), model.mask_token, device=device)
    generators = [_image_generator(seed, first_index + b) for b in range(batch)]
    masked_BNS = inpaint_mask_BN[..., None].expand(-1, -1, shape[1])
    tokens_BNS = known_BNS.masked_fill(masked_BNS, model.mask_token)
    by_token = model.config.mask_unit == "token"
    # Read once: on a GPU every copy to the host waits for all queued kernels.
    num_units_B: list[int] = (inpaint_mask_BN.sum(1) * (1 if by_token else shape[1])).tolist()
    for step in range(1, sampling_config.steps + 1):
        logits_BNSV = _guided_logits(predict or model, model.null_class, tokens_BNS, classes_BC, sampling_config, step)
        sampled_BNS, log_probs_BNS = _sample_categorical(logits_BNSV, _uniform(generators, shape, device))
        confidence_BU = log_probs_BNS.sum(2) if by_token else log_probs_BNS.flatten(1)
        noise_BU = -torch.log(-torch.log(_uniform(generators, confidence_BU.shape[1:], device)))
        confidence_BU = confidence_BU + sampling_config.temperature * (1 - step / sampling_config.steps) * noise_BU
        masked_BU = masked_BNS[..., 0] if by_token else masked_BNS.flatten(1)
        tokens_BNS = torch.where(masked_BNS, sampled_BNS, tokens_BNS)
        num_masked_B = torch.tensor(
            [num_masked(step, sampling_config.steps, units) for units in num_units_B], device=device
        )
        masked_BU = _lowest_confidence(confidence_BU, masked_BU, num_masked_B)
        masked_BNS = masked_BU[..., None].expand_as(masked_BNS) if by_token else masked_BU.view_as(masked_BNS)
        tokens_BNS = tokens_BNS.masked_fill(masked_BNS, model.mask_token)
        yield tokens_BNS


def sample(
    model: MaskedLM,
    classes_BC: Tensor,
    sampling_config: config.SamplingConfig,
    seed: int,
    first_index: int = 0,
    known_BNS: Tensor | None = None,
    inpaint_mask_BN: Tensor | None = None,
    predict: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sample images; return their bits (B, N, L). Arguments as in `sample_steps`."""
    *_, tokens_BNS = sample_steps(
        model, classes_BC, sampling_config, seed, first_index, known_BNS, inpaint_mask_BN, predict
    )
    return model.join_bits(tokens_BNS)


def interpolate_classes(model: MaskedLM, labels: Sequence[int], steps: int) -> Tensor:
    """Return class weights (steps, C) from the first of two classes to the second.

    Raises:
        ValueError: there are not two classes, one is unknown, or there are fewer than two steps.
    """
    if len(labels) != 2 or steps < 2:
        raise ValueError(
            f"interpolation needs two classes and at least two steps, got classes {list(labels)} and {steps} steps"
        )
    first_C, last_C = model.class_weights(torch.tensor(labels))
    weight_B1 = torch.linspace(0, 1, steps)[:, None]
    return (1 - weight_B1) * first_C + weight_B1 * last_C


def _guided_logits(
    predict: Callable[[Tensor, Tensor], Tensor],
    null_class: int,
    tokens_BNS: Tensor,
    classes_BC: Tensor,
    sampling_config: config.SamplingConfig,
    step: int,
) -> Tensor:
    """Return logits with classifier-free guidance, l_c + α (l_c - l_null); both halves run in one batch."""
    alpha = sampling_config.guidance_scale * (
        step / sampling_config.steps if sampling_config.guidance_schedule == "linear" else 1.0
    )
    if not alpha:
        return predict(tokens_BNS, classes_BC)
    null_BC = torch.zeros_like(classes_BC)
    null_BC[:, null_class] = 1
    conditional, unconditional = predict(tokens_BNS.repeat(2, 1, 1), torch.cat([classes_BC, null_BC])).chunk(2)
    return torch.lerp(unconditional, conditional, 1 + alpha)


def _sample_categorical(logits_BNSV: Tensor, uniform_BNS: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a value from each distribution by inverting its CDF; also return its log probability, (B, N, S) each."""
    log_probs_BNSV = logits_BNSV.log_softmax(-1)
    cdf_BNSV = log_probs_BNSV.exp().cumsum(-1)
    indices_BNS1 = torch.searchsorted(cdf_BNSV, uniform_BNS[..., None] * cdf_BNSV[..., -1:], right=True)
    indices_BNS1 = indices_BNS1.clamp(max=logits_BNSV.shape[-1] - 1)
    return indices_BNS1.squeeze(-1), log_probs_BNSV.gather(-1, indices_BNS1).squeeze(-1)


def _lowest_confidence(confidence_BU: Tensor, masked_BU: Tensor, num_masked_B: Tensor) -> Tensor:
    """Return which masked units stay masked (B, U): the `num_masked_B` least confident ones."""
    ranks_BU = confidence_BU.masked_fill(~masked_BU, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks_BU < num_masked_B[:, None]


def _image_generator(seed: int, image_index: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(RandomStream.GENERATED_IMAGE, seed, image_index))


def _uniform(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw uniform random numbers in (0, 1), (B, *shape)."""
    numbers = torch.stack([torch.rand(tuple(shape), generator=g, dtype=torch.float64) for g in generators])
    return numbers.clamp(1e-12, 1 - 1e-7).float().to(device)
