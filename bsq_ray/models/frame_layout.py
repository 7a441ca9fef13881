"""Fold clips into batches of frames and back, in two memory orders.

    clips (B, C, T, H, W) ─frames_batch_major─▶ (B·T, C, H, W)   all frames of the first clip, then of the second, …
                          ─frames_time_major──▶ (T·B, C, H, W)   the first frame of every clip, then the second, …

Shape suffixes: B clips, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

from torch import Tensor


def frames_batch_major(clips_BCTHW: Tensor) -> Tensor:
    """Return the frames of clips as a batch (B·T, C, H, W), clip by clip."""
    return clips_BCTHW.transpose(1, 2).flatten(0, 1)


def clips_from_batch_major(frames_NCHW: Tensor, num_clips: int) -> Tensor:
    """Invert `frames_batch_major`: (B·T, C, H, W) to (B, C, T, H, W)."""
    return frames_NCHW.unflatten(0, (num_clips, -1)).transpose(1, 2)


def frames_time_major(images_BCHW_or_BCTHW: Tensor) -> Tensor:
    """Return the frames of clips as a batch (T·B, C, H, W), frame by frame; return images unchanged.

    In this order the discriminator's groups contain frames of the same clips for any number of workers.
    """
    if images_BCHW_or_BCTHW.ndim == 4:
        return images_BCHW_or_BCTHW
    return images_BCHW_or_BCTHW.permute(2, 0, 1, 3, 4).flatten(0, 1)
