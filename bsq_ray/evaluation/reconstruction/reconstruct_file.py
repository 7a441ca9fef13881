"""Reconstruct one image or clip with a model, next to the original."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.codec.whole_frames import WholeFrameCoder, check_frame_sizes
from bsq_ray.data.transforms import Interpolation, eval_transform, to_float, to_uint8
from bsq_ray.evaluation.plots.image_encoding import encode_png
from bsq_ray.media.images import read_image
from bsq_ray.media.video_reader import read_video
from bsq_ray.media.video_writer import write_video
from bsq_ray.metrics.psnr import psnr
from bsq_ray.model_folder import WeightsKind
from bsq_ray.models.streaming import clip_decoder, clip_encoder, frames_per_chunk
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress


def reconstruct_file(model_url: str, image_url: str, out: Path, weights: WeightsKind = "ema") -> str:
    """Write original and reconstruction side by side as PNG; return a sentence with bits and PSNR.

    The image is resized to the model's size as in the evaluation (short side, center crop), unless the model has local
    attention.

    Raises:
        ValueError: the model or the image cannot be read, or `out` is not a .png file.
    """
    if out.suffix.lower() != ".png" and not storage.is_special(str(out)):
        raise ValueError(f"the output file {out} must end in .png (for an image) or .mp4 (for a video)")
    tokenizer = Tokenizer.from_pretrained(model_url, weights)
    run = config.require_stage(
        model_folder.load_model_folder(model_url, weights).config, config.TokenizerConfig, model_url
    )
    image = read_image(image_url)
    if run.model.has_local_attention:
        original, reconstruction, num_bits = _reconstruct_whole(tokenizer, image)
    else:
        original, reconstruction, num_bits = _reconstruct_crop(tokenizer, image, run.data.eval_interpolation)
    side_by_side = np.concatenate([original.numpy(), reconstruction.numpy()], axis=2).transpose(1, 2, 0)
    storage.write_bytes(str(out), encode_png(Image.fromarray(side_by_side)))
    [quality] = psnr(to_float(original[None]), to_float(reconstruction[None])).tolist()
    _, height, width = original.shape
    return (
        f"{image_url}: {width} x {height} px in {num_bits} bits ({num_bits / (width * height):g} bits per pixel), "
        f"PSNR {quality:.2f} dB; original and reconstruction are side by side in {out}"
    )


def _reconstruct_crop(
    tokenizer: Tokenizer, image: Image.Image, interpolation: Interpolation
) -> tuple[Tensor, Tensor, int]:
    """Return a crop of the model's size, its reconstruction, uint8 (3, H, W), and the number of bits."""
    original = torch.from_numpy(eval_transform(image, tokenizer.config.image_size, interpolation))
    tokens = tokenizer.encode(to_float(original[None]))
    [reconstruction] = to_uint8(tokenizer.decode(tokens))
    return original, reconstruction, tokens.bits_BNL[0].numel()


def _reconstruct_whole(tokenizer: Tokenizer, image: Image.Image) -> tuple[Tensor, Tensor, int]:
    """Return an image, its reconstruction in blocks of limited memory, uint8 (3, H, W), and the number of bits."""
    coder, original = WholeFrameCoder(tokenizer), torch.from_numpy(np.array(image)).permute(2, 0, 1)
    bits_trcL = coder.encode(original[:, None])
    reconstruction = coder.decode(bits_trcL, (image.height, image.width))[:, 0]
    return original, reconstruction, bits_trcL.numel()


def reconstruct_clip(
    model_url: str,
    clip_url: str,
    out: Path,
    weights: WeightsKind = "ema",
    on_progress: ProgressCallback = no_progress,
) -> str:
    """Write a clip of any length and its reconstruction side by side as MP4; return a sentence with bits and PSNR.

    Frames are resized as in the evaluation (short side, center crop), unless the model has local attention. Memory does
    not grow with the clip: frames are processed in a stream, one by one for a causal model; in chunks of the model's
    length if frames see later ones, or keep their size.

    Args:
        model_url: model folder of a tokenizer.
        clip_url: video file.
        out: the MP4 file.
        weights: "ema" or "raw" weights of the folder.
        on_progress: called with the finished and the total number of frames.

    Raises:
        ValueError: the model or the clip cannot be read, or the video cannot be written.
    """
    tokenizer = Tokenizer.from_pretrained(model_url, weights)
    run = config.require_stage(
        model_folder.load_model_folder(model_url, weights).config, config.TokenizerConfig, model_url
    )
    keeps_size, patch_size = run.model.has_local_attention, run.model.patch_size
    with storage.open_url(clip_url) as file, tempfile.TemporaryDirectory() as scratch:
        try:
            video = read_video(file)
        except ValueError as error:
            raise ValueError(f"{clip_url} cannot be read as a clip: {error}") from error
        pending: deque[Tensor] = deque()
        psnrs: list[float] = []
        height = width = 0

        def originals() -> Iterator[Tensor]:
            nonlocal height, width
            for frame in _whole_frames(video.frames) if keeps_size else _center_squares(video.frames, run):
                _, height, width = frame.shape
                pending.append(frame)
                yield frame

        def side_by_side() -> Iterator[np.ndarray]:
            reconstruct = _reconstruct_whole_frames if keeps_size else _reconstruct_stream
            for reconstruction_3THW in reconstruct(tokenizer, originals()):
                for frame in reconstruction_3THW.transpose(0, 1):
                    original = pending.popleft()
                    psnrs.append(float(psnr(to_float(original)[None], to_float(frame)[None])))
                    on_progress(len(psnrs), max(video.num_frames, len(psnrs)))
                    yield torch.cat([original, frame], 2).permute(1, 2, 0).numpy()

        path = str(Path(scratch) / "side_by_side.mp4")
        write_video(path, "mp4", side_by_side(), video.frame_rate, video.color)
        storage.upload(path, str(out))
    bits = run.model.quantizer.bits * -(-height // patch_size) * -(-width // patch_size)
    return (
        f"{clip_url}: {len(psnrs)} frames of {width} x {height} px in {bits} bits each ({bits / (width * height):g} "
        f"bits per pixel), PSNR {np.mean(psnrs):.2f} dB; original and reconstruction are side by side in {out}"
    )


def _whole_frames(frames: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Yield frames (H, W, 3) as (3, H, W)."""
    for pixels_HWC in check_frame_sizes(frames):
        yield torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _center_squares(frames: Iterable[np.ndarray], run: config.TokenizerConfig) -> Iterator[Tensor]:
    """Yield frames (H, W, 3) as squares (3, H, W) of the model's size."""
    for pixels_HWC in frames:
        square = eval_transform(Image.fromarray(pixels_HWC), run.model.image_size, run.data.eval_interpolation)
        yield torch.from_numpy(square)


def _reconstruct_stream(tokenizer: Tokenizer, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield reconstructions (3, t, H, W) of consecutive frames (3, H, W) of the model's size, all uint8."""
    encode, decode = clip_encoder(tokenizer), clip_decoder(tokenizer)
    for clip_3THW in _chunks(frames, frames_per_chunk(tokenizer.config)):
        yield to_uint8(decode(encode(to_float(clip_3THW)[None]))[0])


def _reconstruct_whole_frames(tokenizer: Tokenizer, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield reconstructions (3, t, H, W) of consecutive frames (3, H, W) of any size, all uint8."""
    coder = WholeFrameCoder(tokenizer)
    for clip_3THW in _chunks(frames, tokenizer.config.frames):
        _, _, height, width = clip_3THW.shape
        yield coder.decode(coder.encode(clip_3THW), (height, width))


def _chunks(frames: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """Yield clips (3, t, H, W) of up to `length` consecutive frames (3, H, W)."""
    following = iter(frames)
    while chunk := list(islice(following, length)):
        yield torch.stack(chunk, 1)
