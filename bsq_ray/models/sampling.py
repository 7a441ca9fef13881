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


def masked_after(step: int, steps: int, units: int) -> int:
    """Units still masked after `step` of `steps` steps: the cosine schedule, with at least one revealed each step."""
    if step >= steps:
        return 0
    return max(0, min(int(units * cos(pi / 2 * step / steps)), units - step))


@torch.no_grad()
def sample_steps(
    model: MaskedLM,
    classes_BC: Tensor,
    section: config.Sampling,
    seed: int,
    first: int = 0,
    given_BNS: Tensor | None = None,
    open_BN: Tensor | None = None,
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
    if (given_BNS is None) != (open_BN is None):
        raise ValueError("inpainting needs both the tokens of the images and which of them are to be drawn anew")
    shape = (model.config.tokens, model.config.sub_tokens)
    if given_BNS is None or open_BN is None:
        open_BN = torch.ones(batch, shape[0], dtype=torch.bool, device=device)
        given_BNS = torch.full((batch, *shape), model.mask, device=device)
    generators = [_generator(seed, first + b) for b in range(batch)]
    masked_BNS = open_BN[..., None].expand(-1, -1, shape[1])
    tokens_BNS = given_BNS.masked_fill(masked_BNS, model.mask)
    by_token = model.config.mask_by == "token"
    # Read once: on a GPU every look at a number waits for all work before it.
    units_B: list[int] = (open_BN.sum(1) * (1 if by_token else shape[1])).tolist()
    for step in range(1, section.steps + 1):
        logits_BNSV = _guided(predict or model, model.any_class, tokens_BNS, classes_BC, section, step)
        drawn_BNS, surety_BNS = _draw(logits_BNSV, _uniform(generators, shape, device))
        confidence_BU = surety_BNS.sum(2) if by_token else surety_BNS.flatten(1)
        noise_BU = -torch.log(-torch.log(_uniform(generators, confidence_BU.shape[1:], device)))
        confidence_BU = confidence_BU + section.temperature * (1 - step / section.steps) * noise_BU
        masked_BU = masked_BNS[..., 0] if by_token else masked_BNS.flatten(1)
        tokens_BNS = torch.where(masked_BNS, drawn_BNS, tokens_BNS)
        left_B = torch.tensor([masked_after(step, section.steps, units) for units in units_B], device=device)
        masked_BU = _least_sure(confidence_BU, masked_BU, left_B)
        masked_BNS = masked_BU[..., None].expand_as(masked_BNS) if by_token else masked_BU.view_as(masked_BNS)
        tokens_BNS = tokens_BNS.masked_fill(masked_BNS, model.mask)
        yield tokens_BNS


def sample(
    model: MaskedLM,
    classes_BC: Tensor,
    section: config.Sampling,
    seed: int,
    first: int = 0,
    given_BNS: Tensor | None = None,
    open_BN: Tensor | None = None,
    predict: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The bits (B, N, L) of drawn images; arguments as `sample_steps`."""
    *_, tokens_BNS = sample_steps(model, classes_BC, section, seed, first, given_BNS, open_BN, predict)
    return model.join(tokens_BNS)


def between(model: MaskedLM, labels: Sequence[int], steps: int) -> Tensor:
    """Weights (steps, C) that go from the first of two classes to the second.

    Raises:
        ValueError: not two classes of the model, or fewer than two steps.
    """
    if len(labels) != 2 or steps < 2:
        raise ValueError(f"interpolation goes between two classes in at least two steps, not {labels} in {steps}")
    first_C, last_C = model.classes_of(torch.tensor(labels))
    share_B1 = torch.linspace(0, 1, steps)[:, None]
    return (1 - share_B1) * first_C + share_B1 * last_C


def _guided(
    predict: Callable[[Tensor, Tensor], Tensor],
    any_class: int,
    tokens_BNS: Tensor,
    classes_BC: Tensor,
    section: config.Sampling,
    step: int,
) -> Tensor:
    """Logits with classifier-free guidance, l_c + α (l_c - l_any); both halves run in one batch."""
    alpha = section.guidance * (step / section.steps if section.guidance_schedule == "ramped" else 1.0)
    if not alpha:
        return predict(tokens_BNS, classes_BC)
    none_BC = torch.zeros_like(classes_BC)
    none_BC[:, any_class] = 1
    with_class, without = predict(tokens_BNS.repeat(2, 1, 1), torch.cat([classes_BC, none_BC])).chunk(2)
    return torch.lerp(without, with_class, 1 + alpha)


def _draw(logits_BNSV: Tensor, uniform_BNS: Tensor) -> tuple[Tensor, Tensor]:
    """A value from each distribution by inverting its cumulated sum, and its log probability."""
    logs_BNSV = logits_BNSV.log_softmax(-1)
    sums_BNSV = logs_BNSV.exp().cumsum(-1)
    drawn_BNS1 = torch.searchsorted(sums_BNSV, uniform_BNS[..., None] * sums_BNSV[..., -1:], right=True)
    drawn_BNS1 = drawn_BNS1.clamp(max=logits_BNSV.shape[-1] - 1)
    return drawn_BNS1.squeeze(-1), logs_BNSV.gather(-1, drawn_BNS1).squeeze(-1)


def _least_sure(confidence_BU: Tensor, masked_BU: Tensor, count_B: Tensor) -> Tensor:
    """Which of the masked units stay masked: the `count_B` least sure ones."""
    ranks_BU = confidence_BU.masked_fill(~masked_BU, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks_BU < count_B[:, None]


def _generator(seed: int, image: int) -> torch.Generator:
    # Any two (seed, image) must differ, and neighbours must be unlike each other.
    mixed = (seed * 0x9E3779B97F4A7C15 + image * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**63
    return torch.Generator().manual_seed(mixed)


def _uniform(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1), (B, *shape)."""
    numbers = torch.stack([torch.rand(tuple(shape), generator=g, dtype=torch.float64) for g in generators])
    return numbers.clamp(1e-12, 1 - 1e-7).float().to(device)
