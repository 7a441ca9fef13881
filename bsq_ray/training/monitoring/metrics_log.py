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
_FLUSH_INTERVAL_S = 30.0


class MetricsLog:
    """Appends records to `out/metrics.jsonl` and the scalars in them to `out/tensorboard/`.

    Args:
        out_url: folder of the run.
        step: the run goes on after this step; later records of an interrupted attempt are dropped.
    """

    def __init__(self, out_url: str, last_step: int) -> None:
        from tensorboardX import SummaryWriter

        self.out_url = out_url
        self._is_local = storage.is_local(out_url)
        self._url = storage.join(out_url, "metrics.jsonl")
        self._previous_lines = [f"{line}\n" for line in _lines_up_to(self._url, last_step)]
        self._pending_lines: list[str] = []
        storage.write_bytes(self._url, "".join(self._previous_lines).encode())
        self._last_flush = 0.0
        self._temp_dir = tempfile.TemporaryDirectory()
        # Written aside and copied: at a full disk its thread ends in silence, and whoever writes then waits for ever.
        # Named by the step too: a run that is resumed within a second must not overwrite its own file.
        self._tensorboard = SummaryWriter(
            self._temp_dir.name,
            purge_step=last_step + 1 if last_step else None,
            filename_suffix=f".step-{last_step:07d}",
        )

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; its numbers go to TensorBoard under `kind/name`."""
        self._pending_lines.append(f"{json.dumps(record)}\n")
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        # What storage refuses now it may take the next time; nothing is lost meanwhile.
        with suppress(storage.StorageUnavailableError):
            if time.monotonic() - self._last_flush > _FLUSH_INTERVAL_S:
                self.flush()
            elif self._is_local:
                self._write_pending()

    def image(self, name: str, pixels_3HW: Tensor) -> None:
        """Writes a uint8 picture as `out/samples/{name}.png`."""
        png = io.BytesIO()
        Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy()).save(png, "PNG")
        storage.write_bytes(storage.join(self.out_url, "samples", f"{name}.png"), png.getvalue())

    def flush(self) -> None:
        """Makes everything written so far visible.

        Raises:
            storage.Unavailable: storage failed; what was to be written is kept for the next call.
        """
        self._last_flush = time.monotonic()
        self._tensorboard.flush()
        self._write_pending()
        for path in Path(self._temp_dir.name).iterdir():
            storage.upload(str(path), storage.join(self.out_url, "tensorboard", path.name))

    def close(self) -> None:
        """Flushes and releases the files."""
        # First, because it waits for what is still on its way into the file.
        self._tensorboard.close()
        self.flush()
        self._temp_dir.cleanup()

    def _write_pending(self) -> None:
        """Appends on a disk; an object store cannot, so there the whole file is written again."""
        if not self._is_local:
            storage.write_bytes(self._url, "".join(self._previous_lines + self._pending_lines).encode())
            return
        data = "".join(self._pending_lines).encode()
        with storage.translate_errors(self._url, "write"), open(storage.filesystem(self._url)[1], "ab", 0) as file:
            end = file.tell()
            if file.write(data) < len(data):
                # All or nothing, so that no line is cut off.
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending_lines.clear()


def _lines_up_to(url: str, step: int) -> list[str]:
    """The records of an earlier part of the run; a last line cut off by a crash is not one."""
    lines = storage.read_text(url).splitlines(keepends=True) if storage.exists(url) else []
    complete_lines = [line.rstrip("\n") for line in lines if line.endswith("\n")]
    return [line for line in complete_lines if json.loads(line)["step"] <= step]
