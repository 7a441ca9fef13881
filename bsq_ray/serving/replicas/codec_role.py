"""The codec of a replica: images and videos of any size to .bsq files and back.

    image or video file ─compress─▶ .bsq file ─decompress─▶ PNG or video file

Requests are computed one at a time in the codec thread, each until its deadline.
"""

from __future__ import annotations

import copy
from typing import Any

from bsq_ray.codec.codec import Codec
from bsq_ray.codec.container import read_header
from bsq_ray.codec.rate import Rate
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.serving.deadline import Deadline, deadline_after
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.image_quality import measure_quality
from bsq_ray.serving.media.image_io import png_from_image, read_uploaded_image
from bsq_ray.serving.media.video_io import check_total_pixels, encode_video_file, is_video, read_uploaded_video
from bsq_ray.serving.payloads import BSQ_MEDIA_TYPE, DecodedPart, MediaFile, QualityReport
from bsq_ray.serving.replicas.model_metadata import codec_fields
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime
from bsq_ray.serving.service_config import Limits


class CodecEngine:
    """Compresses and decompresses images and videos of any size."""

    def __init__(self, codec: Codec, limits: Limits) -> None:
        self.codec = codec
        self._codec_without_prior = Codec(self.codec.tokenizer)
        self._limits, self._tile_size = limits, self.codec.tokenizer.config.image_size

    def _count_pixels(self, height: int, width: int) -> int:
        """Return the pixels that a frame counts as: at least those of a tile."""
        return max(height * width, self._tile_size**2)

    def compress(self, data: bytes, bits: int | None, deadline: Deadline) -> MediaFile:
        """Compress an image or video file to a .bsq file.

        Args:
            bits: bits per token of a model with nested bits; None for all.

        Raises:
            ApiError: see `read_uploaded_image` and `read_uploaded_video`; 422 this model does not accept the file or
                the bits; 503 the deadline passed.
        """
        deadline.check()
        rate = self._rate(bits)
        try:
            if is_video(data):
                video = read_uploaded_video(data, self._limits, self._count_pixels)
                encoded = self.codec.compress_clip(
                    video.frames, video.frame_rate, video.color, on_progress=deadline.check, rate=rate
                )
            else:
                image = read_uploaded_image(data, self._limits.max_pixels)
                encoded = self.codec.compress(image, on_progress=deadline.check, rate=rate)
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        num_pixels = round(8 * len(encoded.data) / encoded.bits_per_pixel)
        return MediaFile(encoded.data, BSQ_MEDIA_TYPE, num_pixels, encoded.num_frames if is_video(data) else None)

    def decompress(self, data: bytes, media_type: str, num_planes: int | None, deadline: Deadline) -> MediaFile:
        """Decompress a .bsq file to a PNG, or to a video of this media type.

        Args:
            num_planes: number of leading planes of nested bits to decode; None for all. Other files are decoded whole.

        Raises:
            ApiError: 413 the video is too long, 422 damaged or of other models, 503 the deadline passed.
        """
        deadline.check()
        max_pixels = self._limits.max_pixels
        try:
            header = read_header(data, max_pixels)
            if header.clip is None:
                data, part = self._first_planes(data, num_planes)
                image = self.codec.decompress(data, max_pixels=max_pixels, on_progress=deadline.check)
                num_pixels = image.width * image.height
                return MediaFile(png_from_image(image), "image/png", num_pixels, decoded_part=part)
            pixels_per_frame = header.width * header.height
            check_total_pixels(header.num_frames, self._count_pixels(header.height, header.width), self._limits)
            data, part = self._first_planes(data, num_planes)
            frames = self.codec.decompress_clip(data, max_pixels=max_pixels, on_progress=deadline.check)
            file, num_frames = encode_video_file(
                frames, media_type, rate=header.clip.frame_rate, color=header.clip.color
            )
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        return MediaFile(file, media_type, num_frames * pixels_per_frame, num_frames, decoded_part=part)

    def measure(self, data: bytes, bits: int | None, deadline: Deadline) -> QualityReport:
        """Measure rate and quality of an image file, and the sizes of JPEG and WebP files of equal quality.

        Args:
            bits: as of `compress`.

        Raises:
            ApiError: as `compress`; 415 a video.
        """
        deadline.check()
        rate = self._rate(bits)
        if is_video(data):
            raise ApiError(415, "the body is a video; only images can be measured")
        image = read_uploaded_image(data, self._limits.max_pixels)
        num_bytes = len(self.codec.compress(image, on_progress=deadline.check, rate=rate).data)
        # The prior is lossless, so the pixels are the same without its slow decoding.
        coded_without_prior = self._codec_without_prior.compress(image, on_progress=deadline.check, rate=rate).data
        decoded = self._codec_without_prior.decompress(
            coded_without_prior, max_pixels=self._limits.max_pixels, on_progress=deadline.check
        )
        return measure_quality(image, decoded, num_bytes=num_bytes, check_deadline=deadline.check)

    def _rate(self, bits: int | None) -> Rate:
        layout = self.codec.plane_layout
        if bits is not None and layout is None:
            raise ApiError(422, "bits: the rate of this model is fixed, because it has no nested bits; leave bits out")
        try:
            rate = Rate(bits)
            if layout is not None:
                layout.candidates(rate)
        except ValueError as error:
            raise ApiError(422, f"bits: {error}") from None
        return rate

    def _first_planes(self, data: bytes, num_planes: int | None) -> tuple[bytes, DecodedPart]:
        max_pixels = self._limits.max_pixels
        ends = self.codec.plane_ends(data, max_pixels)
        num_bytes = ends[min(num_planes or len(ends), len(ends)) - 1]
        num_bits, stored_bits = self.codec.available_bits(data[:num_bytes], max_pixels)
        return data[:num_bytes], DecodedPart(num_bits, stored_bits, num_bytes, ends[-1])


class CodecRole:
    """Compresses and decompresses images and videos of any size.

    Args:
        url: folder of a tokenizer or prior.
        tokenizer: the tokenizer of this folder if it is loaded already; its encoder is shared.
    """

    def __init__(self, url: str, runtime: ReplicaRuntime, tokenizer: Tokenizer | None = None) -> None:
        self._model_thread, self._timeout_s = runtime.codec_thread, runtime.limits.request_timeout_s

        def make_engine() -> CodecEngine:
            if tokenizer is not None:
                return CodecEngine(Codec(_share_encoder(tokenizer)), runtime.limits)
            return CodecEngine(Codec.from_pretrained(url, device=runtime.device), runtime.limits)

        self._engine: CodecEngine = self._model_thread.run_blocking(make_engine)

    async def metadata(self) -> dict[str, Any]:
        """Return the fields of this model in `GET /v1/models`."""
        codec = self._engine.codec
        prior_id = codec.prior.model_id if codec.prior else None
        return codec_fields(codec.tokenizer.model_id, prior_id, codec.plane_layout)

    async def compress(self, data: bytes, bits: int | None) -> MediaFile:
        """Compress an image or video file to a .bsq file, with all bits per token or fewer."""
        with deadline_after(self._timeout_s) as deadline:
            file: MediaFile = await self._model_thread(self._engine.compress, data, bits, deadline)
            return file

    async def decompress(self, data: bytes, media_type: str, num_planes: int | None) -> MediaFile:
        """Decompress all or the first planes of a .bsq file to a PNG, or to a video of this media type."""
        with deadline_after(self._timeout_s) as deadline:
            file: MediaFile = await self._model_thread(self._engine.decompress, data, media_type, num_planes, deadline)
            return file

    async def measure(self, data: bytes, bits: int | None) -> QualityReport:
        """Measure rate and quality of an image file, with all bits per token or fewer."""
        with deadline_after(self._timeout_s) as deadline:
            report: QualityReport = await self._model_thread(self._engine.measure, data, bits, deadline)
            return report


def _share_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the same encoder and its own decoder, which the codec converts to fp64."""
    shared_modules = {id(module): module for module in (tokenizer.encoder, tokenizer.to_code, tokenizer.quantizer)}
    return copy.deepcopy(tokenizer, shared_modules)
