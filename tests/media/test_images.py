"""Decoding of images: orientation, modes, color profiles, and invalid files."""

import io

import numpy as np
import pytest
from PIL import Image

from bsq_ray.data.transforms import eval_transform
from bsq_ray.media.images import DECODE_ERRORS, decode_image, encode_png, read_image, to_rgb


def encode(image, file_format, **options):
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


@pytest.fixture
def photo(photos):
    return photos[0]


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


def test_decode_image_unusual_modes_become_upright_rgb(photo):
    """Rotated, gray, transparent, CMYK and 16-bit images become upright RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(photo, "JPEG", exif=exif))
    assert turned.size == photo.size[::-1]
    assert decode_image(encode(photo.convert("CMYK"), "JPEG")).mode == "RGB"
    assert decode_image(encode(photo.convert("L"), "PNG")).mode == "RGB"
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(encode(transparent, "PNG")).getpixel((3, 3)) == (255, 255, 255)
    deep = Image.fromarray(np.full((16, 16), 32768, np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


@pytest.mark.parametrize("data", [b"", b"this is text", b"\xff\xd8\xff\xe0 half a header"])
def test_decode_image_invalid_data_raises_decode_error(data):
    """Data that is not an image raises one of `DECODE_ERRORS`."""
    with pytest.raises(DECODE_ERRORS):
        decode_image(data)


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
