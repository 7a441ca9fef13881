"""Corrupt files at random, and check what they decode to.

A target is an object with the file's bytes `data`, with `valid_pixels`, which corrupted files may decode to, and with
`corrupt(rng)`, `decode(data)` and `preview(data)`.
"""

import random
import re
import resource
import time
from collections import Counter

_MAX_GROWTH_KB = 300 * 1024


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


def fuzz(targets, num_files, seed=0):
    """Decode corrupted files; return the number of each outcome and the longest time in seconds."""
    rng = random.Random(seed)
    outcomes = Counter()
    slowest_s = 0.0
    for _ in range(num_files):
        target = rng.choice(targets)
        while (corrupted := target.corrupt(rng)) == target.data:
            pass
        start_time = time.perf_counter()
        try:
            assert target.decode(corrupted) in target.valid_pixels, "silently decoded to wrong pixels"
            outcomes["decoded to valid pixels"] += 1
        except ValueError as error:
            outcomes[" ".join(re.sub(r"\d+", "N", str(error)).split()[:6])] += 1
        if rng.random() < 0.05:
            try:
                target.preview(corrupted)
            except ValueError:
                outcomes["previews rejected"] += 1
        slowest_s = max(slowest_s, time.perf_counter() - start_time)
    return outcomes, slowest_s


def fuzz_within_memory(targets, num_files):
    """Decode corrupted files, print the outcomes, and check that the memory of this process hardly grows."""
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, slowest_s = fuzz(targets, num_files, seed=1)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    print(f"\n{num_files} damaged files, the slowest {1000 * slowest_s:.0f} ms, {growth // 1024} MB of memory:")
    for outcome, times in outcomes.most_common():
        print(f"{times:8} {outcome} …")
    assert growth < _MAX_GROWTH_KB
