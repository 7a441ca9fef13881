"""Shared steps of the generation and compression demos, which train a second model on tokens.

    labeled photos ─▶ shards ─▶ tokenizer ─▶ token tables ─▶ masked language model or prior

Each step calls the function behind the command of the same name. Running an interrupted demo again resumes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bsq_ray import config, storage
from bsq_ray.demos.prepare_data import PHOTOS, UNLIMITED_STEPS, log, pack_if_needed, split_by_content

WORKERS = 2
# One of this many photos of a class is held out.
_HELD_OUT_EVERY = 10
_MIN_PHOTOS_PER_CLASS = 5
# Fraction of the training time for the tokenizer; the second model gets the rest.
_TOKENIZER_TIME_FRACTION = 0.5


@dataclass(frozen=True)
class TokenRecipe:
    """Tokens that the second model of a demo learns.

    Attributes:
        preset: preset of the tokenizer.
        max_side: longest side of a photo in the shards, pixels.
        num_crops: rows of tokens per training photo.
        num_held_out_crops: rows of tokens per held-out photo; the first one is the whole photo.
        max_crop_scale: largest random resize before a crop, as a multiple of the tokenizer's image size.
    """

    preset: str
    max_side: int
    num_crops: int
    num_held_out_crops: int
    max_crop_scale: float


# Generated images show whole photos.
WHOLE_PHOTOS = TokenRecipe("demo", PHOTOS.max_side, 12, 1, 1.25)
# The codec computes large photos, of which a crop is a detail.
PHOTO_DETAILS = TokenRecipe("demo-any-size", 640, 40, 8, 8.0)


class TokenPipeline:
    """Data and models of a token demo in one output folder.

    Attributes:
        shards, token_tables: URLs of the packed photos and of the token tables, by split ("train" and "held_out").
        num_held_out: number of held-out photos.
        classes: names of the classes.
    """

    def __init__(self, images: Path | None, out: Path, minutes: float, recipe: TokenRecipe) -> None:
        """Collect the photos.

        Args:
            images: folder with a subfolder of photos for each class; None collects photos from packages.
            out: output folder.
            minutes: total training time of both models.
            recipe: tokenizer and crops.

        Raises:
            ValueError: too few photos or classes.
        """
        if minutes <= 0:
            raise ValueError(f"--minutes {minutes} must be positive")
        self.out, self.minutes, self.recipe = out, minutes, recipe
        self._folders = _collect_photos(images, out)
        self.num_held_out = sum(path.is_file() for path in self._folders["held_out"].rglob("*"))
        self.shards: dict[str, str] = {}
        self.token_tables: dict[str, str] = {}
        self.classes: tuple[str, ...] = ()

    def prepare(self, overrides: tuple[str, ...]) -> None:
        """Pack the photos, train a tokenizer on them, and write the token tables.

        Args:
            overrides: overrides of the configuration of the tokenizer.
        """
        from bsq_ray.data.manifest import read_manifest
        from bsq_ray.data.tokenize import tokenize

        self.shards = {
            split: pack_if_needed(folder, self.out / "data" / split, replace(PHOTOS, max_side=self.recipe.max_side))
            for split, folder in self._folders.items()
        }
        self.classes = read_manifest(self.shards["train"]).classes
        if self.classes != read_manifest(self.shards["held_out"]).classes:
            raise ValueError(f"training and held-out photos in {self.out} have different classes; choose another --out")
        tokenizer = self.train(
            config.load_config(self.recipe.preset, (UNLIMITED_STEPS, *overrides)), "tokenizer", self.shards
        )
        for split, num_crops in (("train", self.recipe.num_crops), ("held_out", self.recipe.num_held_out_crops)):
            self.token_tables[split] = str(self.out / "tokens" / split)
            result = tokenize(
                tokenizer,
                self.shards[split],
                self.token_tables[split],
                num_workers=WORKERS,
                num_crops=num_crops,
                scale=self.recipe.max_crop_scale,
                flip=True,
            )
            log(f"{result.table.num_rows} rows of tokens in {self.token_tables[split]}")

    def train(self, run_config: config.AnyConfig, name: str, data: dict[str, str]) -> str:
        """Train a model for its fraction of the time, or resume its training.

        Args:
            run_config: configuration of the model.
            name: name of the run folder in the output folder.
            data: URLs of the training data by split.

        Returns:
            The URL of the model folder.
        """
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

    folders = {split: out / "photos" / split for split in ("train", "held_out")}
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
            else f"; it has {len(files_by_class)} class folders"
        )
        raise ValueError(
            f"{images} must have two or more class folders with {_MIN_PHOTOS_PER_CLASS} photos or more each{detail}"
        )
    for name, paths in files_by_class.items():
        split_by_content(paths, folders["train"] / name, folders["held_out"] / name, _HELD_OUT_EVERY)
    return folders
