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

_EXTREMES = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
# Offset and size of every field of the header after the magic; the last eight are a clip's.
_FIELDS = [(4, 1), (5, 1), (6, 1), (7, 1), (8, 4), (12, 4), (16, 2), (18, 1), (19, 1), (20, 1), (21, 8), (29, 8)]
_CLIP_FIELDS = [(37, 4), (41, 4), (45, 4), (49, 2), (51, 1), (52, 1), (53, 1), (54, 1)]


class Target:
    """A file, its codec, and what it decodes to."""

    def __init__(self, codec, data):
        self.codec, self.data = codec, data
        container = read_container(data)
        self.header_bytes = len(container.header.pack())
        self.index_GE, self.payloads = (
            container.index_GE,
            [container.payload(n) for n in range(len(container.index_GE))],
        )
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


def corrupt_structure(target, rng):
    """A field, an index entry or a payload is another, and the checksums of header, index and payload fit again."""
    header_bytes = bytearray(target.data[: target.header_bytes])
    index_GE, payloads = target.index_GE.copy(), list(target.payloads)
    kind = rng.choice(["field", "fields", "size", "payload", "payloads", "checks"])
    group = rng.randrange(len(payloads))
    if kind in ("field", "fields"):
        for _ in range(1 if kind == "field" else 3):
            offset, size = rng.choice(_FIELDS + _CLIP_FIELDS * target.clip)
            old = int.from_bytes(header_bytes[offset : offset + size], "little")
            value = rng.choice([*_EXTREMES, old + 1, old - 1, rng.getrandbits(8 * size)]) % 256**size
            header_bytes[offset : offset + size] = value.to_bytes(size, "little")
    if kind == "payload":
        changed = bytearray(payloads[group]) or bytearray(1)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        payloads[group] = bytes(changed) + rng.randbytes(rng.choice([0, 0, 4, 1]))
    if kind == "payloads":
        payloads[group] = rng.choice([b"", rng.randbytes(rng.randrange(60)), rng.choice(payloads)])
    if kind == "checks":
        index_GE[group, 2:] = rng.choice([index_GE[rng.randrange(len(index_GE)), 2:], rng.getrandbits(32)])
    for n, payload in enumerate(payloads):
        index_GE[n, :2] = len(payload), zlib.crc32(payload)
    if kind == "size":
        index_GE[group, 0] = rng.choice([*_EXTREMES, index_GE[group, 0] + 1])
    header_and_index = bytes(header_bytes) + index_GE.astype("<u4").tobytes()
    return header_and_index + struct.pack("<I", zlib.crc32(header_and_index)) + b"".join(payloads)


def fuzz(targets, num_files, seed=0):
    """Count the outcomes of decoding corrupted files."""
    rng = random.Random(seed)
    outcomes = Counter()
    slowest_s = 0.0
    for _ in range(num_files):
        target = rng.choice(targets)
        corrupt = corrupt_structure if rng.random() < 0.4 else corrupt_bytes
        while (corrupted := corrupt(target, rng)) == target.data:
            pass
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
    index_GE = raw.index_GE.copy()
    index_GE[0, 1] = zlib.crc32(payload)
    header_and_index = raw.data[: raw.header_bytes] + index_GE.astype("<u4").tobytes()
    forged = header_and_index + struct.pack("<I", zlib.crc32(header_and_index)) + payload + b"".join(raw.payloads[1:])
    with pytest.raises(ValueError, match="its tokens do not match their checksum"):
        raw.codec.decompress(forged)


@pytest.mark.slow
def test_decode_100k_damaged_files_stays_within_memory(targets, request):
    num_files = request.config.getoption("--fuzz")
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, slowest_s = fuzz(targets, num_files, seed=1)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    print(f"\n{num_files} damaged files, the slowest {1000 * slowest_s:.0f} ms, {growth // 1024} MB of memory:")
    for outcome, times in outcomes.most_common():
        print(f"{times:8} {outcome} …")
    assert growth < 300 * 1024
