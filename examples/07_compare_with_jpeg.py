"""Compare a photo in a .bsq file with JPEG and WebP files of at most the same number of bytes.

python examples/07_compare_with_jpeg.py photo.jpg comparison.png --model photo-prior --crop 200,60,600,360
"""

import argparse
import io

from PIL import Image, ImageDraw, ImageFont

from bsq_ray import Codec


def compress_to_size(photo: Image.Image, file_format: str, num_bytes: int) -> bytes:
    """Return the file of the highest quality that has at most this many bytes, or else that of the lowest quality."""
    files = {}
    low, high = 0, 101
    while low < high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        photo.save(buffer, file_format, quality=quality)
        files[quality] = buffer.getvalue()
        low, high = (quality + 1, high) if buffer.tell() <= num_bytes else (low, quality)
    return files[max(low - 1, 0)]


parser = argparse.ArgumentParser()
parser.add_argument("photo")
parser.add_argument("out")
parser.add_argument("--model", default="photo-prior")
parser.add_argument("--crop", help="left,top,right,bottom of the part to show, in pixels")
arguments = parser.parse_args()

photo = Image.open(arguments.photo).convert("RGB")
codec = Codec.from_pretrained(arguments.model)
data = codec.compress(photo).data
panels = [("original", photo), (f"bsq_ray, {len(data):,} bytes", codec.decompress(data))]
for file_format in ("JPEG", "WEBP"):
    file = compress_to_size(photo, file_format, len(data))
    note = " (its smallest)" if len(file) > len(data) else ""
    panels.append((f"{file_format}, {len(file):,} bytes{note}", Image.open(io.BytesIO(file))))

box = tuple(map(int, arguments.crop.split(","))) if arguments.crop else (0, 0, *photo.size)
width, height, title = box[2] - box[0], box[3] - box[1], 26
sheet = Image.new("RGB", (len(panels) * (width + 4) - 4, height + title), "white")
for number, (name, image) in enumerate(panels):
    left = number * (width + 4)
    ImageDraw.Draw(sheet).text((left + 4, 4), name, fill="black", font=ImageFont.load_default(16))
    sheet.paste(image.crop(box), (left, title))
sheet.save(arguments.out)
print(f"{arguments.out}: {', '.join(name for name, _ in panels)}")
