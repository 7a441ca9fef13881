"""Mutated files of every format that is read: nothing but `DecodeError` may come out, and no process may die.

Each file is valid before bytes are overwritten, removed, inserted or swapped. The bytes follow from the number of the
file, so that `--fuzz` and a number in a failure reproduce it. Decoding runs in processes with limited memory and time.
"""

import io
import multiprocessing
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import pytest
from mutated_files import IMAGES, VIDEOS, mutated

from bsq_ray.data.transcode import reencode_image
from bsq_ray.media.decode_error import DecodeError
from bsq_ray.media.images import decode_image
from bsq_ray.media.video_reader import probe, read_frames, read_video

# Pixels of a frame that are decoded, and bytes of memory of a process beyond those it starts with.
MAX_PIXELS, MEMORY_BYTES = 2**22, 3 * 2**30
# Seconds for one file; a decoder that needs more hangs.
TIMEOUT_S = 30
# Files of each kind in the fast test.
NUM_FEW = 10


def decode_as_image(data):
    """Read a file in every way in which images are read."""
    for read in (
        decode_image,
        lambda data: decode_image(data, short_side=8),
        lambda data: reencode_image(data, "", 16),
    ):
        with suppress(DecodeError):
            read(data)


def decode_as_video(data):
    """Read a file in every way in which videos are read."""
    with suppress(DecodeError):
        for _ in read_video(io.BytesIO(data), max_pixels=MAX_PIXELS).frames:
            pass
    with suppress(DecodeError):
        video = probe(io.BytesIO(data)).video
        for _ in read_frames(io.BytesIO(data), video, video.frames // 2, 1, 1):
            pass


def limit_memory():
    with open("/proc/self/statm") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MEMORY_BYTES,) * 2)


def decode_mutations(kind, original, numbers):
    """Return "number: error" of the first mutated file that raises anything but `DecodeError`; None if all are fine."""
    decode = decode_as_image if kind in IMAGES else decode_as_video
    for number in numbers:
        # Kills the process, also within a decoder.
        signal.alarm(TIMEOUT_S)
        try:
            decode(mutated(kind, original, number))
        except Exception as error:
            return f"file {number} of {kind}: {type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
    return None


class DecoderProcess:
    """A process with limited memory that decodes mutated files; a new one replaces it if a file ends it."""

    def __init__(self):
        self.pool = self._start()

    def _start(self):
        return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), limit_memory)

    def check(self, kind, original, num_files):
        """Return the failures of the first files of a kind, see `decode_mutations`."""
        try:
            failure = self.pool.submit(decode_mutations, kind, original, range(num_files)).result()
        except BrokenProcessPool:
            self.pool = self._start()
            failure = f"a file of {kind} ended the process"
        return [failure] if failure else []


@pytest.fixture(scope="module")
def decoder():
    process = DecoderProcess()
    yield process
    process.pool.shutdown()


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((48, 32))


@pytest.mark.parametrize("kind", IMAGES | VIDEOS)
def test_valid_file_of_each_kind_is_read(kind, photo):
    """The files that are mutated are valid, except for animations."""
    data = (IMAGES | VIDEOS)[kind](photo)
    if kind.startswith("animated"):
        with pytest.raises(DecodeError, match="animation"):
            decode_image(data)
    elif kind in IMAGES:
        assert decode_image(data).size in ((48, 32), (32, 48))
    else:
        assert probe(io.BytesIO(data)).video.frames == len(list(read_video(io.BytesIO(data)).frames))


def test_mutated_files_raise_only_decode_errors(photo, decoder):
    """A few mutated files of each kind; `test_many_mutated_files_raise_only_decode_errors` has more."""
    kinds = IMAGES | VIDEOS
    assert [failure for kind in kinds for failure in decoder.check(kind, kinds[kind](photo), NUM_FEW)] == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_many_mutated_files_raise_only_decode_errors(photo, decoder, request):
    """`--fuzz` mutated files, 20,000 by default, evenly over all kinds."""
    kinds = IMAGES | VIDEOS
    num_files = -(-(request.config.getoption("--fuzz") or 20_000) // len(kinds))
    assert [failure for kind in kinds for failure in decoder.check(kind, kinds[kind](photo), num_files)] == []
