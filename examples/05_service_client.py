"""Call the HTTP service with the standard library: compress an image, decompress it, generate one of a class.

    bsq-ray serve --model runs/prior/model --model runs/lm/model        # in another terminal
    python examples/05_service_client.py photo.png --url http://127.0.0.1:8000

Set BSQ_RAY_TOKEN to the bearer token of a service that is not on loopback.
"""

import argparse
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def request(url: str, body: bytes | None = None, accept: str = "*/*") -> IO[bytes]:
    """Send GET, or POST with a body; raise RuntimeError with the message of the service."""
    headers = {"Accept": accept}
    if token := os.environ.get("BSQ_RAY_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url} returned {error.code}: {error.read().decode()}") from None


def generate_steps(url: str, label: int) -> Iterator[dict]:
    """Yield the JSON lines of a generation, one per step, while the service computes them."""
    with request(f"{url}/v1/generate", json.dumps({"class": label, "seed": 1}).encode()) as lines:
        for line in lines:
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--label", type=int, default=0, help="class to generate")
    arguments = parser.parse_args()
    with request(f"{arguments.url}/v1/models") as response:
        print(json.dumps(json.load(response), indent=1))

    image = Path(arguments.image)
    with request(f"{arguments.url}/v1/compress", image.read_bytes()) as response:
        compressed = response.read()
    image.with_suffix(".bsq").write_bytes(compressed)
    with request(f"{arguments.url}/v1/decompress", compressed, "image/png") as response:
        image.with_suffix(".decoded.png").write_bytes(response.read())
    print(f"{image.stat().st_size} bytes to {len(compressed)} bytes")
    for step in generate_steps(arguments.url, arguments.label):
        print("step", step.get("step"), "of", step.get("steps"))


if __name__ == "__main__":
    main()
