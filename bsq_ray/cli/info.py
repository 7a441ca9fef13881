"""Describe a preset, model folder, run folder, packed data set or token table."""

from __future__ import annotations

from bsq_ray import config, storage
from bsq_ray.cli.extras import require_extra
from bsq_ray.config.loader import suggest
from bsq_ray.shipped_models.catalog import find_shipped_model


def format_info(target: str) -> str:
    """Describe a model, run folder, packed data set, token table or preset in a few lines.

    A shipped model and the preset of its training may have the same name; both are described.

    Raises:
        ValueError: `target` is none of these.
    """
    if target in config.preset_names():
        preset_text = f"preset {target}\n{_format_run(config.load_config(target))}"
        model = find_shipped_model(target)
        return preset_text if model is None else f"{preset_text}\n\n{format_info(str(model.folder))}"
    if not storage.is_url(target) and not storage.exists(target) and (model := find_shipped_model(target)):
        target = str(model.folder)
    if storage.exists(storage.join(target, "model.safetensors")):
        # Here, because the module imports torch, which describing a preset does not need.
        from bsq_ray import model_folder

        folder = model_folder.load_model_folder(target)
        num_parameters = sum(tensor.numel() for tensor in folder.weights.values())
        return (
            f"model folder {target}\nid {folder.model_id}\n{num_parameters:,} parameters\n{_format_run(folder.config)}"
        )
    # Model folders and presets are described without the packages of the extras.
    require_extra("info", "train")

    from bsq_ray.data.manifest import MANIFEST_FILE, read_manifest
    from bsq_ray.data.token_table import TABLE_FILE, read_table
    from bsq_ray.training.checkpoints.writer import list_checkpoints

    if storage.exists(storage.join(target, MANIFEST_FILE)):
        manifest = read_manifest(target)
        size_mb = manifest.num_bytes / 1e6
        return (
            f"packed data set {target}\n{manifest.num_samples} {manifest.kind}, {manifest.num_shards} shards, "
            f"{size_mb:.1f} MB, {len(manifest.classes)} classes\nhash {manifest.hash}"
        )
    if storage.exists(storage.join(target, "checkpoints")):
        checkpoints = list_checkpoints(target)
        run_config = config.load_config(storage.join(target, "config.yaml"))
        return (
            f"run folder {target}\n{len(checkpoints)} checkpoints: {', '.join(checkpoints)}\n{_format_run(run_config)}"
        )
    if storage.exists(storage.join(target, TABLE_FILE)):
        table = read_table(target)
        table_info = table.info
        grid = " x ".join(map(str, table_info.grid))
        return (
            f"token table {target}\n"
            f"{table.num_rows} rows, {table_info.views} views per image or clip, {len(table_info.classes)} classes\n"
            f"{grid} tokens of {table_info.bits} bits, tokenizer {table_info.tokenizer_id}\n"
            f"hash {table.hash}"
        )
    raise ValueError(
        f"{target} is not a model folder, a run folder, a packed data set, a token table or a preset; "
        f"{suggest(target, config.preset_names(), 'presets')}"
    )


def _format_run(run_config: config.AnyConfig) -> str:
    training = run_config.training
    if isinstance(run_config, config.TokenizerConfig):
        model = run_config.model
        num_tokens, kind = model.grid_size**2, "images" if model.frames == 1 else "frames"
        lines = [
            f"{f'{kind} of any size, trained at ' if model.any_size else ''}{model.image_size} px"
            f"{'' if model.any_size else ' images'}, {num_tokens} tokens of {model.quantizer.bits} bits "
            f"({model.quantizer.kind}), {model.quantizer.bits / model.patch_size**2:g} bits per pixel",
            f"encoder {model.encoder.layers} x {model.encoder.width}, "
            f"decoder {model.decoder.layers} x {model.decoder.width}",
        ]
    else:
        token_model = run_config.model
        classes = f", {run_config.model.num_classes} classes" if isinstance(run_config, config.MaskedLMConfig) else ""
        lines = [
            f"{token_model.num_tokens} tokens of {token_model.bits} bits, "
            f"{token_model.num_sub_tokens} sub-tokens per token{classes}",
            f"Transformer {token_model.layers} x {token_model.width}",
        ]
    engine: str = training.engine.kind
    if engine == "deepspeed":
        engine += f" (ZeRO-{training.engine.zero_stage})"
    # A run that is limited by time takes fewer steps.
    lines.append(
        f"configured for {training.steps:,} steps of {training.batch_size} samples, {engine}, "
        f"precision {training.engine.precision}"
    )
    return "\n".join([f"{run_config.name}: {run_config.description}", *lines])
