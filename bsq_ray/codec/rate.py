"""Rates of nested bits: the number of bits per token that a file stores, and its division into planes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.codec.plane_groups import BitRange
from bsq_ray.codec.plane_index import plane_ranges


@dataclass(frozen=True)
class Rate:
    """The rate of a file: a number of bits per token, or a target that selects it; by default all bits.

    Attributes:
        bits: bits per token.
        target_bytes: largest size of the file; selects the largest number of bits that fits.
        target_lpips: largest LPIPS (alex) of the decoded image; selects the smallest number of bits that reaches it.

    Raises:
        ValueError: more than one attribute is set, or one is out of range.
    """

    bits: int | None = None
    target_bytes: int | None = None
    target_lpips: float | None = None

    def __post_init__(self) -> None:
        values = [value for value in (self.bits, self.target_bytes, self.target_lpips) if value is not None]
        if len(values) > 1:
            raise ValueError("choose one of --bits, --target-bytes and --target-lpips")
        if any(value <= 0 for value in values):
            raise ValueError(f"a rate must be above 0, got {values[0]}")

    @property
    def is_default(self) -> bool:
        """Return whether all bits are stored."""
        return self == Rate()


@dataclass(frozen=True)
class PlaneLayout:
    """Division of tokens into planes.

    Attributes:
        keep: numbers of bits that the tokenizer was trained with, where planes end; the last one is all bits.
        unit: planes end after multiples of this number of bits.
    """

    keep: tuple[int, ...]
    unit: int = 1

    @property
    def selectable_bits(self) -> Sequence[int]:
        """Numbers of bits per token that a file can store, ascending."""
        return range(self.unit, self.keep[-1] + 1, self.unit)

    def plane_bits(self, num_bits: int) -> tuple[int, ...]:
        """Return the bits of each plane of tokens with their first `num_bits` bits."""
        stops = [stop for stop in self.keep if stop < num_bits and stop % self.unit == 0] + [num_bits]
        return tuple(stop - start for start, stop in zip([0, *stops], stops, strict=False))

    def ranges(self, candidates: Iterable[int]) -> list[BitRange]:
        """Return the planes of all candidates, each once."""
        return sorted({plane for num_bits in candidates for plane in plane_ranges(self.plane_bits(num_bits))})

    def candidates(self, rate: Rate) -> Sequence[int]:
        """Return the numbers of bits from which a rate is selected, ascending.

        Raises:
            ValueError: the tokens do not have so many bits, or planes cannot end there.
        """
        all_bits = self.keep[-1]
        if rate.is_default:
            return [all_bits]
        if rate.bits is None:
            return self.selectable_bits
        if rate.bits > all_bits or rate.bits % self.unit:
            step = f" in steps of {self.unit}, the bits of a sub-token of the prior" if self.unit > 1 else ""
            raise ValueError(f"tokens cannot be cut to {rate.bits} bits; use {self.unit} to {all_bits}{step}")
        return [rate.bits]


def build_plane_layout(
    quantizer_config: config.QuantizerConfig, prior_config: config.PriorModelConfig | None
) -> PlaneLayout | None:
    """Return the planes of a quantizer with nested bits; None if files contain all bits.

    Raises:
        ValueError: the prior codes planes, and the quantizer has no nested bits.
    """
    keep = quantizer_config.keep if isinstance(quantizer_config, config.BSQConfig | config.LFQConfig) else ()
    if prior_config is None:
        return PlaneLayout(keep) if keep else None
    if prior_config.order == "token":
        return None
    if not keep:
        raise ValueError(
            "the prior codes planes (model.order plane), but its tokenizer has no nested bits (model.quantizer.keep); "
            "train a prior with model.order token"
        )
    return PlaneLayout(keep, prior_config.sub_bits)
