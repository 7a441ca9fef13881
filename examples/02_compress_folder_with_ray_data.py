"""Compress the images of a folder into `.bsq` files with Ray Data, one codec per actor.

    python examples/02_compress_folder_with_ray_data.py quickstart/run/model photos compressed --actors 2

Each actor loads the model once. Unreadable files are reported and do not end the job.
On a cluster: `ray job submit ... -- python examples/02_compress_folder_with_ray_data.py ... --actors 16 --gpus 1`.
"""

import argparse
import io
from pathlib import PurePosixPath
from typing import Any

import ray
from PIL import Image, ImageOps

from bsq_ray import Codec, storage


class CompressFile:
    """Compress an encoded image and write the `.bsq` file."""

    def __init__(self, model: str, out: str, device: str) -> None:
        self.codec = Codec.from_pretrained(model, device=device)
        self.out = out

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(row["bytes"]))).convert("RGB")
            data = self.codec.compress(image).data
            storage.write_bytes(storage.join(self.out, PurePosixPath(row["path"]).stem + ".bsq"), data)
        except (OSError, ValueError) as error:
            return {"path": row["path"], "message": f"skipped: {error}"}
        return {"path": row["path"], "message": f"{len(row['bytes'])} to {len(data)} bytes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder or URL")
    parser.add_argument("src", help="folder or URL of images")
    parser.add_argument("out", help="folder or URL of the .bsq files")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per actor; 0 uses CPUs")
    arguments = parser.parse_args()
    # Actors may run in another folder or on another node.
    model, src, out = (storage.absolute(url) for url in (arguments.model, arguments.src, arguments.out))
    rows = ray.data.read_binary_files(src, include_paths=True).map(
        CompressFile,
        fn_constructor_args=(model, out, "cuda" if arguments.gpus else "cpu"),
        concurrency=arguments.actors,
        num_gpus=arguments.gpus,
    )
    for row in rows.iter_rows():
        print(f"{row['path']}: {row['message']}")


if __name__ == "__main__":
    main()
