"""What is measured on clips: the metrics of images frame by frame, and what only a sequence has.

Shape suffixes: B clips, T frames, H and W pixels. Clips are 8-bit values mapped to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bsq_ray.metrics.psnr import psnr


def frames_batch_major(clips_B3THW: Tensor) -> Tensor:
    """Clips as a batch of their frames, (B·T, 3, H, W)."""
    return clips_B3THW.transpose(1, 2).flatten(0, 1)


def clips_from_batch_major(frames_B3HW: Tensor, num_clips: int) -> Tensor:
    """The inverse of `frames_of`: (clips·T, 3, H, W) to (clips, 3, T, H, W)."""
    return frames_B3HW.unflatten(0, (num_clips, -1)).transpose(1, 2)


def metric_per_frame(
    metric: Callable[[Tensor, Tensor], Tensor], original_B3THW: Tensor, reconstruction_B3THW: Tensor
) -> Tensor:
    """A metric of images on each frame of each clip, (B, T)."""
    return metric(frames_batch_major(original_B3THW), frames_batch_major(reconstruction_B3THW)).unflatten(
        0, (len(reconstruction_B3THW), -1)
    )


def clip_psnr(original_B3THW: Tensor, reconstruction_B3THW: Tensor) -> Tensor:
    """PSNR with one error over the whole clip, in dB, (B,): not the mean of the frames' PSNR, but at most that."""
    return psnr(original_B3THW.flatten(1, 2), reconstruction_B3THW.flatten(1, 2))


def flicker(original_B3THW: Tensor, reconstruction_B3THW: Tensor) -> Tensor:
    """Mean of |eₜ₊₁ - eₜ| with e the error of a frame, in 8-bit levels, (B,); 0 where the error stands still.

    It is what moves in the reconstruction and does not in the original, or the reverse.
    """
    error_B3THW = (reconstruction_B3THW - original_B3THW) * 127.5
    return error_B3THW.diff(dim=2).abs().mean((1, 2, 3, 4))
