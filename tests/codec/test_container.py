"""The container: roundtrips, and rejection of invalid headers before memory is allocated."""

import tracemalloc
import zlib
from dataclasses import replace
from fractions import Fraction

import pytest

from bsq_ray.codec.container import Header, VideoHeader, read_container, read_header, validate_header, write_container
from bsq_ray.codec.rect import Rect
from bsq_ray.media.color import SRGB

IMAGE = Header(
    coding=0,
    tolerance=14,
    width=70,
    height=40,
    tile_size=32,
    patch_size=8,
    bits=10,
    group_size=2,
    tokenizer=b"tokenize",
    prior=bytes(8),
)
CLIP = replace(IMAGE, clip=VideoHeader(9, 4, Fraction(30000, 1001), SRGB))


def forge_file(header, entries=b""):
    """Header and index as they are given, with the checksum that belongs to them."""
    header_and_index = header.pack() + entries
    return header_and_index + zlib.crc32(header_and_index).to_bytes(4, "little")


def test_container_write_and_read_roundtrip():
    payloads = [bytes([n]) * (5 + n) for n in range(6)]
    token_crcs = [[n, n + 1, n + 2, n + 3] for n in range(6)]
    container = read_container(write_container(CLIP, payloads, token_crcs))
    assert container.header == CLIP
    assert [container.payload(n) for n in range(6)] == payloads
    assert all(container.token_crc(n, f) == CLIP.header_bound_crc(token_crcs[n][f]) for n in range(6) for f in range(4))
    assert container.num_complete_groups == 6
    assert read_container(write_container(IMAGE, payloads[:2], [[1], [2]])).header == IMAGE


def test_iter_groups_raster_order_and_selection_by_tiles():
    header = replace(IMAGE, width=32 * 5, height=32 * 3)
    assert [index for index, _ in header.iter_groups()] == list(range(6))
    assert list(header.iter_groups())[4] == (4, Rect(2, 2, 3, 4))
    assert [index for index, _ in header.iter_groups(Rect(0, 3, 2, 5))] == [1, 2]


def test_header_bound_crc_depends_on_header():
    assert IMAGE.header_bound_crc(7) != replace(IMAGE, width=71).header_bound_crc(7)
    assert IMAGE.header_bound_crc(7) != IMAGE.header_bound_crc(8)


def test_read_container_truncated_file_needs_opt_in():
    data = write_container(IMAGE, [b"first", b"second"], [[1], [2]])
    with pytest.raises(ValueError, match=f"truncated: got {len(data) - 1} of {len(data)} bytes"):
        read_container(data[:-1])
    part = read_container(data[:-1], require_complete=False)
    assert part.payload(0) == b"first"
    assert part.payload(1) is None
    assert part.num_complete_groups == 1
    with pytest.raises(ValueError, match="1 bytes follow its end"):
        read_container(data + b"x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 2**31, "height": 2**31}, "claims 2147483648 x 2147483648 pixels"),
        ({"width": 2**32 - 1, "height": 1}, "claims 4294967295 x 1 pixels"),
        ({"width": 0}, "claims 0 x 40 pixels"),
        ({"width": 2**27, "height": 1, "tile_size": 8, "patch_size": 8}, "the limit is 268435456 pixels in all tiles"),
        ({"width": 2**20, "height": 128, "tile_size": 1, "patch_size": 1, "group_size": 1}, "header and index need"),
        ({"tile_size": 65535, "patch_size": 255, "group_size": 4}, "the limit is 268435456 pixels in all tiles"),
        ({"patch_size": 0}, "invalid tiles, tokens or coding"),
        ({"tile_size": 33}, "invalid tiles, tokens or coding"),
        ({"bits": 0}, "invalid tiles, tokens or coding"),
        ({"bits": 255}, "invalid tiles, tokens or coding"),
        ({"group_size": 0}, "invalid tiles, tokens or coding"),
        ({"group_size": 255}, "invalid tiles, tokens or coding"),
        ({"coding": 2}, "invalid tiles, tokens or coding"),
        ({"tolerance": 255}, "invalid tiles, tokens or coding"),
        ({"clip": VideoHeader(2**32 - 1, 65535, Fraction(1), SRGB)}, "header and index need"),
        ({"clip": VideoHeader(2**32 - 1, 1, Fraction(1), SRGB)}, "header and index need"),
        ({"clip": VideoHeader(0, 1, Fraction(1), SRGB)}, "without frames or without a frame rate"),
        ({"clip": VideoHeader(5, 0, Fraction(1), SRGB)}, "without frames or without a frame rate"),
        ({"clip": VideoHeader(5, 1, Fraction(0), SRGB)}, "without frames or without a frame rate"),
    ],
)
def test_read_container_invalid_header_raises_without_allocating(changes, message):
    data = forge_file(replace(IMAGE, **changes)) + bytes(1000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_container(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_read_container_invalid_lengths_raise():
    forged_data = forge_file(IMAGE, (2**32 - 1).to_bytes(4, "little") * 6) + b"payload"
    with pytest.raises(ValueError, match="truncated"):
        read_container(forged_data)
    assert read_container(forged_data, require_complete=False).payload(0) is None


def test_read_header_foreign_or_damaged_file_raises():
    data = write_container(IMAGE, [b"", b""], [[1], [2]])
    with pytest.raises(ValueError, match="not a .bsq file"):
        read_header(b"\x89PNG" + data[4:])
    with pytest.raises(ValueError, match=r"format version 2; this version of bsq_ray reads version 1"):
        read_header(data[:4] + b"\x02" + data[5:])
    with pytest.raises(ValueError, match="neither an image nor a clip"):
        read_header(data[:5] + b"\x07" + data[6:])
    with pytest.raises(ValueError, match="the header needs 37 bytes, got"):
        read_header(data[:20])
    with pytest.raises(ValueError, match="the header needs [0-9]+ bytes, got"):
        read_header(CLIP.pack()[:40])
    unreduced = CLIP.pack().replace((30000).to_bytes(4, "little"), (60000).to_bytes(4, "little"))
    unreduced = unreduced.replace((1001).to_bytes(4, "little"), (2002).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="not in lowest terms"):
        read_header(unreduced)
    damaged = bytearray(data)
    damaged[30] ^= 1
    with pytest.raises(ValueError, match="do not match their checksum"):
        read_container(bytes(damaged))


def test_validate_header_custom_pixel_limit_raises():
    with pytest.raises(ValueError, match="the limit is 1 to 100 pixels"):
        validate_header(IMAGE, 100)
