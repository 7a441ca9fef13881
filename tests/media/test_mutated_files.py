"""Mutated files of every format that is read: nothing but `DecodeError` may come out, and no process may die.

Each file is valid before bytes are overwritten, removed, inserted or swapped. The bytes follow from the number of the
file, so that `--fuzz` and a number in a failure reproduce it. Decoding runs in processes with limited memory and time.
"""

import io
import multiprocessing
import resource
import signal
import struct
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from small_images import encode, png_with_chunk, swapped_profile, tiff
from small_videos import make_street_video, make_video

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

EXIF = Image.Exif()
EXIF[0x0112] = 6
TAGS = {"exif": EXIF, "icc_profile": swapped_profile()}

# A valid file of each format, made of a photo of 48 x 32 pixels.
IMAGES = {
    "JPEG": lambda image: encode(image, "JPEG", **TAGS),
    "progressive JPEG": lambda image: encode(image.convert("CMYK"), "JPEG", progressive=True),
    "MPO": lambda image: encode(image, "MPO", save_all=True, append_images=[image]),
    "PNG": lambda image: encode(image, "PNG", **TAGS),
    "PNG, palette": lambda image: encode(image.quantize(16), "PNG", transparency=3),
    "PNG with text": lambda image: png_with_chunk(image, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation=\"3\""),
    "WebP": lambda image: encode(image, "WEBP", **TAGS),
    "lossless WebP": lambda image: encode(image.convert("RGBA"), "WEBP", lossless=True),
    "animated WebP": lambda image: encode(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
    "GIF": lambda image: encode(image, "GIF"),
    "animated GIF": lambda image: encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
    "BMP": lambda image: encode(image, "BMP"),
    "TIFF": lambda image: encode(image, "TIFF", compression="tiff_lzw", **TAGS),
    "TIFF, CMYK": lambda image: encode(image.convert("CMYK"), "TIFF", compression="jpeg"),
    "TIFF of floats": lambda image: tiff(np.asarray(image.convert("L"), np.float32) / 255),
    "AVIF": lambda image: encode(image, "AVIF", **TAGS),
    "JPEG 2000": lambda image: encode(image, "JPEG2000"),
    "PPM": lambda image: encode(image, "PPM"),
}  # fmt: skip
# A valid file of each container and codec, a few frames each.
VIDEOS = {
    "MP4": lambda photo: make_street_video(8),
    "MOV, ProRes": lambda photo: make_street_video(3, 0, (64, 48), "mov", "prores_ks", "yuv422p10le"),
    "MKV": lambda photo: make_video(photo, [0, 40, 120, 130, 400]),
    "MKV, FFV1": lambda photo: make_street_video(4, container_format="matroska", codec="ffv1"),
    "WebM, VP9": lambda photo: make_street_video(6, container_format="webm", codec="libvpx-vp9"),
    "WebM, VP8": lambda photo: make_street_video(6, container_format="webm", codec="libvpx"),
    "AVI, MPEG-4": lambda photo: make_street_video(8, container_format="avi", codec="mpeg4"),
    "AVI, MJPEG": lambda photo: make_street_video(4, container_format="avi", codec="mjpeg", pixel_format="yuvj420p"),
    "MPEG-TS": lambda photo: make_street_video(8, container_format="mpegts"),
    "MPEG-PS": lambda photo: make_street_video(8, container_format="mpeg", codec="mpeg2video"),
    "FLV": lambda photo: make_street_video(8, container_format="flv", codec="flv1"),
    "ASF": lambda photo: make_street_video(8, container_format="asf", codec="wmv2"),
}  # fmt: skip


def mutate(data, rng):
    """Return the file after one to eight random changes; headers are changed as often as the rest."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if len(content) < 8:
            break
        end = len(content) if rng.random() < 0.5 else min(len(content), 200)
        position = int(rng.integers(end))
        length = int(min(rng.geometric(0.2), len(content) - position))
        match rng.integers(7):
            case 0:
                content[position] ^= 1 << int(rng.integers(8))
            case 1:
                content[position : position + length] = rng.bytes(length)
            case 2:
                del content[position : position + length]
            case 3:
                content[position:position] = rng.bytes(length)
            case 4:
                number = int(rng.choice([0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
                content[position : position + 4] = struct.pack(rng.choice(["<I", ">I"]), number)
            case 5:
                source = int(rng.integers(len(content)))
                content[position : position + length] = content[source : source + length]
            case 6:
                del content[max(1, int(rng.integers(len(content)))) :]
    return bytes(content)


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
            decode(mutate(original, np.random.default_rng([sorted(IMAGES | VIDEOS).index(kind), number])))
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
