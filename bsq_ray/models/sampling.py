"""Drawing images from a masked language model: all tokens masked, then the surest predictions kept, step by step.

    masked tokens ─model, guided─▶ a value and a confidence for each ─▶ the surest stay, the others are masked again

After step t of T, cos(π/2 · t/T) of the tokens are still masked (MaskGIT; Chang et al., CVPR 2022). Randomness comes
from one generator per image, seeded by (seed, number of the image), so an image does not depend on its batch.

Shape suffixes: B images, N tokens, S sub-tokens of a token, V values of a sub-token, C classes and "any class", U units
that are masked as a whole (tokens or sub-tokens) of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import cos, pi

import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.masked_lm import MaskedLM


def num_masked(step: int, steps: int, units: int) -> int:
    """Units still masked after `step` of `steps` steps: the cosine schedule, with at least one revealed each step."""
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
    """Sub-tokens (B, N, S) after each step, masked ones being `model.mask`; the last ones are complete.

    Args:
        classes_BC: weights of the classes, see `MaskedLM.classes_of`.
        section: number of steps, temperature of the noise on confidences, guidance.
        seed, first: image b is drawn with the generator of (seed, first + b).
        given_BNS, open_BN: inpainting: sub-tokens of images, and which tokens are to be drawn anew.
        predict: what to call instead of the model, such as an engine that holds it.

    Raises:
        ValueError: only one of `given_BNS` and `open_BN` is given.
    """
    device, batch = classes_BC.device, len(classes_BC)
    if (known_BNS is None) != (inpaint_mask_BN is None):
        raise ValueError("inpainting needs both the tokens of the images and which of them are to be drawn anew")
    shape = (model.config.num_tokens, model.config.num_sub_tokens)
    if known_BNS is None or inpaint_mask_BN is None:
        inpaint_mask_BN = torch.ones(batch, shape[0], dtype=torch.bool, device=device)
        known_BNS = torch.full((batch, *shape), model.mask_token, device=device)
    generators = [_image_generator(seed, first_index + b) for b in range(batch)]
    masked_BNS = inpaint_mask_BN[..., None].expand(-1, -1, shape[1])
    tokens_BNS = known_BNS.masked_fill(masked_BNS, model.mask_token)
    by_token = model.config.mask_unit == "token"
    # Read once: on a GPU every look at a number waits for all work before it.
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
    """The bits (B, N, L) of drawn images; arguments as `sample_steps`."""
    *_, tokens_BNS = sample_steps(
        model, classes_BC, sampling_config, seed, first_index, known_BNS, inpaint_mask_BN, predict
    )
    return model.join_bits(tokens_BNS)


def interpolate_classes(model: MaskedLM, labels: Sequence[int], steps: int) -> Tensor:
    """Weights (steps, C) that go from the first of two classes to the second.

    Raises:
        ValueError: not two classes of the model, or fewer than two steps.
    """
    if len(labels) != 2 or steps < 2:
        raise ValueError(f"interpolation goes between two classes in at least two steps, not {labels} in {steps}")
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
    """Logits with classifier-free guidance, l_c + α (l_c - l_any); both halves run in one batch."""
    alpha = sampling_config.guidance_scale * (
        step / sampling_config.steps if sampling_config.guidance_schedule == "ramped" else 1.0
    )
    if not alpha:
        return predict(tokens_BNS, classes_BC)
    null_BC = torch.zeros_like(classes_BC)
    null_BC[:, null_class] = 1
    conditional, unconditional = predict(tokens_BNS.repeat(2, 1, 1), torch.cat([classes_BC, null_BC])).chunk(2)
    return torch.lerp(unconditional, conditional, 1 + alpha)


def _sample_categorical(logits_BNSV: Tensor, uniform_BNS: Tensor) -> tuple[Tensor, Tensor]:
    """A value from each distribution by inverting its cumulated sum, and its log probability."""
    log_probs_BNSV = logits_BNSV.log_softmax(-1)
    cdf_BNSV = log_probs_BNSV.exp().cumsum(-1)
    indices_BNS1 = torch.searchsorted(cdf_BNSV, uniform_BNS[..., None] * cdf_BNSV[..., -1:], right=True)
    indices_BNS1 = indices_BNS1.clamp(max=logits_BNSV.shape[-1] - 1)
    return indices_BNS1.squeeze(-1), log_probs_BNSV.gather(-1, indices_BNS1).squeeze(-1)


def _lowest_confidence(confidence_BU: Tensor, masked_BU: Tensor, num_masked_B: Tensor) -> Tensor:
    """Which of the masked units stay masked: the `count_B` least sure ones."""
    ranks_BU = confidence_BU.masked_fill(~masked_BU, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks_BU < num_masked_B[:, None]


def _image_generator(seed: int, image_index: int) -> torch.Generator:
    # Any two (seed, image) must differ, and neighbours must be unlike each other.
    mixed_seed = (seed * 0x9E3779B97F4A7C15 + image_index * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**63
    return torch.Generator().manual_seed(mixed_seed)


def _uniform(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1), (B, *shape)."""
    numbers = torch.stack([torch.rand(tuple(shape), generator=g, dtype=torch.float64) for g in generators])
    return numbers.clamp(1e-12, 1 - 1e-7).float().to(device)
