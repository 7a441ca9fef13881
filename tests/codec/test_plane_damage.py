"""Damaged and hostile files with planes of nested bits: ValueError, or the pixels of the original at one of its rates.

The slow test takes `--fuzz N` for another number of files than 100,000.
"""

import zlib

import numpy as np
import pytest
from damaged_files import corrupt_bytes, fuzz, fuzz_within_memory
from small_codecs import save_nested_codec, save_nested_tokenizer

from bsq_ray import Codec
from bsq_ray.codec.container import read_container
from bsq_ray.codec.varint import write_varint

_CRC_BYTES = 4
_EXTREMES = (0, 1, 127, 128, 255, 65535, 2**31 - 1, 2**32 - 1, 2**62)


class PlaneFile:
    """A file with planes, its codec, and the pixels that it may decode to."""

    def __init__(self, codec, data):
        self.codec, self.data = codec, data
        container = read_container(data, codec.token_format)
        self.header, self.is_clip = container.header.pack(), container.header.clip is not None
        planes = container.planes
        self.payloads = [
            planes.payload(plane, group)
            for plane in range(len(planes.plane_bits))
            for group in range(container.header.num_groups)
        ]
        offsets = planes.offsets_PG.ravel().tolist()
        self.checks = [data[offset - _CRC_BYTES : offset] for offset in offsets]
        assert assemble_planes(self.header, self.payloads, self.checks) == data
        self.valid_pixels = {self.decode(data[:end]) for end in planes.ends}

    def decode(self, data):
        if self.is_clip:
            return b"".join(frame.tobytes() for frame in self.codec.decompress_clip(data))
        return self.codec.decompress(data).tobytes()

    def preview(self, data):
        list(self.codec.preview_clip(data)[0]) if self.is_clip else self.codec.preview(data)

    def corrupt(self, rng):
        return rng.choice([corrupt_bytes, corrupt_planes])(self, rng)


def assemble_planes(header, payloads, checks, sizes=None):
    """A file whose header and sizes match their checksum."""
    start = header + b"".join(map(write_varint, sizes or [len(payload) for payload in payloads]))
    start += zlib.crc32(start).to_bytes(_CRC_BYTES, "little")
    return start + b"".join(check + payload for check, payload in zip(checks, payloads, strict=True))


def corrupt_planes(file, rng):
    """A part of the file is another, and the checksum of header and sizes matches."""
    header, payloads, checks, sizes = bytearray(file.header), list(file.payloads), list(file.checks), None
    kind = rng.choice(["header", "sizes", "payload", "exchanged", "checks", "missing", "added"])
    index = rng.randrange(len(payloads))
    if kind == "header":
        for _ in range(rng.randrange(1, 4)):
            offset = rng.randrange(4, len(header))
            header[offset] = rng.choice([0, 1, 127, 128, 255, header[offset] ^ 1 << rng.randrange(8)])
    if kind == "sizes":
        sizes = [len(payload) for payload in payloads]
        sizes[index] = rng.choice([*_EXTREMES, sizes[index] + 1, max(0, sizes[index] - 1)])
    if kind == "payload":
        changed = bytearray(payloads[index]) or bytearray(1)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        payloads[index] = bytes(changed) + rng.randbytes(rng.choice([0, 0, 1, 4]))
    if kind == "exchanged":
        other = rng.randrange(len(payloads))
        parts = [payloads] if rng.random() < 0.5 else [payloads, checks]
        for part in parts:
            part[index], part[other] = part[other], part[index]
    if kind == "checks":
        checks[index] = rng.choice([rng.choice(checks), rng.randbytes(_CRC_BYTES)])
    if kind == "missing":
        del payloads[index], checks[index]
    if kind == "added":
        payloads.insert(index, rng.choice(payloads))
        checks.insert(index, rng.choice(checks))
    return assemble_planes(bytes(header), payloads, checks, sizes)


@pytest.fixture(scope="module")
def plane_files(tmp_path_factory, photos):
    """Images and a clip, coded with a prior and without."""
    folder = tmp_path_factory.mktemp("planes")
    raw, clip = save_nested_tokenizer(folder / "raw"), save_nested_tokenizer(folder / "clip", frames=2)
    files = []
    for url in (raw, save_nested_codec(folder / "prior")):
        codec = Codec.from_pretrained(url)
        files.append(PlaneFile(codec, codec.compress(photos[3].resize((40, 30))).data))
    clip_codec = Codec.from_pretrained(clip)
    frames = [np.asarray(photos[n].resize((20, 12))) for n in range(3)]
    files.append(PlaneFile(clip_codec, clip_codec.compress_clip(frames, 25).data))
    return files


def test_damaged_plane_files_raise_or_decode_to_a_rate(plane_files):
    outcomes, _ = fuzz(plane_files, 500)
    assert outcomes["decoded to valid pixels"] > 10
    assert len(outcomes) > 6, "every check has its turn"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_100k_damaged_plane_files_stay_within_memory(plane_files, request):
    fuzz_within_memory(plane_files, request.config.getoption("--fuzz") or 100_000)
