"""Videos made of a photograph, for what no clip at hand shows: chosen times and lengths; and pieces of a real one."""

import io
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from real_clips import clip_path


def make_video(photo, times_ms):
    """Matroska file with a frame at each of the times: the photograph, moved by a pixel each."""
    pixels = np.asarray(photo.resize((96, 64)))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(pixels, number, 1)), "rgb24")
            frame.pts = time
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def make_street_video(
    num_frames,
    start=0,
    size=(64, 48),
    container_format="mp4",
    codec="libx264",
    pixel_format="yuv420p",
    frame_rate=Fraction(25),
):
    """A file with some frames of the street, shrunk."""
    file = io.BytesIO()
    with av.open(str(clip_path("bikes.mp4"))) as source, av.open(file, "w", format=container_format) as output:
        stream = output.add_stream(codec, rate=frame_rate)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        for number, frame in enumerate(islice(source.decode(video=0), start, start + num_frames)):
            small = frame.reformat(*size, format=pixel_format)
            small.pts, small.time_base = number, 1 / frame_rate
            output.mux(stream.encode(small))
        output.mux(stream.encode(None))
    return file.getvalue()
