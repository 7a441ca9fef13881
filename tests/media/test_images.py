"""Decoding of images: orientation, depth, color profiles, animations, metadata, and invalid files."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from small_images import BROKEN_EXIF, deviation, encode, gray_values, swapped_profile, tiff

from bsq_ray.data.transcode import reencode_image
from bsq_ray.data.transforms import eval_transform
from bsq_ray.media.decode_error import DecodeError, UnknownFormatError, translate_decode_errors
from bsq_ray.media.images import decode_image, encode_png, open_image, read_image, to_srgb


@pytest.fixture
def photo(photos):
    return photos[0]


@pytest.fixture(scope="module")
def small(photos):
    """Photo of 48 x 32 pixels."""
    return photos[0].resize((48, 32))


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_decode_image_applies_exif_orientation(small, file_format, orientation):
    """All eight orientations are applied, once, as Pillow does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    transpose = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    upright = decode_image(encode(small, file_format, quality=95))
    expected = upright.transpose(transpose[orientation]) if orientation > 1 else upright
    decoded = decode_image(encode(small, file_format, quality=95, exif=exif))
    assert decoded.size == expected.size
    assert deviation(decoded, expected) == 0
    assert deviation(to_srgb(decoded), expected) == 0


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_decode_image_ignores_broken_exif(small, file_format, exif):
    """Broken EXIF data and impossible orientations do not turn the image and are no errors."""
    plain = decode_image(encode(small, file_format, quality=95))
    assert deviation(decode_image(encode(small, file_format, quality=95, exif=exif)), plain) == 0


# --- modes and depth


def as_mode(mode):
    return lambda image: encode(image.convert(mode), "TIFF")


def deep_png(image):
    return encode(Image.fromarray(np.round(gray_values(image) * 257).astype(np.uint16)), "PNG")


# Files of the same gray image, by their depth; `tiff` writes values as they are.
DEPTHS = {
    "8 bits": lambda image: encode(image.convert("L"), "PNG"),
    "16 bits PNG": deep_png,
    "16 bits TIFF": lambda image: tiff(np.round(gray_values(image) * 257).astype(np.uint16)),
    "16 bits TIFF, white is zero": lambda image: tiff(65535 - np.round(gray_values(image) * 257).astype(np.uint16), 0),
    "16 bits signed TIFF": lambda image: tiff(np.round(gray_values(image) / 255 * 32767).astype(np.int16)),
    "16 bits PGM": lambda image: b"P5 48 32 65535 " + (gray_values(image) * 257).astype(">u2").tobytes(),
    "10 bits PGM": lambda image: b"P5 48 32 1023 " + np.round(gray_values(image) * 1023 / 255).astype(">u2").tobytes(),
    "32-bit integers to 255": lambda image: tiff(gray_values(image).astype(np.int32)),
    "32-bit integers to 65535": lambda image: tiff(np.round(gray_values(image) * 257).astype(np.int32)),
    "32-bit unsigned integers": lambda image: tiff((gray_values(image) * 16843009).astype(np.uint32)),
    "floats to 1": lambda image: tiff((gray_values(image) / 255).astype(np.float32)),
    "floats to 255": lambda image: tiff(gray_values(image).astype(np.float32)),
    "floats to 65535": lambda image: tiff((gray_values(image) * 257).astype(np.float32)),
}


@pytest.mark.parametrize("make_file", DEPTHS.values(), ids=DEPTHS)
def test_decode_image_scales_depth_by_type(small, make_file):
    """A gray image in any depth is the 8-bit image, within one level."""
    full_range = Image.fromarray(
        np.r_[np.zeros((1, 48)), np.full((1, 48), 255), gray_values(small)[2:]].astype(np.uint8)
    )
    assert deviation(decode_image(make_file(full_range)), full_range.convert("RGB")) <= 1


def test_decode_image_dark_16_bit_image_stays_dark():
    """A 16-bit image whose values are below 256 is black: its white follows from the type."""
    assert np.asarray(decode_image(encode(Image.fromarray(np.full((9, 9), 200, np.uint16)), "PNG"))).max() <= 1


# Values without a defined white, and a part of the message.
UNDEFINED_DEPTHS = {
    "negative floats": (np.array([[-0.5, 1]], np.float32), "-0.5 to 1; convert"),
    "infinite floats": (np.array([[0, np.inf]], np.float32), "inf"),
    "not a number": (np.array([[0, np.nan]], np.float32), "nan"),
    "large floats": (np.array([[0, 1e6]], np.float32), "reach 1e\\+06; scale"),
    "negative integers": (np.array([[-7, 9]], np.int32), "-7 to 9; convert"),
    "negative 16-bit integers": (np.array([[-7, 9]], np.int16), "-7 to 9; convert"),
}


@pytest.mark.parametrize(("values", "message"), UNDEFINED_DEPTHS.values(), ids=UNDEFINED_DEPTHS)
def test_decode_image_values_without_white_raise(values, message):
    """Values that have no defined white are an error instead of a black image."""
    with pytest.raises(DecodeError, match=message):
        decode_image(tiff(values))


# Modes of an image file, and a file of the photo in this mode with the largest deviation from RGB or gray.
MODES = {
    "gray": (lambda image: encode(image.convert("L"), "PNG"), "L", 0),
    "one bit": (lambda image: encode(image.convert("1"), "PNG"), "1", 0),
    "palette": (lambda image: encode(image.quantize(256), "PNG"), None, 80),
    "palette GIF": (lambda image: encode(image, "GIF"), None, 80),
    "CMYK JPEG": (lambda image: encode(image.convert("CMYK"), "JPEG", quality=100), None, 12),
    "CMYK TIFF": (as_mode("CMYK"), None, 2),
    "YCbCr TIFF": (as_mode("YCbCr"), None, 4),
    "LAB TIFF": (
        lambda image: encode(
            ImageCms.profileToProfile(
                image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            ),
            "TIFF",
        ),
        None,
        24,
    ),
    "JPEG 2000": (lambda image: encode(image, "JPEG2000"), None, 0),
    "gray with alpha": (lambda image: encode(image.convert("LA"), "PNG"), "L", 0),
}


@pytest.mark.parametrize(("make_file", "mode", "tolerance"), MODES.values(), ids=MODES)
def test_decode_image_any_mode_is_rgb(small, make_file, mode, tolerance):
    """Every mode becomes RGB of the same colors."""
    decoded = decode_image(make_file(small))
    assert decoded.mode == "RGB"
    assert deviation(decoded, (small.convert(mode) if mode else small).convert("RGB")) <= tolerance


def test_decode_image_transparent_parts_are_white():
    """Alpha, color keys and transparent palette entries are blended with white."""
    files = [
        encode(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG"),
        encode(Image.new("RGB", (16, 16), (255, 0, 0)), "PNG", transparency=(255, 0, 0)),
        encode(Image.new("L", (16, 16), 7), "PNG", transparency=7),
        encode(Image.new("P", (16, 16), 0), "PNG", transparency=0),
        encode(Image.fromarray(np.full((16, 16), 700, np.uint16)), "PNG", transparency=700),
        encode(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "WEBP", lossless=True),
    ]
    assert [decode_image(file).getpixel((3, 3)) for file in files] == [(255, 255, 255)] * len(files)


# --- color profiles


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_decode_image_converts_embedded_profile(small, file_format):
    """Pixels are converted to sRGB, once: the profile of the test exchanges red and green."""
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {"quality": 100}
    stored = Image.merge("RGB", [small.getchannel(channel) for channel in "GRB"])
    decoded = decode_image(encode(stored, file_format, icc_profile=swapped_profile(), **options))
    assert np.abs(np.asarray(decoded, int) - np.asarray(small, int)).mean() < 4
    assert deviation(to_srgb(decoded), decoded) == 0


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_decode_image_profile_of_alpha_and_palette(small, mode):
    """Profiles of images with alpha and with a palette are applied, too."""
    stored = Image.merge("RGB", [small.getchannel(channel) for channel in "GRB"]).quantize(64)
    expected = Image.merge("RGB", [stored.convert("RGB").getchannel(channel) for channel in "GRB"])
    data = encode(stored if mode == "P" else stored.convert("RGBA"), "PNG", icc_profile=swapped_profile())
    assert deviation(decode_image(data), expected) <= 3


def test_decode_image_srgb_profile_keeps_exact_pixels(small):
    """An sRGB profile changes nothing, not by one level."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert deviation(decode_image(encode(small, "PNG", icc_profile=profile)), small) == 0


def _damaged(profile, start, content):
    return profile[:start] + content + profile[start + len(content) :]


# Profiles that give no information about the colors of an RGB image.
IGNORED_PROFILES = {
    "text": lambda: b"this is no profile",
    "truncated": lambda: swapped_profile()[:200],
    "no signature": lambda: _damaged(swapped_profile(), 36, b"none"),
    "unknown color space": lambda: _damaged(swapped_profile(), 16, b"XXXX"),
    "of CMYK images": lambda: _damaged(swapped_profile(), 16, b"CMYK"),
    "of gray images": lambda: _damaged(swapped_profile(), 16, b"GRAY"),
    "of Lab": lambda: ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    "tags overwritten": lambda: _damaged(swapped_profile(), 132, b"\xff" * 120),
}


@pytest.mark.parametrize("make_profile", IGNORED_PROFILES.values(), ids=IGNORED_PROFILES)
def test_decode_image_ignores_unusable_profile(small, make_profile):
    """An image with a broken profile, or with one of other colors, is read as sRGB."""
    assert deviation(decode_image(encode(small, "PNG", icc_profile=make_profile())), small) == 0


def test_decode_image_gray_profile_is_applied():
    """A gray profile is applied to gray images; an RGB profile is not."""
    gray = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    linear_curve = b"curv" + bytes(8)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    profile = _icc_profile(b"GRAY", {b"wtpt": white, b"kTRC": linear_curve})
    decoded = np.asarray(decode_image(encode(gray, "PNG", icc_profile=profile)))[0, :, 0]
    linear = np.arange(256) / 255
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(decoded - srgb)[8:].max() <= 2
    assert deviation(decode_image(encode(gray, "PNG", icc_profile=swapped_profile())), gray.convert("RGB")) == 0


def _icc_profile(color_space, tags):
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s12s4s", offset + len(body), b"", 0x02100000, b"mntr", color_space, b"XYZ ", bytes(12), b"acsp"
    )
    header += bytes(68 - len(header)) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("max_side", [None, 24])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_reencode_image_keeps_colors_of_profile(small, file_format, max_side):
    """A stored file, unchanged or shrunk, is read with the colors of the original."""
    data = encode(small, file_format, icc_profile=swapped_profile(), quality=100)
    stored = reencode_image(data, file_format.lower(), max_side)
    original = decode_image(data)
    if max_side is not None:
        original = original.resize((24, 16), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(decode_image(stored.data), int) - np.asarray(original, int)).mean() < 3


# --- animations


def animate(image, file_format, **options):
    return encode(image, file_format, save_all=True, append_images=[image.rotate(180)], **options)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_decode_image_animation_raises(small, file_format):
    """Animations are rejected in every format that has them; the same format with one frame is read."""
    with pytest.raises(DecodeError, match="it is an animation; convert it to a video"):
        decode_image(animate(small, file_format))
    decode_image(encode(small, file_format, save_all=True, append_images=[]))


@pytest.mark.parametrize(("file_format", "tolerance"), [("MPO", 4), ("TIFF", 0)])
def test_decode_image_first_of_several_is_the_image(small, file_format, tolerance):
    """The photo of a JPEG with previews, and the first page of a TIFF."""
    data = animate(small, file_format, quality=95, subsampling=0)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(np.asarray(decode_image(data), int) - np.asarray(small, int)).mean() <= tolerance


def test_reencode_image_mpo_stays_a_jpeg(small):
    """A photo with previews is stored as it is, and shrunk as JPEG."""
    data = animate(small, "MPO", quality=95)
    assert reencode_image(data, "jpg", None).data == data
    assert reencode_image(data, "jpg", 24).suffix == "jpg"


# --- scaled decoding, errors, writing


def test_decode_image_scaled_jpeg_stays_close_to_full(photo):
    """Scaled JPEG decoding keeps at least twice the target size and barely changes the result."""
    data = encode(photo.resize((1024, 768)), "JPEG", quality=95)
    whole, scaled = decode_image(data), decode_image(data, short_side=64)
    assert min(scaled.size) >= 128
    assert scaled.size < whole.size
    difference = np.abs(
        eval_transform(whole, 64, "bilinear").astype(int) - eval_transform(scaled, 64, "bilinear").astype(int)
    )
    assert difference.mean() < 2


ERRORS = [
    RuntimeError("Failed to decode"), ZeroDivisionError(), MemoryError(), RecursionError("deep"), SyntaxError("bad"),
    struct.error("size"), KeyError(3), AssertionError(),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_decode_image_any_error_becomes_decode_error(small, monkeypatch, error):
    """Whatever a decoder raises is an error of this file."""

    def fail(self):
        raise error

    image = open_image(encode(small, "PNG"))
    monkeypatch.setattr(type(image), "load", fail)
    with pytest.raises(DecodeError, match=str(error) or type(error).__name__):
        to_srgb(image)


def test_translate_decode_errors_keeps_class_and_names_file():
    """The prefix names the file; the class of a `DecodeError` stays."""
    with pytest.raises(UnknownFormatError, match="a.png: unknown"), translate_decode_errors("a.png: "):
        raise UnknownFormatError("unknown")


def test_read_image_names_missing_and_invalid_files(tmp_path):
    """A missing file and a file that is not an image raise an error that names the file."""
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("gone.png", "does not exist"), ("text.png", "not an image of a known format")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read_image(str(tmp_path / name))


def test_encode_png_is_lossless(photo):
    """A PNG decodes to the same pixels at every compression level."""
    for level in (1, 6):
        assert np.array_equal(np.asarray(decode_image(encode_png(photo, level))), np.asarray(photo))
