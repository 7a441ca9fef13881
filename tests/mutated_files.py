"""Files of every format that is read, and random changes to their bytes.

    photo ─ IMAGES[kind] or VIDEOS[kind] ─▶ valid file ─ mutated(kind, file, number) ─▶ mutated file

The changes follow from kind and number, so that a number in a failure reproduces the file.
"""

import struct

import numpy as np
from PIL import Image
from small_images import encode, png_with_chunk, swapped_profile, tiff
from small_videos import make_street_video, make_video

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


def mutated(kind, original, number):
    """Return the mutated file of this number."""
    return mutate(original, np.random.default_rng([sorted(IMAGES | VIDEOS).index(kind), number]))
