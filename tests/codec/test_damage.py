"""Damaged and hostile files: a sentence, or exactly the picture of the file as it was; never another picture.

The long test takes `--fuzz N` for more streams than its 100,000.
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
from small_codecs import save_least_codecs

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
        self.words, self.payloads = container.index_GE, [container.payload(n) for n in range(len(container.index_GE))]
        self.clip = container.header.clip is not None
        self.right = self.decode(data)

    def decode(self, data):
        if self.clip:
            return b"".join(frame.tobytes() for frame in self.codec.decompress_clip(data))
        return self.codec.decompress(data).tobytes()

    def preview(self, data):
        list(self.codec.preview_clip(data)[0]) if self.clip else self.codec.preview(data)


def bytes_changed(target, rng):
    """What wires, disks and programs do to files."""
    data = bytearray(target.data)
    kind = rng.choice(["cut", "random", "flip", "insert", "delete", "repeat", "set"])
    at = rng.randrange(len(data))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "random":
        return b"BSQ1" * rng.randrange(2) + rng.randbytes(rng.randrange(120))
    if kind == "flip":
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    if kind == "delete":
        del data[at : at + rng.randrange(1, 9)]
    if kind == "repeat":
        data[at:at] = data[at : at + rng.randrange(1, 40)]
    if kind == "set":
        data[at] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(data)


def structure_changed(target, rng):
    """A field, an index entry or a payload is another, and the checksums of header, index and payload fit again."""
    head = bytearray(target.data[: target.header_bytes])
    words, payloads = target.words.copy(), list(target.payloads)
    kind = rng.choice(["field", "fields", "size", "payload", "payloads", "checks"])
    group = rng.randrange(len(payloads))
    if kind in ("field", "fields"):
        for _ in range(1 if kind == "field" else 3):
            at, size = rng.choice(_FIELDS + _CLIP_FIELDS * target.clip)
            old = int.from_bytes(head[at : at + size], "little")
            value = rng.choice([*_EXTREMES, old + 1, old - 1, rng.getrandbits(8 * size)]) % 256**size
            head[at : at + size] = value.to_bytes(size, "little")
    if kind == "payload":
        changed = bytearray(payloads[group]) or bytearray(1)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        payloads[group] = bytes(changed) + rng.randbytes(rng.choice([0, 0, 4, 1]))
    if kind == "payloads":
        payloads[group] = rng.choice([b"", rng.randbytes(rng.randrange(60)), rng.choice(payloads)])
    if kind == "checks":
        words[group, 2:] = rng.choice([words[rng.randrange(len(words)), 2:], rng.getrandbits(32)])
    for n, payload in enumerate(payloads):
        words[n, :2] = len(payload), zlib.crc32(payload)
    if kind == "size":
        words[group, 0] = rng.choice([*_EXTREMES, words[group, 0] + 1])
    front = bytes(head) + words.astype("<u4").tobytes()
    return front + struct.pack("<I", zlib.crc32(front)) + b"".join(payloads)


def fuzz(targets, count, seed=0):
    """Counts how files were answered."""
    rng = random.Random(seed)
    answers = Counter()
    slowest = 0.0
    for _ in range(count):
        target = rng.choice(targets)
        change = structure_changed if rng.random() < 0.4 else bytes_changed
        while (changed := change(target, rng)) == target.data:
            pass
        began = time.perf_counter()
        try:
            found = target.decode(changed)
            assert found == target.right, "a silent wrong picture"
            answers["decoded to the same picture"] += 1
        except ValueError as error:
            answers[" ".join(re.sub(r"\d+", "N", str(error)).split()[:6])] += 1
        if rng.random() < 0.05:
            try:
                target.preview(changed)
            except ValueError:
                answers["previews refused"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    return answers, slowest


@pytest.fixture(scope="module")
def targets(tmp_path_factory, photos):
    """Images and clips, with and without a prior."""
    image_folder, clip_folder = save_least_codecs(tmp_path_factory.mktemp("least"))
    photo = photos[3].resize((50, 20))
    frames = [np.asarray(photos[n].resize((20, 12))) for n in range(3)]
    made = []
    for folder in (image_folder, f"{image_folder}/tokenizer"):
        codec = Codec.from_pretrained(folder)
        made.append(Target(codec, codec.compress(photo).data))
    for folder in (clip_folder, f"{clip_folder}/tokenizer"):
        codec = Codec.from_pretrained(folder)
        made.append(Target(codec, codec.compress_clip(frames, 25).data))
    return made


def test_damaged_files_are_refused_with_a_sentence(targets):
    answers, _ = fuzz(targets, 2000)
    assert len(answers) > 10, "every check has its turn"


def test_a_forger_who_knows_the_model_still_needs_the_checks_of_the_tokens(targets):
    """Other tokens under the same checksums, in a file that is sound otherwise."""
    raw = targets[1]
    payload = bytes([raw.payloads[0][0] ^ 1]) + raw.payloads[0][1:]
    words = raw.words.copy()
    words[0, 1] = zlib.crc32(payload)
    front = raw.data[: raw.header_bytes] + words.astype("<u4").tobytes()
    forged = front + struct.pack("<I", zlib.crc32(front)) + payload + b"".join(raw.payloads[1:])
    with pytest.raises(ValueError, match="its tokens do not match their checksum"):
        raw.codec.decompress(forged)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files(targets, request):
    count = request.config.getoption("--fuzz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers, slowest = fuzz(targets, count, seed=1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"\n{count} damaged files, the slowest {1000 * slowest:.0f} ms, {grown // 1024} MB of memory:")
    for answer, times in answers.most_common():
        print(f"{times:8} {answer} …")
    assert grown < 300 * 1024
