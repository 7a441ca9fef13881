"""Integer probabilities on which encoder and decoder cannot disagree, though their logits differ in the last digits.

    logit ─▶ nearest step of a grid of 1/4 ─▶ a table of integers ─▶ probability of a 1

The encoder knows its logit only up to the tolerance ε by which the decoder's may differ. Where it lies within ε of a
boundary between two steps, it writes down which of the two it took; everywhere else both round alike. What is written
down is a list of places, sorted: see `side.py`.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

# Steps are numbered -SPAN to SPAN; logits beyond are clipped, which bounds what a surprising bit costs.
STEP = 0.25
SPAN = 40
# Probabilities are multiples of 2^-16.
SCALE = 16


@cache
def table() -> np.ndarray:
    """Probability of a 1 at each step, as integers out of 2^16, uint32 (2 · SPAN + 1,).

    round(2^16 / (1 + e^-x)) in decimal arithmetic of 50 digits, so that every machine computes the same integers.
    """
    with localcontext() as context:
        context.prec = 50
        one = Decimal(1)
        steps = [one / (one + (-Decimal(n) * Decimal(str(STEP))).exp()) for n in range(-SPAN, SPAN + 1)]
        return np.array([int((p * 2**SCALE).to_integral_value()) for p in steps], np.uint32)


def probabilities(steps: np.ndarray) -> np.ndarray:
    """Probability of a 1 for each step, float64: a multiple of 2^-16, so exact."""
    exact: np.ndarray = table()[steps + SPAN] / 2.0**SCALE
    return exact


def round_logits(logits: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's rounding: steps (int64), and whether each is too close to a boundary to be sure of.

    Args:
        logits: float64.
        tolerance: the largest difference between the encoder's and the decoder's logit.
    """
    scaled = np.clip(logits / STEP, -SPAN, SPAN)
    # To the boundary between floor and floor + 1; what is clipped has none beyond the ends.
    to_boundary = np.abs(scaled - np.floor(scaled) - 0.5)
    inside = np.abs(scaled) < SPAN
    return _nearest(scaled), (to_boundary <= tolerance / STEP) & inside


def settle(logits: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The decoder's rounding where the encoder wrote down its choice: the step above or below the nearest boundary.

    Args:
        logits: float64, of the places in the list only.
        upper: whether the encoder took the step above.
    """
    boundary = np.floor(np.clip(logits / STEP, -SPAN, SPAN)).clip(-SPAN, SPAN - 1)
    steps: np.ndarray = boundary.astype(np.int64) + upper.astype(np.int64)
    return steps


def is_upper(logits: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Whether the step taken is the one above the boundary that the logit is near to."""
    boundary = np.floor(np.clip(logits / STEP, -SPAN, SPAN)).clip(-SPAN, SPAN - 1)
    upper: np.ndarray = steps > boundary
    return upper


def _nearest(scaled: np.ndarray) -> np.ndarray:
    nearest: np.ndarray = np.floor(scaled + 0.5).astype(np.int64).clip(-SPAN, SPAN)
    return nearest
