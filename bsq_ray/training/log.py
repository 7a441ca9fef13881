"""The run's records on disk: `metrics.jsonl`, TensorBoard files and pictures. Written by the first worker."""

from __future__ import annotations

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bsq_ray import storage

# Remote files are rewritten whole, so not at every record.
_REMOTE_SECONDS = 30.0


class Log:
    """Appends records to `out/metrics.jsonl` and the scalars in them to `out/tensorboard/`.

    Args:
        out_url: folder of the run.
        step: the run goes on after this step; later records of an interrupted attempt are dropped.
    """

    def __init__(self, out_url: str, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.out_url = out_url
        self._local = storage.is_local(out_url)
        self._url = storage.join(out_url, "metrics.jsonl")
        self._lines = [line for line in _read_lines(self._url) if json.loads(line)["step"] <= step]
        self._written = 0.0
        self._scratch = tempfile.TemporaryDirectory()
        folder = storage.filesystem(storage.join(out_url, "tensorboard"))[1] if self._local else self._scratch.name
        self._tensorboard = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; its numbers go to TensorBoard under `kind/name`."""
        self._lines.append(json.dumps(record))
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        if self._local or time.monotonic() - self._written > _REMOTE_SECONDS:
            self.flush()

    def picture(self, name: str, pixels_3HW: Tensor) -> None:
        """Writes a uint8 picture as `out/samples/{name}.png`."""
        png = io.BytesIO()
        Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy()).save(png, "PNG")
        storage.write_bytes(storage.join(self.out_url, "samples", f"{name}.png"), png.getvalue())

    def flush(self) -> None:
        """Makes everything written so far visible."""
        storage.write_bytes(self._url, "".join(f"{line}\n" for line in self._lines).encode())
        self._tensorboard.flush()
        if not self._local:
            for path in Path(self._scratch.name).iterdir():
                storage.copy_in(str(path), storage.join(self.out_url, "tensorboard", path.name))
        self._written = time.monotonic()

    def close(self) -> None:
        """Flushes and releases the files."""
        self.flush()
        self._tensorboard.close()
        self._scratch.cleanup()


def _read_lines(url: str) -> list[str]:
    return storage.read_bytes(url).decode().splitlines() if storage.exists(url) else []
