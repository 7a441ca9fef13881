"""Decode request bodies that a client compressed: the header Content-Encoding.

body ─gzip, deflate, br, zstd; the last one first─▶ decoded body of a limited size
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from bsq_ray.serving.errors import ApiError

# `wbits` of zlib that detect a gzip or zlib header, and those of a stream without a header.
_ANY_HEADER, _NO_HEADER = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS


class _TooLargeError(Exception):
    """The decoded body exceeds the limit."""


def parse_content_encoding(header: str) -> list[str]:
    """Return the encodings of a Content-Encoding header in the order in which they were applied.

    Raises:
        ApiError: 415 an encoding is not supported.
    """
    encodings = [name.strip().lower() for name in header.split(",")]
    encodings = [name for name in encodings if name not in ("", "identity")]
    for name in encodings:
        if name not in _DECODERS:
            raise ApiError(
                415,
                f"unsupported Content-Encoding {name[:40]}; send the body as it is, or with {', '.join(_OFFERED)}",
                headers={"Accept-Encoding": ", ".join(_OFFERED)},
            )
    return encodings


def decode_content(data: bytes, encodings: Sequence[str], max_bytes: int) -> bytes:
    """Undo the encodings of a body.

    Args:
        encodings: as `parse_content_encoding` returns them.
        max_bytes: limit of each decoded size; no decoder allocates more.

    Raises:
        ApiError: 413 the decoded body is too large, 422 the body is damaged.
    """
    for name in reversed(encodings):
        try:
            data = _DECODERS[name](data, max_bytes)
        except _TooLargeError:
            raise ApiError(413, f"the body exceeds {max_bytes / 1e6:g} MB after decoding {name}") from None
        except (ValueError, RuntimeError, zlib.error):
            raise ApiError(
                422, f"the body is not valid {name}, or exceeds {max_bytes / 1e6:g} MB after decoding"
            ) from None
    return data


def _inflate(data: bytes, max_bytes: int, wbits: int = _ANY_HEADER) -> bytes:
    """Decode one or more concatenated gzip or zlib streams."""
    parts, num_bytes = [], 0
    while data:
        decoder = zlib.decompressobj(wbits)
        parts.append(decoder.decompress(data, max_bytes - num_bytes + 1))
        num_bytes += len(parts[-1])
        if num_bytes > max_bytes:
            raise _TooLargeError
        if not decoder.eof:
            raise ValueError("the stream is truncated")
        data = decoder.unused_data
    return b"".join(parts)


def _inflate_deflate(data: bytes, max_bytes: int) -> bytes:
    # HTTP means zlib streams, but some clients send them without their header.
    try:
        return _inflate(data, max_bytes)
    except zlib.error:
        return _inflate(data, max_bytes, _NO_HEADER)


def _decode_brotli(data: bytes, max_bytes: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.brotli_decode(data, out=max_bytes))


def _decode_zstd(data: bytes, max_bytes: int) -> bytes:
    import imagecodecs

    try:
        return bytes(imagecodecs.zstd_decode(data, out=max_bytes))
    except imagecodecs.ZstdError as error:
        if "too small" in str(error):
            raise _TooLargeError from None
        raise


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _inflate,
    "x-gzip": _inflate,
    "deflate": _inflate_deflate,
    "br": _decode_brotli,
    "zstd": _decode_zstd,
}
_OFFERED = ("gzip", "deflate", "br", "zstd")
