"""Count and time the frames of a video without decoding them: real frame rate, visible and missing frames."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

# Frames closer than this fraction of the usual interval are one: VP8 stores references that are not displayed.
_MIN_INTERVAL = 0.1
# Longest duration of a frame, seconds; longer ones come from broken time stamps.
MAX_FRAME_DURATION_S = 60.0
# The declared rate is exact if the time stamps deviate from it by no more than their rounding and a fraction, or by one
# missing time stamp of a long video.
_RATE_TOLERANCE, _MISSING_TIME_TOLERANCE = 0.0002, 0.01
# Relative deviation from twice the declared rate at which packets are fields of interlaced frames.
_FIELD_TOLERANCE = 0.01
_MAX_RATE_DENOMINATOR = 100_000
_DEFAULT_RATE = Fraction(25)
# Containers whose rate is constant by definition, and whose frames are too large to be read twice.
_RAW_CONTAINERS = ("yuv4mpegpipe", "rawvideo")


@dataclass(frozen=True)
class PacketScan:
    """Facts about the packets of a video stream.

    Attributes:
        frame_rate: frames per second: the declared rate if the time stamps follow it, otherwise frames per time.
        num_visible: number of frames to display, without those that an edit list hides; 0 if unknown.
        num_packets: number of packets in the file.
        num_expected: number of packets that the file declares; 0 if it declares none.
        num_before_key: number of packets before the first key frame; most decoders skip them.
        first_key_time: time stamp of that key frame; 0 if it has none.
    """

    frame_rate: Fraction
    num_visible: int
    num_packets: int
    num_expected: int
    num_before_key: int = 0
    first_key_time: int = 0

    @property
    def num_frames(self) -> int:
        """Number of frames to display, also of those that the file declares without having them; 0 if unknown."""
        num_hidden = self.num_packets - self.num_visible
        return max(self.num_visible, self.num_expected - num_hidden)


def scan_packets(container: Any, stream: Any) -> PacketScan:
    """Read all packets of a stream; the container has to be opened again to decode it.

    Damage ends the scan; decoding reports it.
    """
    declared_rate = Fraction(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)
    if container.format.name in _RAW_CONTAINERS:
        return PacketScan(declared_rate, stream.frames, stream.frames, stream.frames)
    times: list[int] = []
    num_packets = num_without_time = num_before_key = first_key_time = 0
    has_key = False
    try:
        for packet in container.demux(stream):
            if packet.dts is None and not packet.size:
                continue
            num_packets += 1
            if packet.is_keyframe and not has_key:
                has_key, first_key_time = True, packet.pts or 0
            num_before_key += not has_key
            if packet.size and not packet.is_discard:
                time = packet.pts if packet.pts is not None else packet.dts
                times.append(time or 0)
                num_without_time += time is None
    except (av.FFmpegError, OSError):
        pass
    # Containers with a complete index replace the declared number by that of the packets that an edit list keeps.
    is_indexed = "mp4" in container.format.name
    num_expected = len(stream.index_entries) if is_indexed else stream.frames
    # Decoders of some streams start without a key frame.
    num_before_key = num_before_key if has_key else 0
    if num_without_time:
        return PacketScan(declared_rate, len(times), num_packets, num_expected, num_before_key, first_key_time)
    if container.format.name == "avi" and times:
        # AVI declares its duration in frames; those that were dropped in recording are empty. Its start may be later.
        num_expected -= max(0, max(times) - min(times) + 1 - num_packets)
    tick_s = float(stream.time_base or 1)
    times_s = _displayed_times(np.sort(np.array(times, np.int64)) * tick_s)
    rate = _real_rate(times_s, declared_rate, tick_s)
    return PacketScan(rate, len(times_s), num_packets, num_expected, num_before_key, first_key_time)


def _displayed_times(times_s: np.ndarray) -> np.ndarray:
    """Return the times without those that follow another one at once."""
    intervals_s = np.diff(times_s)
    if not len(intervals_s):
        return times_s
    is_displayed = intervals_s > _MIN_INTERVAL * np.median(intervals_s)
    return times_s[np.concatenate([[True], is_displayed])]


def _real_rate(times_s: np.ndarray, declared_rate: Fraction, tick_s: float) -> Fraction:
    """Return the declared rate if the times follow it or are broken, otherwise their mean rate."""
    intervals_s = np.diff(times_s)
    duration_s = float(intervals_s.sum())
    if duration_s <= 0 or intervals_s.max() > MAX_FRAME_DURATION_S:
        return declared_rate
    mean_rate, declared = len(intervals_s) / duration_s, float(declared_rate)
    tolerance_s = max(
        2 * tick_s + _RATE_TOLERANCE * duration_s, min(1.01 / declared, _MISSING_TIME_TOLERANCE * duration_s)
    )
    has_declared_duration = abs(duration_s - len(intervals_s) / declared) <= tolerance_s
    has_fields = abs(mean_rate / (2 * declared) - 1) <= _FIELD_TOLERANCE
    if has_declared_duration or has_fields:
        return declared_rate
    return Fraction(mean_rate).limit_denominator(_MAX_RATE_DENOMINATOR)
