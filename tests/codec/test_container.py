"""The container: roundtrips, and rejection of invalid headers before memory is allocated."""

import hashlib
import json
import struct
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from bsq_ray import Codec
from bsq_ray.codec.container import read_container, read_header, write_container
from bsq_ray.codec.header import Header, TokenFormat, VideoHeader, validate_header
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.varint import write_varint
from bsq_ray.media.color import SRGB

FORMAT = TokenFormat(32, 8, 10, b"t" * 32, b"")
SIZES = {"tile_size": 32, "patch_size": 8, "bits": 10}
IMAGE = Header(70, 40, 0, 2, FORMAT.model_key, **SIZES)
CLIP = replace(IMAGE, clip=VideoHeader(9, 4, Fraction(30000, 1001), SRGB))
GOLDEN = Path(__file__).parents[1] / "golden" / "bsq-version-1"
GOLDEN_FILES = json.loads((GOLDEN / "files.json").read_text())


def forge_file(header, sizes=()):
    """Header and sizes as they are given, with the checksum that belongs to them."""
    header_and_index = header.pack() + b"".join(map(write_varint, sizes))
    return header_and_index + zlib.crc32(header_and_index).to_bytes(4, "little")


def test_container_write_and_read_roundtrip():
    payloads = [bytes([n]) * (5 + 40 * n) for n in range(6)]
    bits = [[bytes([n, frame]) for frame in range(4)] for n in range(6)]
    crcs = [[zlib.crc32(part) for part in parts] for parts in bits]
    container = read_container(write_container(CLIP, FORMAT, payloads, crcs), FORMAT)
    assert container.header == CLIP
    assert [container.payload(n) for n in range(6)] == payloads
    for n in range(6):
        for frame in range(4):
            assert container.has_tokens(n, frame, bits[n][frame])
            assert not container.has_tokens(n, frame, bits[n][frame] + b"x")
    assert container.num_complete_groups == 6
    assert read_container(write_container(IMAGE, FORMAT, payloads[:2], [[1], [2]]), FORMAT).header == IMAGE


@pytest.mark.parametrize("width", [1, 64, 128, 129, 16384, 16385])
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, CLIP.clip])
def test_header_pack_and_read_roundtrip(width, group_size, clip):
    header = Header(width, 3, 1, group_size, b"ab", clip=clip)
    assert read_header(header.pack()) == header
    for size in range(len(header.pack())):
        with pytest.raises(ValueError, match=r"truncated|not a \.bsq file"):
            read_header(header.pack()[:size])


def test_header_of_small_image_takes_nine_bytes():
    assert len(replace(IMAGE, width=128, height=128).pack()) == 9


def test_iter_groups_raster_order_and_selection_by_tiles():
    header = replace(IMAGE, width=32 * 5, height=32 * 3)
    assert [index for index, _ in header.iter_groups()] == list(range(6))
    assert list(header.iter_groups())[4] == (4, Rect(2, 2, 3, 4))
    assert [index for index, _ in header.iter_groups(Rect(0, 3, 2, 5))] == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        (replace(IMAGE, width=71), FORMAT),
        (IMAGE, replace(FORMAT, bits=11)),
        (IMAGE, replace(FORMAT, tokenizer_id=b"T" * 32)),
        (IMAGE, replace(FORMAT, prior_id=b"T" * 32)),
    ],
)
def test_token_checksum_depends_on_header_and_whole_ids(other):
    """Two models whose ids have one key are distinguished by the checksums."""
    files = [
        write_container(header, token_format, [b"a", b"b"], [[1], [2]])
        for header, token_format in (other, (IMAGE, FORMAT))
    ]
    assert files[0][-6:] != files[1][-6:]


def test_token_checksum_depends_on_payload_size():
    files = [write_container(replace(IMAGE, width=10), FORMAT, [payload], [[1]]) for payload in (b"ab", b"abc")]
    assert files[0][:-2] != files[1][:-3]


def test_read_container_truncated_file_needs_opt_in():
    data = write_container(IMAGE, FORMAT, [b"first", b"second"], [[1], [2]])
    start_of_last = len(data) - len(b"second")
    with pytest.raises(ValueError, match=f"its groups need more than {start_of_last} bytes"):
        read_container(data[: start_of_last - 1], FORMAT)
    part = read_container(data[: start_of_last - 1], FORMAT, require_complete=False)
    assert part.payload(0) == b"first"
    assert part.payload(1) is None
    assert part.num_complete_groups == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 2**31, "height": 2**31}, "claims 2147483648 x 2147483648 pixels"),
        ({"width": 2**32 - 1, "height": 1}, "claims 4294967295 x 1 pixels"),
        ({"width": 2**62, "height": 2**62}, "claims 4611686018427387904"),
        ({"width": 2**27, "height": 1}, "the limit is 268435456 pixels in all tiles"),
        ({"width": 2**18, "height": 512, "group_size": 1}, "header and index need"),
        ({"coding": 2}, "its header has invalid planes"),
        ({"coding": 2, "plane_bits": (0, 3)}, "its header has invalid planes"),
        ({"coding": 2, "plane_bits": (8, 3)}, "invalid tiles, tokens or coding"),
        (
            {"coding": 2, "plane_bits": (1,) * 10, "width": 2**18, "height": 512, "group_size": 1},
            "header and index nee",
        ),
        ({"coding": 3}, "invalid tiles, tokens or coding"),
        ({"clip": VideoHeader(2**32 - 1, 65535, Fraction(1), SRGB)}, "header and index need"),
        ({"clip": VideoHeader(2**32 - 1, 1, Fraction(1), SRGB)}, "header and index need"),
        ({"clip": VideoHeader(2**40, 1, Fraction(1), SRGB)}, "invalid number of frames, frame rate or GOP size"),
        ({"clip": VideoHeader(0, 1, Fraction(1), SRGB)}, "invalid number of frames, frame rate or GOP size"),
        ({"clip": VideoHeader(5, 0, Fraction(1), SRGB)}, "invalid number of frames, frame rate or GOP size"),
        ({"clip": VideoHeader(5, 1, Fraction(0), SRGB)}, "invalid number of frames, frame rate or GOP size"),
    ],
)
def test_read_container_invalid_header_raises_without_allocating(changes, message):
    data = forge_file(replace(IMAGE, **changes)) + bytes(1000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_container(data, FORMAT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_read_container_invalid_lengths_raise():
    for size in (2**40, 2**62):
        forged_data = forge_file(IMAGE, [size]) + b"payload"
        with pytest.raises(ValueError, match="truncated|damaged"):
            read_container(forged_data, FORMAT)


def test_read_header_foreign_or_damaged_file_raises():
    data = write_container(IMAGE, FORMAT, [b"", b""], [[1], [2]])
    with pytest.raises(ValueError, match="not a .bsq file"):
        read_header(b"\x89PNG" + data[4:])
    with pytest.raises(ValueError, match=r"format version 3; this version of bsq_ray reads versions 1 and 2"):
        read_header(data[:4] + b"\x03" + data[5:])
    with pytest.raises(ValueError, match="invalid tiles, tokens or coding"):
        read_header(data[:4] + bytes([data[4] | 0xC0]) + data[5:])
    unreduced = replace(CLIP, clip=replace(CLIP.clip, frame_rate=Fraction(2, 1))).pack()
    unreduced = unreduced.replace(b"\x02\x01" + bytes(SRGB), b"\x04\x02" + bytes(SRGB))
    with pytest.raises(ValueError, match="not in lowest terms"):
        read_header(unreduced)
    damaged = bytearray(data)
    damaged[9] ^= 1
    with pytest.raises(ValueError, match="do not match their checksum"):
        read_container(bytes(damaged), FORMAT)


def test_validate_header_custom_pixel_limit_raises():
    with pytest.raises(ValueError, match="the limit is 1 to 100 pixels"):
        validate_header(IMAGE, 100)


def decode_golden(name, data):
    codec = Codec.from_pretrained(str(GOLDEN / GOLDEN_FILES[name]["model"]))
    if name.startswith("image"):
        return codec.decompress(data).tobytes()
    return b"".join(frame.tobytes() for frame in codec.decompress_clip(data))


@pytest.mark.parametrize("name", sorted(GOLDEN_FILES))
def test_version_1_file_decodes_to_its_pixels(name):
    """Files that an earlier release wrote stay readable."""
    data = (GOLDEN / f"{name}.bsq").read_bytes()
    assert hashlib.sha256(decode_golden(name, data)).hexdigest() == GOLDEN_FILES[name]["sha256_of_pixels"]


@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(GOLDEN_FILES))
def test_version_1_damaged_file_raises_or_matches(name):
    """Damage in any byte of a file of version 1 is found, whatever checksum it has to pass."""
    data = (GOLDEN / f"{name}.bsq").read_bytes()
    pixels = decode_golden(name, data)
    for offset in range(4, len(data), max(1, len(data) // 40)):
        damaged = data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1 :]
        with suppress(ValueError):
            assert decode_golden(name, damaged) == pixels
    for size in (10, 36, 40, len(data) - 1):
        with pytest.raises(ValueError, match="truncated"):
            decode_golden(name, data[:size])
    with pytest.raises(ValueError, match="1 bytes follow its end"):
        decode_golden(name, data + b"x")


def test_version_1_forged_fields_raise():
    """Fields out of range raise before memory is allocated, also where the checksum of the header matches."""
    data = (GOLDEN / "image-raw.bsq").read_bytes()
    for offset, size, value in (
        (8, 4, 2**31),
        (16, 2, 33),
        (18, 1, 0),
        (19, 1, 255),
        (20, 1, 0),
        (7, 1, 99),
        (6, 1, 2),
    ):
        forged = data[:offset] + value.to_bytes(size, "little") + data[offset + size :]
        with pytest.raises(ValueError, match="claims|damaged|limit|without a prior"):
            decode_golden("image-raw", forged)
    assert struct.unpack_from("<II", data, 8) == (100, 40)
