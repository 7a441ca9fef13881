"""Damaged and hostile files: ValueError, or exactly the pixels of the original file, never other pixels.

The slow test takes `--fuzz N` for another number of files than 100,000.
"""

import struct
import zlib

import numpy as np
import pytest
from damaged_files import corrupt_bytes, fuzz, fuzz_within_memory
from small_codecs import save_minimal_codecs

from bsq_ray import Codec
from bsq_ray.codec.container import read_container
from bsq_ray.codec.varint import write_varint

_EXTREMES = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


class Target:
    """A file, its codec, and what it decodes to."""

    def __init__(self, codec, data):
        self.codec, self.data = codec, data
        container = read_container(data, codec.token_format)
        self.header = container.header.pack()
        gop_size, num_groups = container.header.gop_size, container.header.num_groups
        self.payloads = [container.payload(n) for n in range(num_groups)]
        self.checks = [data[start - 4 * gop_size : start] for start in map(int, container.offsets_G)]
        self.clip = container.header.clip is not None
        self.valid_pixels = {self.decode(data)}

    def decode(self, data):
        if self.clip:
            return b"".join(frame.tobytes() for frame in self.codec.decompress_clip(data))
        return self.codec.decompress(data).tobytes()

    def preview(self, data):
        list(self.codec.preview_clip(data)[0]) if self.clip else self.codec.preview(data)

    def corrupt(self, rng):
        return (corrupt_structure if rng.random() < 0.4 else corrupt_bytes)(self, rng)


def assemble(header, payloads, checks, sizes=None):
    """A file whose header and sizes match their checksum."""
    start = header
    if len(payloads) > 1:
        start += b"".join(map(write_varint, sizes or [len(payload) for payload in payloads[:-1]]))
        start += struct.pack("<I", zlib.crc32(start))
    return start + b"".join(check + payload for check, payload in zip(checks, payloads, strict=True))


def corrupt_structure(target, rng):
    """A part of the file is another, and the checksum of header and sizes matches."""
    header, payloads, checks, sizes = bytearray(target.header), list(target.payloads), list(target.checks), None
    kind = rng.choice(["header", "headers", "size", "payload", "payloads", "checks"])
    group = rng.randrange(len(payloads))
    if kind in ("header", "headers"):
        for _ in range(1 if kind == "header" else 3):
            offset = rng.randrange(4, len(header))
            header[offset] = rng.choice(
                [0, 1, 127, 128, 255, header[offset] ^ 1 << rng.randrange(8), rng.randrange(256)]
            )
        if rng.random() < 0.3:
            offset = rng.randrange(5, len(header))
            header[offset : offset + 1] = write_varint(rng.choice(_EXTREMES))
    if kind == "payload":
        changed = bytearray(payloads[group]) or bytearray(1)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        payloads[group] = bytes(changed) + rng.randbytes(rng.choice([0, 0, 4, 1]))
    if kind == "payloads":
        payloads[group] = rng.choice([b"", rng.randbytes(rng.randrange(60)), rng.choice(payloads)])
    if kind == "checks":
        checks[group] = rng.choice([rng.choice(checks), rng.randbytes(len(checks[group]))])
    if kind == "size":
        sizes = [len(payload) for payload in payloads[:-1]] or None
        if sizes:
            size = rng.randrange(len(sizes))
            sizes[size] = rng.choice([*_EXTREMES, sizes[size] + 1, 2**62])
    return assemble(bytes(header), payloads, checks, sizes)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, photos):
    """Images and clips, with and without a prior."""
    image_folder, clip_folder = save_minimal_codecs(tmp_path_factory.mktemp("least"))
    photo = photos[3].resize((50, 20))
    frames = [np.asarray(photos[n].resize((20, 12))) for n in range(3)]
    result = []
    for folder in (image_folder, f"{image_folder}/tokenizer"):
        codec = Codec.from_pretrained(folder)
        result.append(Target(codec, codec.compress(photo).data))
    for folder in (clip_folder, f"{clip_folder}/tokenizer"):
        codec = Codec.from_pretrained(folder)
        result.append(Target(codec, codec.compress_clip(frames, 25).data))
    return result


@pytest.mark.integration
def test_decode_damaged_files_raises_or_matches(targets):
    outcomes, _ = fuzz(targets, 2000)
    assert len(outcomes) > 10, "every check has its turn"


def test_decode_forged_tokens_fail_token_checksum(targets):
    """Other tokens under the same checksums, in a file that is sound otherwise."""
    raw = targets[1]
    payload = bytes([raw.payloads[0][0] ^ 1]) + raw.payloads[0][1:]
    forged = assemble(raw.header, [payload, *raw.payloads[1:]], raw.checks)
    with pytest.raises(ValueError, match="group 0 does not match its checksum"):
        raw.codec.decompress(forged)


@pytest.mark.slow
@pytest.mark.long
def test_decode_100k_damaged_files_stays_within_memory(targets, request):
    fuzz_within_memory(targets, request.config.getoption("--fuzz") or 100_000)
