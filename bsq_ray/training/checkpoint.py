"""Checkpoints of a run: every worker writes its part, then one file makes the whole visible.

    out/checkpoints/step-000100/generator/… discriminator/… ema.safetensors rng-0.pt … checkpoint.json

`checkpoint.json` is written last and lists every file with size and SHA-256, so a half-written checkpoint is never
taken for one, on a disk or in an object store, and a damaged one is recognised.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bsq_ray import storage
from bsq_ray.training.worker import Worker

_INDEX = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and what it is a run of.

    Attributes:
        step: steps taken.
        position: samples consumed by all workers together.
        elapsed: seconds of training, over all its parts.
        world: workers that wrote the checkpoint.
        dataset: hash of the data set.
        config: the configuration, as YAML.
    """

    step: int
    position: int
    elapsed: float
    world: int
    dataset: str
    config: str


def save_checkpoint(out_url: str, progress: Progress, worker: Worker, write: Callable[[Path], None], keep: int) -> None:
    """Writes a checkpoint and removes old ones; every worker calls it.

    Args:
        write: writes this worker's files into a local folder; names are the worker's own.
        keep: newest checkpoints to keep.
    """
    url = _url(out_url, progress.step)
    if worker.first:
        storage.remove_folder(url)
    worker.barrier()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        mine = [_describe(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda file: storage.copy_in(str(folder / file["name"]), storage.join(url, file["name"])), mine
                )
            )
    files = [file for part in worker.gather(mine) for file in part]
    if worker.first:
        index = {"version": 1, "progress": asdict(progress), "files": files}
        storage.write_bytes(storage.join(url, _INDEX), json.dumps(index, indent=1).encode())
        _remove_old(out_url, keep)
    worker.barrier()


def load_checkpoint(out_url: str, folder: Path) -> tuple[Progress | None, list[str]]:
    """Copies the newest whole checkpoint into a local folder and checks every file.

    Returns:
        How far it is, None if there is none; and one sentence for each damaged checkpoint that was passed over.
    """
    warnings: list[str] = []
    for name in reversed(list_checkpoints(out_url)):
        url = storage.join(out_url, "checkpoints", name)
        try:
            progress, files = _read_index(url)
            with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(4) as pool:
                list(pool.map(partial(_fetch, url, Path(scratch)), files))
                for path in Path(scratch).iterdir():
                    path.rename(folder / path.name)
        except ValueError as error:
            warnings.append(f"the checkpoint {url} is damaged and is passed over: {error}")
            continue
        return progress, warnings
    return None, warnings


def newest_progress(out_url: str) -> Progress | None:
    """How far the newest checkpoint with a readable index is, without reading its files."""
    for name in reversed(list_checkpoints(out_url)):
        try:
            return _read_index(storage.join(out_url, "checkpoints", name))[0]
        except ValueError:
            continue
    return None


def list_checkpoints(out_url: str) -> list[str]:
    """Names of the visible checkpoints of a run, oldest first."""
    root = storage.join(out_url, "checkpoints")
    names = [name for name in storage.list_folder(root) if name.startswith("step-")]
    return [name for name in sorted(names) if storage.exists(storage.join(root, name, _INDEX))]


def _url(out_url: str, step: int) -> str:
    return storage.join(out_url, "checkpoints", f"step-{step:07d}")


def _read_index(url: str) -> tuple[Progress, list[dict[str, Any]]]:
    """What a checkpoint's index says.

    Raises:
        ValueError: it is not an index.
    """
    try:
        index = json.loads(storage.read_bytes(storage.join(url, _INDEX)))
        return Progress(**index["progress"]), list(index["files"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{_INDEX} is not the index of a checkpoint ({error})") from error


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    return {"name": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _fetch(url: str, folder: Path, file: dict[str, Any]) -> None:
    target = folder / file["name"]
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.copy_out(storage.join(url, file["name"]), str(target))
    if _sha256(target) != file["sha256"]:
        raise ValueError(f"{file['name']} is not the file that was written")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_old(out_url: str, keep: int) -> None:
    root = storage.join(out_url, "checkpoints")
    whole = list_checkpoints(out_url)
    kept = set(whole[-keep:])
    for name in storage.list_folder(root):
        # A folder without an index is what an interrupted save left behind.
        if name.startswith("step-") and name not in kept:
            storage.remove_folder(storage.join(root, name))
