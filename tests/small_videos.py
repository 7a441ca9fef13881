"""Videos made of a photograph, for what no clip at hand shows: chosen time stamps and lengths."""

import io

import av
import numpy as np


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
