"""Files of earlier models with the same tokens: which of these models wrote a file.

A tokenizer whose decoder alone was trained further decodes the files of its earlier models, to pixels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bsq_ray.codec.container import read_header
from bsq_ray.codec.header import TokenFormat


def readable_formats(token_format: TokenFormat, same_tokens: Sequence[str]) -> tuple[TokenFormat, ...]:
    """Return the formats of the files that a codec can decode, its own first.

    Args:
        token_format: format of the files that it writes.
        same_tokens: ids of earlier tokenizers with the same tokens, hexadecimal.
    """
    return token_format, *(replace(token_format, tokenizer_id=bytes.fromhex(model_id)) for model_id in same_tokens)


def written_format(formats: Sequence[TokenFormat], data: bytes, max_pixels: int) -> TokenFormat:
    """Return the format whose models wrote a file; the first one if none did.

    Raises:
        ValueError: the file is damaged, of a newer version, or too large.
    """
    if len(formats) == 1:
        return formats[0]
    header = read_header(data, max_pixels)
    written = (one for one in formats if header.is_written_with(one.tokenizer_id, one.prior_id))
    return next(written, formats[0])


def decoder_remark(formats: Sequence[TokenFormat], data: bytes, max_pixels: int) -> str:
    """Return a remark if a file was written with an earlier decoder of the same tokens, otherwise an empty text.

    Raises:
        ValueError: see `written_format`.
    """
    token_format = written_format(formats, data, max_pixels)
    if token_format == formats[0]:
        return ""
    return (
        f"written with another decoder of the same tokens (tokenizer {token_format.tokenizer_id[:6].hex()}), so the "
        "pixels are those of this decoder"
    )
