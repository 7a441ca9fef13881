"""Asynchronous checkpoints: every worker writes its part while training continues, then an index publishes them.

    out/checkpoints/step-000100/generator/… discriminator/… ema.safetensors rng-0.pt … checkpoint.json

`checkpoint.json` is written last and lists every file with size and SHA-256. A partial checkpoint therefore has no
index, on disks and object stores alike, and a damaged one is detected.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bsq_ray import storage
from bsq_ray.runtime.daemon_thread import run_in_thread
from bsq_ray.training.checkpoints.host_snapshot import FileWriters
from bsq_ray.training.worker_context import WorkerContext

_INDEX_FILE = "checkpoint.json"
# Disk full, or the user's quota exceeded.
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 2**20


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run and what identifies the run.

    Attributes:
        step: steps taken.
        position: samples consumed by all workers together.
        elapsed: seconds of training over all parts of the run, evaluations included.
        world: number of workers that wrote the checkpoint.
        dataset: hash of the data set.
        config: configuration as YAML.
    """

    step: int
    position: int
    elapsed: float
    world: int
    dataset: str
    config: str


class CheckpointWriter:
    """Writes one checkpoint at a time; `save`, `advance` and `wait` are collective.

        training thread:  save ────────┬─▶ steps ─▶ advance: gather file lists ─┬─▶ steps ─▶ advance: published
        writer thread:                 └─ write, checksum, upload               └─ rank 0: index, remove old ones

    Args:
        out_url: folder of the run.
        num_to_keep: number of newest checkpoints to keep.
        timeout_s: how long failing storage operations are retried.
        on_published: called with the step of each published checkpoint and the seconds since `save`.
    """

    def __init__(
        self,
        out_url: str,
        worker: WorkerContext,
        *,
        num_to_keep: int,
        timeout_s: float,
        on_published: Callable[[int, float], None],
    ) -> None:
        self._out_url, self._worker, self._num_to_keep, self._timeout_s = out_url, worker, num_to_keep, timeout_s
        self._on_published = on_published
        self._progress: RunProgress | None = None
        self._future: Future[Any] | None = None
        self._is_publishing = False
        self._start_time = 0.0
        self._warnings: SimpleQueue[str] = SimpleQueue()

    @property
    def is_busy(self) -> bool:
        """Return True while this worker's thread is running; when no worker is busy, call `advance`."""
        return self._future is not None and not self._future.done()

    def drain_warnings(self) -> list[str]:
        """Return the warnings about retried storage operations since the last call."""
        return [self._warnings.get() for _ in range(self._warnings.qsize())]

    def save(self, progress: RunProgress, files: FileWriters) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        Args:
            files: from `TrainState.snapshot`.

        Raises:
            RuntimeError: the previous checkpoint could not be written; raised on all workers together.
        """
        self.wait()
        self._progress, self._is_publishing, self._start_time = progress, False, time.monotonic()
        self._future = run_in_thread(
            partial(self._write, _checkpoint_url(self._out_url, progress.step), files), "checkpoint"
        )

    def advance(self) -> None:
        """Publish the checkpoint whose parts are written, or report that it is published.

        Call it on every worker when none is busy. It does nothing if no checkpoint is in progress.

        Raises:
            RuntimeError: the checkpoint could not be written; raised on all workers together.
        """
        if self._progress is None:
            return
        assert self._future is not None
        failure = self._future.exception()
        text = failure and (str(failure) or repr(failure))
        results = self._worker.all_gather_object((None if failure else self._future.result(), text))
        step = self._progress.step
        for rank, (_, text) in enumerate(results):
            if text:
                self._progress = self._future = None
                raise RuntimeError(f"worker {rank} cannot write the checkpoint of step {step}: {text}")
        if self._is_publishing:
            self._progress = self._future = None
            self._on_published(step, time.monotonic() - self._start_time)
            return
        self._is_publishing = True
        files = [file for part, _ in results for file in part]
        index = {"version": 1, "progress": asdict(self._progress), "files": files}
        publish = partial(self._publish, step, index)
        self._future = run_in_thread(publish if self._worker.is_main else _noop, "checkpoint")

    def wait(self) -> None:
        """Wait until the checkpoint in progress is published; raises like `advance`."""
        while self._future is not None:
            wait([self._future])
            self.advance()

    def _write(self, url: str, files: FileWriters) -> list[dict[str, Any]]:
        """Write and upload this worker's files; return name, bytes and sha256 of each."""
        if self._worker.is_main:
            # A damaged checkpoint of this step may have been skipped when the run resumed.
            self._retry(partial(storage.remove, storage.join(url, _INDEX_FILE)))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for name, write in files.items():
                _write_to_temp(write, folder, name)
            descriptions = [_describe(folder / name, folder) for name in files]
            for name in files:
                self._retry(partial(storage.upload, str(folder / name), storage.join(url, name)))
        return descriptions

    def _publish(self, step: int, index: dict[str, Any]) -> None:
        data = json.dumps(index, indent=1).encode()
        self._retry(partial(storage.write_bytes, storage.join(_checkpoint_url(self._out_url, step), _INDEX_FILE), data))
        self._retry(partial(_remove_old, self._out_url, self._num_to_keep, step))

    def _retry(self, operation: Callable[[], None]) -> None:
        storage.retry_while_unavailable(operation, self._timeout_s, self._warnings.put)


def load_checkpoint(
    out_url: str,
    folder: Path,
    is_needed: Callable[[RunProgress, str], bool] = lambda progress, name: True,
    excluded: Collection[str] = (),
) -> tuple[RunProgress | None, dict[str, str]]:
    """Download files of the newest intact checkpoint into an empty local folder and verify them.

    Args:
        folder: local folder; what it contains is removed.
        is_needed: returns True for the name of a file to download from the checkpoint with this progress.
        excluded: names of checkpoints that are damaged.

    Returns:
        Its progress, None if there is none; and by name of each damaged checkpoint that was skipped, a warning.

    Raises:
        StorageUnavailableError: storage is unavailable, so the checkpoints cannot be verified.
    """
    damaged: dict[str, str] = {}
    for name in reversed(list_checkpoints(out_url)):
        if name in excluded:
            continue
        url = storage.join(out_url, "checkpoints", name)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            progress, files = _read_index(url)
            needed = [file for file in files if is_needed(progress, file["name"])]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(partial(_download, url, folder), needed))
        except storage.StorageUnavailableError:
            raise
        except ValueError as error:
            damaged[name] = f"the checkpoint {url} is damaged and is skipped: {error}"
            continue
        return progress, damaged
    return None, damaged


def newest_progress(out_url: str) -> RunProgress | None:
    """Return the progress of the newest checkpoint with a readable index, without reading its files."""
    for name in reversed(list_checkpoints(out_url)):
        try:
            return _read_index(storage.join(out_url, "checkpoints", name))[0]
        except storage.StorageUnavailableError:
            raise
        except ValueError:
            continue
    return None


def list_checkpoints(out_url: str) -> list[str]:
    """Return the names of the published checkpoints of a run, oldest first."""
    root = storage.join(out_url, "checkpoints")
    names = [name for name in storage.list_folder(root) if name.startswith("step-")]
    return [name for name in sorted(names) if storage.exists(storage.join(root, name, _INDEX_FILE))]


def _checkpoint_url(out_url: str, step: int) -> str:
    return storage.join(out_url, "checkpoints", checkpoint_name(step))


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:07d}"


def _read_index(url: str) -> tuple[RunProgress, list[dict[str, Any]]]:
    """Read a checkpoint's index: progress, and name, bytes and sha256 of each file.

    Raises:
        ValueError: the file is not an index.
    """
    try:
        index = json.loads(storage.read_bytes(storage.join(url, _INDEX_FILE)))
        files = [{name: file[name] for name in ("name", "bytes", "sha256")} for file in index["files"]]
        return RunProgress(**index["progress"]), files
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_INDEX_FILE} is not the index of a checkpoint ({error})") from error


def _write_to_temp(write: Callable[[Path], None], folder: Path, name: str) -> None:
    """Write a file into the scratch folder.

    Raises:
        RuntimeError: the disk is full.
        Exception: any other error of the writer.
    """
    try:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name)
    except Exception as error:
        if not _is_disk_full(error, folder / name):
            raise
        free_mb = shutil.disk_usage(folder).free / 1e6
        raise RuntimeError(
            f"{name} cannot be written to the scratch folder {folder}, where {free_mb:.0f} MB are free "
            f"({' '.join(str(error).split())}); free space there, or set TMPDIR to a larger folder"
        ) from error


def _is_disk_full(error: Exception, path: Path) -> bool:
    """Return True if a write failed because the disk is full; each library has its own error for it."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL_ERRNOS
    # safetensors includes the system's error number in its message.
    if os_error := re.search(r"\(os error (\d+)\)", str(error)):
        return int(os_error[1]) in _DISK_FULL_ERRNOS
    if not isinstance(error, RuntimeError):
        return False
    # torch.save reports that writing failed but not why, so append to the file to find out.
    try:
        with path.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as probe_error:
        return probe_error.errno in _DISK_FULL_ERRNOS
    return False


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    return {"name": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _download(url: str, folder: Path, file: dict[str, Any]) -> None:
    target = folder / file["name"]
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.download(storage.join(url, file["name"]), str(target))
    if _sha256(target) != file["sha256"]:
        raise ValueError(f"{file['name']} does not have the checksum of the index")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_old(out_url: str, num_to_keep: int, step: int) -> None:
    """Remove all but the newest checkpoints up to `step`; later ones are damaged, as the run did not resume there."""
    root = storage.join(out_url, "checkpoints")
    names_to_keep = set([name for name in list_checkpoints(out_url) if name <= checkpoint_name(step)][-num_to_keep:])
    for name in storage.list_folder(root):
        # A folder without an index is left by an interrupted save.
        if name.startswith("step-") and name not in names_to_keep:
            storage.remove_folder(storage.join(root, name))


def _noop() -> None:
    """Do nothing, on the workers that do not publish."""
