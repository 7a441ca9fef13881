"""Train the models that are part of the package.

    photos ─▶ shards ─▶ tokenizer ─fp16─▶ token tables ─▶ prior ─fp16─▶ bsq_ray/shipped_models/

The tokens are those of the rounded tokenizer. Each step calls the function behind the command of the same name. Running
an interrupted recipe again resumes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from bsq_ray import config, storage
from bsq_ray.demos.prepare_data import PHOTOS, UNLIMITED_STEPS, log, pack_if_needed
from bsq_ray.model_card import CardContent, parse_model_card
from bsq_ray.training.worker_context import Device


@dataclass(frozen=True)
class PretrainRecipe:
    """A tokenizer and a prior on its tokens.

    Attributes:
        name: name of the recipe, for commands.
        description: one line for the list of recipes.
        tokenizer_preset, prior_preset: presets; their names are those of the models.
        collect: returns the folders of training and held-out photos; its argument is the working folder of the recipe.
        licenses: returns the license of the training photos of each package, for the model card.
        max_side: longest side of a photo in the shards, pixels.
        num_crops: rows of tokens per training photo; a held-out photo has four.
        tokenizer_time_fraction: fraction of limited training time for the tokenizer.
        prior_side: see `export_model`.
    """

    name: str
    description: str
    tokenizer_preset: str
    prior_preset: str
    collect: Callable[[Path], tuple[Path, Path]]
    licenses: Callable[[], dict[str, str]]
    max_side: int = 768
    num_crops: int = 32
    tokenizer_time_fraction: float = 0.7
    prior_side: int | None = None


def _collect_photos(folder: Path) -> tuple[Path, Path]:
    from bsq_ray.samples.training_photos import collect_training_photos

    return collect_training_photos(folder / "photos", folder / "packages")


def _photo_licenses() -> dict[str, str]:
    from bsq_ray.samples.training_photos import SOURCES

    return {source.package: source.license for source in SOURCES}


RECIPES = (
    PretrainRecipe(
        "photo",
        "tokenizer and prior for photos of any size",
        "photo",
        "photo-prior",
        _collect_photos,
        _photo_licenses,
        prior_side=8,
    ),
)
_NUM_HELD_OUT_CROPS = 4


def find_recipe(name: str) -> PretrainRecipe:
    """Return the recipe with this name.

    Raises:
        ValueError: there is none.
    """
    recipe = next((recipe for recipe in RECIPES if recipe.name == name), None)
    if recipe is None:
        raise ValueError(f"unknown recipe {name}; choose {', '.join(recipe.name for recipe in RECIPES)}")
    return recipe


def format_recipes() -> str:
    """Return a line for each recipe: its name, its models and its description."""
    return "\n".join(
        f"{recipe.name}: {recipe.description} (presets {recipe.tokenizer_preset}, {recipe.prior_preset})"
        for recipe in RECIPES
    )


def run_recipe(
    recipe: PretrainRecipe,
    out: Path,
    *,
    minutes: float | None = None,
    device: Device = "auto",
    num_workers: int = 0,
    models_folder: Path | None = None,
    overrides: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> Path:
    """Train the models of a recipe and write them to the folder of shipped models.

    Args:
        out: working folder: photos, shards, runs and token tables. Photos are not collected if it contains shards.
        minutes: total training time of both models; None trains for the steps of the presets.
        num_workers: processes of training, packing and tokenizing; 0 runs everything in this process, without Ray.
        models_folder: folder of shipped models; None: that of this package.
        overrides: `key=value` overrides of the presets of tokenizer and prior.

    Returns:
        The folder of the prior, which contains that of the tokenizer.

    Raises:
        ValueError: a package cannot be fetched, or `out` contains other data or models.
    """
    from bsq_ray.data.tokenize import tokenize
    from bsq_ray.runtime.ray_session import ray_session
    from bsq_ray.shipped_models import catalog

    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes {minutes} must be positive")
    run = _RecipeRun(recipe, out, minutes, device, num_workers)
    with nullcontext() if num_workers == 0 else ray_session():
        shards = run.pack()
        tokenizer_config = config.require_stage(
            run.load_config(recipe.tokenizer_preset, overrides[0]), config.TokenizerConfig, recipe.tokenizer_preset
        )
        tokenizer = str(out / "tokenizer-fp16")
        run.train(tokenizer_config, "tokenizer", shards)
        run.export("tokenizer", tokenizer, tokenizer_config)
        tables = {}
        for split, num_crops in (("train", recipe.num_crops), ("held_out", _NUM_HELD_OUT_CROPS)):
            tables[split] = str(out / "tokens" / split)
            result = tokenize(
                tokenizer,
                shards[split],
                tables[split],
                num_workers=num_workers,
                num_crops=num_crops,
                scale=tokenizer_config.data.resize_range[1],
                flip=True,
            )
            log(f"{result.table.num_rows} rows of tokens in {tables[split]}")
        prior_config = run.load_config(recipe.prior_preset, overrides[1])
        run.train(prior_config, "prior", tables)
    shipped = (models_folder or catalog.MODELS_FOLDER) / prior_config.name
    run.export("prior", str(shipped), prior_config, recipe.prior_side)
    log(f"wrote {shipped}")
    return shipped


@dataclass(frozen=True)
class _RecipeRun:
    recipe: PretrainRecipe
    out: Path
    minutes: float | None
    device: Device
    num_workers: int

    def pack(self) -> dict[str, str]:
        """Collect and pack the photos; return the URLs of the shards by split.

        Photos that are packed are not collected again, so that a node without access to packages can train.
        """
        from bsq_ray.data.manifest import MANIFEST_FILE

        folders = {split: self.out / "data" / split for split in ("train", "held_out")}
        if not all((folder / MANIFEST_FILE).exists() for folder in folders.values()):
            sample_set = replace(PHOTOS, max_side=self.recipe.max_side)
            for photos, folder in zip(self.recipe.collect(self.out), folders.values(), strict=True):
                pack_if_needed(photos, folder, sample_set, self.num_workers)
        return {split: str(folder) for split, folder in folders.items()}

    def load_config(self, preset: str, overrides: tuple[str, ...]) -> config.AnyConfig:
        """Return the configuration of a model; limited time replaces the steps of the preset."""
        steps = () if self.minutes is None else (UNLIMITED_STEPS,)
        return config.load_config(preset, (*steps, *overrides))

    def train(self, run_config: config.AnyConfig, name: str, data: dict[str, str]) -> None:
        """Train a model in the run folder of this name, or resume its training."""
        from bsq_ray.training.checkpoints.writer import list_checkpoints
        from bsq_ray.training.launch import Interrupted, train

        run_url = str(self.out / name)
        fraction = self.recipe.tokenizer_time_fraction
        minutes = self.minutes and self.minutes * (fraction if run_config.stage == "tokenizer" else 1 - fraction)
        log(f"training the {name}, " + (f"{minutes:g} minutes" if minutes else f"{run_config.training.steps} steps"))
        try:
            train(
                run_config,
                data["train"],
                run_url,
                self.num_workers,
                resume=bool(list_checkpoints(run_url)),
                held_out_url=data["held_out"],
                minutes=minutes,
                device=self.device,
            )
        except Interrupted as stop:
            raise Interrupted(f"{stop}. Run the same command again to resume") from None

    def export(self, name: str, dest: str, run_config: config.AnyConfig, prior_side: int | None = None) -> None:
        """Write the model of a run with weights in fp16 and the card of the recipe."""
        from bsq_ray.model_export import export_model, note_prior_side

        model_url = str(self.out / name / "model")
        card = self._card(model_url, run_config)
        if prior_side is not None:
            card = note_prior_side(card, run_config, prior_side)
        export_model(model_url, dest, card=card, prior_side=prior_side)

    def _card(self, model_url: str, run_config: config.AnyConfig) -> CardContent:
        """Return the card of the training, with paths relative to the working folder, and the recipe."""
        trained = parse_model_card(storage.read_text(storage.join(model_url, "README.md")))
        folder = f"{storage.absolute(str(self.out))}/"
        licenses = self.recipe.licenses()
        fields = {
            "data": f"photos of the packages {', '.join(licenses)}",
            "licenses": "; ".join(f"{package}: {name}" for package, name in licenses.items()),
            "recipe": f"`bsq-ray pretrain {self.recipe.name}`, preset {run_config.name}"
            + (f", {self.minutes:g} minutes for all models" if self.minutes else ""),
            "seeds": str(run_config.training.seed),
        }
        return CardContent(
            fields={name: value.replace(folder, "") for name, value in trained.fields.items()} | fields,
            metrics=trained.metrics,
            measured_on=trained.measured_on.replace(folder, ""),
        )
