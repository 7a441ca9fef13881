"""Videos made of a photograph, for what no clip at hand shows: chosen times and lengths; and pieces of a real one."""

import io
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from real_clips import clip_file


def made_video(photo, milliseconds):
    """Matroska file with a frame at each of the times: the photograph, moved by a pixel each."""
    pixels = np.asarray(photo.resize((96, 64)))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(pixels, number, 1)), "rgb24")
            frame.pts = time
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def cut_video(frames, start=0, size=(64, 48), kind="mp4", codec="libx264", pixels="yuv420p", rate=Fraction(25)):
    """A file with some frames of the street, shrunk."""
    file = io.BytesIO()
    with av.open(str(clip_file("bikes.mp4"))) as source, av.open(file, "w", format=kind) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for number, frame in enumerate(islice(source.decode(video=0), start, start + frames)):
            small = frame.reformat(*size, format=pixels)
            small.pts, small.time_base = number, 1 / rate
            output.mux(stream.encode(small))
        output.mux(stream.encode(None))
    return file.getvalue()
