"""Damaged and hostile files: ValueError, or exactly the pixels of the original file, never other pixels.

The slow test takes `--fuzz N` for another number of files than 100,000.
"""

import random
import re
import resource
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
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
        self.expected_bytes = self.decode(data)

    def decode(self, data):
        if self.clip:
            return b"".join(frame.tobytes() for frame in self.codec.decompress_clip(data))
        return self.codec.decompress(data).tobytes()

    def preview(self, data):
        list(self.codec.preview_clip(data)[0]) if self.clip else self.codec.preview(data)


def corrupt_bytes(target, rng):
    """Corrupt bytes as transfers, disks and programs do."""
    data = bytearray(target.data)
    kind = rng.choice(["cut", "random", "flip", "insert", "delete", "repeat", "set"])
    offset = rng.randrange(len(data))
    if kind == "cut":
        return bytes(data[:offset])
    if kind == "random":
        return b"BSQ1" * rng.randrange(2) + rng.randbytes(rng.randrange(120))
    if kind == "flip":
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == "insert":
        data[offset:offset] = rng.randbytes(rng.randrange(1, 9))
    if kind == "delete":
        del data[offset : offset + rng.randrange(1, 9)]
    if kind == "repeat":
        data[offset:offset] = data[offset : offset + rng.randrange(1, 40)]
    if kind == "set":
        data[offset] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(data)


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


def fuzz(targets, num_files, seed=0):
    """Count the outcomes of decoding corrupted files."""
    rng = random.Random(seed)
    outcomes = Counter()
    slowest_s = 0.0
    for _ in range(num_files):
        target = rng.choice(targets)
        corrupt = corrupt_structure if rng.random() < 0.4 else corrupt_bytes
        while (corrupted := corrupt(target, rng)) == target.data:
            corrupt = rng.choice([corrupt_structure, corrupt_bytes])
        start_time = time.perf_counter()
        try:
            decoded = target.decode(corrupted)
            assert decoded == target.expected_bytes, "silently decoded to wrong pixels"
            outcomes["decoded to the same pixels"] += 1
        except ValueError as error:
            outcomes[" ".join(re.sub(r"\d+", "N", str(error)).split()[:6])] += 1
        if rng.random() < 0.05:
            try:
                target.preview(corrupted)
            except ValueError:
                outcomes["previews rejected"] += 1
        slowest_s = max(slowest_s, time.perf_counter() - start_time)
    return outcomes, slowest_s


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
    num_files = request.config.getoption("--fuzz") or 100_000
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, slowest_s = fuzz(targets, num_files, seed=1)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    print(f"\n{num_files} damaged files, the slowest {1000 * slowest_s:.0f} ms, {growth // 1024} MB of memory:")
    for outcome, times in outcomes.most_common():
        print(f"{times:8} {outcome} …")
    assert growth < 300 * 1024
