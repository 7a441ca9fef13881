"""One image or clip through a model, and what a folder or preset is, in words."""

from __future__ import annotations

import io
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.config.loader import suggest
from bsq_ray.data.manifest import MANIFEST_FILE, read_manifest
from bsq_ray.data.token_table import TABLE_FILE, read_table
from bsq_ray.data.transforms import eval_transform, read_image, to_float, to_uint8
from bsq_ray.media.video_files import read_video, write_video
from bsq_ray.metrics.psnr import psnr
from bsq_ray.models.clips import clip_decoder, clip_encoder, frames_per_chunk
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.training.checkpoints.writer import list_checkpoints


def reconstruct_file(model_url: str, image_url: str, out: Path, weights: Literal["ema", "plain"] = "ema") -> str:
    """Writes original and reconstruction side by side as PNG; returns a sentence with bits and PSNR.

    The image is resized to the model's size as in the evaluation (short side, centre crop).

    Raises:
        ValueError: the model or the image cannot be read.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} must end in .png (of an image) or .mp4 (of a video)")
    tokenizer = Tokenizer.from_pretrained(model_url, weights)
    run = config.require_stage(
        model_folder.load_model_folder(model_url, weights).config, config.TokenizerConfig, model_url
    )
    image = read_image(image_url)
    size = run.model.image_size
    original = torch.from_numpy(eval_transform(image, size, run.data.eval_interpolation))
    tokens = tokenizer.encode(to_float(original[None]))
    [reconstruction] = to_uint8(tokenizer.decode(tokens))
    side_by_side = np.concatenate([original.numpy(), reconstruction.numpy()], axis=2).transpose(1, 2, 0)
    png = io.BytesIO()
    Image.fromarray(side_by_side).save(png, "PNG")
    storage.write_bytes(str(out), png.getvalue())
    [quality] = psnr(to_float(original[None]), to_float(reconstruction[None])).tolist()
    num_bits = tokens.bits_BNL[0].numel()
    return (
        f"{image_url}: {size} x {size} px in {num_bits} bits ({num_bits / size**2:g} bits per pixel), PSNR {quality:.2f} dB; "
        f"original and reconstruction are side by side in {out}"
    )


def reconstruct_clip(
    model_url: str,
    clip_url: str,
    out: Path,
    weights: Literal["ema", "plain"] = "ema",
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Writes a clip of any length and its reconstruction side by side as MP4; returns a sentence with bits and PSNR.

    Frames are resized as in the evaluation (short side, centre crop), and pass through one after the other, so memory
    does not grow with the clip. A causal model streams them; one with full attention takes as many at once as it can.

    Args:
        progress: called with frames done and frames in all.

    Raises:
        ValueError: the model or the clip cannot be read, or the video not be written.
    """
    tokenizer = Tokenizer.from_pretrained(model_url, weights)
    run = config.require_stage(
        model_folder.load_model_folder(model_url, weights).config, config.TokenizerConfig, model_url
    )
    size, bits = run.model.image_size, run.model.quantizer.bits * (run.model.image_size // run.model.patch_size) ** 2
    with storage.open_url(clip_url) as file, tempfile.TemporaryDirectory() as scratch:
        try:
            video = read_video(file)
        except ValueError as error:
            raise ValueError(f"{clip_url} cannot be read as a clip: {error}") from error
        pending: deque[np.ndarray] = deque()
        psnrs: list[float] = []

        def originals() -> Iterator[Tensor]:
            for pixels_HWC in video.frames:
                frame = eval_transform(Image.fromarray(pixels_HWC), size, run.data.eval_interpolation)
                pending.append(frame)
                yield to_float(torch.from_numpy(frame))[None]

        def side_by_side() -> Iterator[np.ndarray]:
            for rebuilt in _reconstruct_stream(tokenizer, originals()):
                for frame in to_uint8(rebuilt[0].transpose(0, 1)):
                    original = pending.popleft()
                    pair = to_float(torch.from_numpy(original))[None], to_float(frame)[None]
                    psnrs.append(float(psnr(*pair)))
                    if on_progress is not None:
                        on_progress(len(psnrs), max(video.num_frames, len(psnrs)))
                    yield np.concatenate([original, frame.numpy()], axis=2).transpose(1, 2, 0)

        path = str(Path(scratch) / "beside.mp4")
        write_video(path, "mp4", side_by_side(), video.frame_rate, video.color)
        storage.upload(path, str(out))
    return (
        f"{clip_url}: {len(psnrs)} frames of {size} x {size} px in {bits} bits each ({bits / size**2:g} bits per "
        f"pixel), PSNR {np.mean(psnrs):.2f} dB; original and reconstruction are side by side in {out}"
    )


def _reconstruct_stream(tokenizer: Tokenizer, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Reconstructions (B, 3, t, H, W) of consecutive frames (B, 3, H, W)."""
    encode, decode, following = clip_encoder(tokenizer), clip_decoder(tokenizer), iter(frames)
    while chunk := list(islice(following, frames_per_chunk(tokenizer.config))):
        yield decode(encode(torch.stack(chunk, 2)))


def format_info(target: str) -> str:
    """What a model folder, run folder, packed data set, token table or preset is.

    Raises:
        ValueError: it is none of these.
    """
    if target in config.preset_names():
        return f"preset {target}\n{_format_run(config.load_config(target))}"
    if storage.exists(storage.join(target, "model.safetensors")):
        folder = model_folder.load_model_folder(target)
        parameters = sum(tensor.numel() for tensor in folder.weights.values())
        return f"model folder {target}\nid {folder.model_id}\n{parameters:,} parameters\n{_format_run(folder.config)}"
    if storage.exists(storage.join(target, MANIFEST_FILE)):
        manifest = read_manifest(target)
        size = sum(shard.bytes for shard in manifest.shards) / 1e6
        return (
            f"packed data set {target}\n{manifest.num_samples} {manifest.kind}, {len(manifest.shards)} shards, "
            f"{size:.1f} MB, {len(manifest.classes)} classes\nhash {manifest.hash}"
        )
    if storage.exists(storage.join(target, "checkpoints")):
        checkpoints = list_checkpoints(target)
        run = config.load_config(storage.join(target, "config.yaml"))
        return f"run folder {target}\n{len(checkpoints)} checkpoints: {', '.join(checkpoints)}\n{_format_run(run)}"
    if storage.exists(storage.join(target, TABLE_FILE)):
        table = read_table(target)
        table_info = table.info
        return (
            f"token table {target}\n"
            f"{table.num_rows} rows, {table_info.views} of each image or clip, {len(table_info.classes)} classes\n"
            f"{' x '.join(map(str, table_info.grid))} tokens of {table_info.bits} bits, tokenizer {table_info.tokenizer_id}\n"
            f"hash {table.hash}"
        )
    raise ValueError(
        f"{target} is not a model folder, a run folder, a packed data set, a token table or a preset; "
        f"{suggest(target, config.preset_names(), 'presets')}"
    )


def _format_run(run: config.AnyConfig) -> str:
    training = run.training
    if isinstance(run, config.TokenizerConfig):
        tokens = (run.model.image_size // run.model.patch_size) ** 2
        lines = [
            f"{run.model.image_size} px images, {tokens} tokens of {run.model.quantizer.bits} bits "
            f"({run.model.quantizer.kind}), {run.model.quantizer.bits / run.model.patch_size**2:g} bits per pixel",
            f"encoder {run.model.encoder.layers} x {run.model.encoder.width}, "
            f"decoder {run.model.decoder.layers} x {run.model.decoder.width}",
        ]
    else:
        lines = [
            f"{run.model.num_tokens} tokens of {run.model.bits} bits as {run.model.num_sub_tokens} symbols each"
            + (f", {run.model.num_classes} classes" if isinstance(run, config.MaskedLMConfig) else ""),
            f"Transformer {run.model.layers} x {run.model.width}",
        ]
    engine = f"{training.engine.kind} (ZeRO {training.engine.zero_stage}), {training.engine.precision}"
    lines.append(f"{training.steps} steps of {training.batch_size} samples, {engine}")
    return "\n".join([f"{run.name}: {run.description}", *lines])
