"""The common part of the token demos.

    labeled photos ─▶ shards ─▶ tokenizer ─▶ token tables ─▶ training on them

The steps are those of the single commands. An interrupted demo resumes if it is run again.
"""

from __future__ import annotations

from pathlib import Path

from bsq_ray import config, storage
from bsq_ray.demos.prepare_data import UNLIMITED_STEPS, log, pack_if_needed, split_by_content

WORKERS = 2
_HELD_OUT_EVERY, _MIN_PHOTOS_PER_CLASS = 10, 5
_NUM_CROPS, _MAX_CROP_SCALE = 12, 1.25
# Part of the training time that the tokenizer gets.
_TOKENIZER_TIME_FRACTION = 0.5


class TokenPipeline:
    """Data and models of a token demo in one output folder.

    Attributes:
        shards, tables: packed photos and token tables, by "train" and "held_out".
        num_held_out: number of held-out photos.
        classes: names of the classes.
    """

    def __init__(self, images: Path | None, out: Path, minutes: float) -> None:
        """Collect the photos.

        Args:
            images: folder with a subfolder of photos for each class; None collects photos from packages.
            out: output folder.
            minutes: training time of both models together.

        Raises:
            ValueError: too few photos or classes.
        """
        if minutes <= 0:
            raise ValueError(f"--minutes {minutes} must be positive")
        self.out, self.minutes = out, minutes
        self._folders = _collect_photos(images, out)
        self.num_held_out = sum(path.is_file() for path in self._folders["held_out"].rglob("*"))
        self.shards: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        self.classes: tuple[str, ...] = ()

    def prepare(self, overrides: tuple[str, ...]) -> None:
        """Pack the photos, train a tokenizer (preset `demo`) on them and write their token tables."""
        from bsq_ray.data.manifest import read_manifest
        from bsq_ray.data.tokenize import tokenize

        self.shards = {name: pack_if_needed(folder, self.out / "data" / name) for name, folder in self._folders.items()}
        self.classes = read_manifest(self.shards["train"]).classes
        if self.classes != read_manifest(self.shards["held_out"]).classes:
            raise ValueError(f"training and held-out photos in {self.out} have different classes; choose another --out")
        tokenizer = self.train(config.load_config("demo", (UNLIMITED_STEPS, *overrides)), "tokenizer", self.shards)
        for name, num_crops in (("train", _NUM_CROPS), ("held_out", 1)):
            self.tables[name] = str(self.out / "tokens" / name)
            result = tokenize(
                tokenizer,
                self.shards[name],
                self.tables[name],
                num_workers=WORKERS,
                num_crops=num_crops,
                scale=_MAX_CROP_SCALE,
                flip=True,
            )
            log(f"{result.table.num_rows} rows of tokens in {self.tables[name]}")

    def train(self, run_config: config.AnyConfig, name: str, data: dict[str, str]) -> str:
        """Train a model for its part of the time, or resume; return the model folder."""
        from bsq_ray.runtime.ray_session import max_cluster_gpus
        from bsq_ray.training.checkpoints.writer import list_checkpoints
        from bsq_ray.training.launch import train

        run_url = str(self.out / name)
        time_fraction = _TOKENIZER_TIME_FRACTION if run_config.stage == "tokenizer" else 1 - _TOKENIZER_TIME_FRACTION
        log(f"training the {name}, {self.minutes * time_fraction:g} minutes")
        train(
            run_config,
            data["train"],
            run_url,
            WORKERS,
            resume=bool(list_checkpoints(run_url)),
            held_out_url=data["held_out"],
            minutes=self.minutes * time_fraction,
            device="gpu" if max_cluster_gpus() >= WORKERS else "cpu",
        )
        return storage.join(run_url, "model")


def _collect_photos(images: Path | None, out: Path) -> dict[str, Path]:
    """Return the folders of training and held-out photos, each with a subfolder per class."""
    if images is None:
        from bsq_ray.samples.labeled_photos import collect_labeled_photos

        train, held_out = collect_labeled_photos(out / "photos", out / "packages")
        return {"train": train, "held_out": held_out}
    from bsq_ray.data.file_list import list_files
    from bsq_ray.media.images import IMAGE_SUFFIXES

    folders = {name: out / "photos" / name for name in ("train", "held_out")}
    file_list = list_files(str(images), "images", IMAGE_SUFFIXES)
    for line in file_list.ignored.describe():
        log(f"ignored {line}")
    files_by_class: dict[str, list[Path]] = {name: [] for name in file_list.classes}
    for url, label in zip(file_list.urls, file_list.labels, strict=True):
        files_by_class[file_list.classes[label]].append(Path(url))
    small_classes = [
        f"{name} ({len(paths)})" for name, paths in files_by_class.items() if len(paths) < _MIN_PHOTOS_PER_CLASS
    ]
    if len(files_by_class) < 2 or small_classes:
        detail = (
            f"; too few are in {', '.join(small_classes)}"
            if small_classes
            else f"; it has {len(files_by_class)} of them"
        )
        raise ValueError(
            f"{images} must have two or more class folders with {_MIN_PHOTOS_PER_CLASS} photos or more each{detail}"
        )
    for name, paths in files_by_class.items():
        split_by_content(paths, folders["train"] / name, folders["held_out"] / name, _HELD_OUT_EVERY)
    return folders
