"""The run's records on disk: `metrics.jsonl`, TensorBoard files and pictures. Written by the first worker."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bsq_ray import storage

# Remote files and those of TensorBoard are rewritten whole, so not at every record.
_FLUSH_SECONDS = 30.0


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
        self._old = [f"{line}\n" for line in _lines_until(self._url, step)]
        self._new: list[str] = []
        storage.write_bytes(self._url, "".join(self._old).encode())
        self._written = 0.0
        self._scratch = tempfile.TemporaryDirectory()
        # Written aside and copied: at a full disk its thread ends in silence, and whoever writes then waits for ever.
        # Named by the step too: a run that is resumed within a second must not overwrite its own file.
        self._tensorboard = SummaryWriter(
            self._scratch.name, purge_step=step + 1 if step else None, filename_suffix=f".step-{step:07d}"
        )

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; its numbers go to TensorBoard under `kind/name`."""
        self._new.append(f"{json.dumps(record)}\n")
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        # What storage refuses now it may take the next time; nothing is lost meanwhile.
        with suppress(storage.StorageUnavailableError):
            if time.monotonic() - self._written > _FLUSH_SECONDS:
                self.flush()
            elif self._local:
                self._write_new()

    def picture(self, name: str, pixels_3HW: Tensor) -> None:
        """Writes a uint8 picture as `out/samples/{name}.png`."""
        png = io.BytesIO()
        Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy()).save(png, "PNG")
        storage.write_bytes(storage.join(self.out_url, "samples", f"{name}.png"), png.getvalue())

    def flush(self) -> None:
        """Makes everything written so far visible.

        Raises:
            storage.Unavailable: storage failed; what was to be written is kept for the next call.
        """
        self._written = time.monotonic()
        self._tensorboard.flush()
        self._write_new()
        for path in Path(self._scratch.name).iterdir():
            storage.upload(str(path), storage.join(self.out_url, "tensorboard", path.name))

    def close(self) -> None:
        """Flushes and releases the files."""
        # First, because it waits for what is still on its way into the file.
        self._tensorboard.close()
        self.flush()
        self._scratch.cleanup()

    def _write_new(self) -> None:
        """Appends on a disk; an object store cannot, so there the whole file is written again."""
        if not self._local:
            storage.write_bytes(self._url, "".join(self._old + self._new).encode())
            return
        data = "".join(self._new).encode()
        with storage.translate_errors(self._url, "write"), open(storage.filesystem(self._url)[1], "ab", 0) as file:
            end = file.tell()
            if file.write(data) < len(data):
                # All or nothing, so that no line is cut off.
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._new.clear()


def _lines_until(url: str, step: int) -> list[str]:
    """The records of an earlier part of the run; a last line cut off by a crash is not one."""
    lines = storage.read_text(url).splitlines(keepends=True) if storage.exists(url) else []
    whole = [line.rstrip("\n") for line in lines if line.endswith("\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]
