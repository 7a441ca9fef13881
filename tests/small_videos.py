"""Small videos with chosen time stamps, lengths and formats, made of a photo or of a real clip."""

import io
import struct
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from real_clips import clip_path


def make_video(photo, times_ms, container_format="matroska", pixel_aspect=None):
    """Return a video file with a frame at each time: the photo, shifted by one more pixel each.

    Args:
        times_ms: times of the frames, milliseconds.
        container_format: FFmpeg's name of the container.
        pixel_aspect: width of a pixel in units of its height.
    """
    pixels = np.asarray(photo.resize((96, 64)))
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as output:
        stream = output.add_stream("libx264", rate=1000, options={"bf": "0"})
        stream.codec_context.time_base = Fraction(1, 1000)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(pixels, number, 1)), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
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
    """Return a video file of some frames of the street clip, shrunk."""
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


def with_display_matrix(mp4, a, b, c, d):
    """Return an MP4 whose track header displays the stored pixel (x, y) at (a x + c y, b x + d y)."""
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    a, b, c, d = (round(65536 * value) for value in (a, b, c, d))
    track = mp4.index(b"tkhd")
    return mp4[:track] + mp4[track:].replace(identity, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30), 1)


def with_edit_list(mp4, first, num_frames, frame_rate=25):
    """Return an MP4 whose edit list shows some of its frames, as trimming without encoding leaves it."""
    edits = mp4.index(b"elst") + 12
    with av.open(io.BytesIO(mp4)) as file:
        ticks_per_frame = round(1 / (file.streams.video[0].time_base * frame_rate))
    # Duration in the time scale of the movie, 1000 per second; start in that of the track, after the reordering delay.
    [delay] = struct.unpack_from(">i", mp4, edits + 4)
    edit = struct.pack(">ii", 1000 * num_frames // frame_rate, delay + first * ticks_per_frame)
    return mp4[:edits] + edit + mp4[edits + len(edit) :]


def make_avi_with_gaps(photo, numbers):
    """Return an AVI of 25 frames/s that has the frames with these numbers; the others are empty, as in captures."""
    pixels = np.asarray(photo.resize((96, 64)))
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in numbers:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(pixels, number, 1)), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def copy_packets(video, container_format, first, end):
    """Return a file with some of the packets of a video, as programs that cut without encoding leave it."""
    file = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(file, "w", format=container_format) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None and first <= number < end:
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


def make_flat_video(luma, cb, cr, size, matrix, full_range):
    """Return a lossless MP4 of one color, marked with a matrix (H.273) and a range."""
    width, height = size
    planes = np.concatenate([np.full(width * height, luma), *(np.full(width * height // 4, c) for c in (cb, cr))])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full_range else 1
        frame = av.VideoFrame.from_ndarray(planes.astype(np.uint8).reshape(height * 3 // 2, width), "yuv420p")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def video_of_two_sizes():
    """Return an MKV file of two frames of 64 x 48 pixels and two of 96 x 80."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        packets = []
        for width, height in ((64, 48), (96, 80)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base = Fraction(1, 25)
            for _ in range(2):
                frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 99, np.uint8), "rgb24")
                packets += encoder.encode(frame.reformat(format="yuvj420p"))
        for number, packet in enumerate(packets):
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            output.mux(packet)
    return file.getvalue()
