"""Find the shipped models that wrote a `.bsq` file."""

from __future__ import annotations

from collections.abc import Iterator

from bsq_ray import config, model_folder, storage
from bsq_ray.codec.container import read_header
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.shipped_models.catalog import describe_shipped_models, list_shipped_models


def find_shipped_codec(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """Return the model folder that decodes a file: a prior with its tokenizer, or a tokenizer alone.

    Args:
        data: the whole file.
        max_pixels: larger frames are rejected.

    Raises:
        ValueError: the file is damaged, or no shipped model wrote it.
    """
    header = read_header(data, max_pixels)
    for folder, tokenizer_id, prior_id in _codec_ids():
        if bool(prior_id) == header.has_prior and header.is_written_with(tokenizer_id, prior_id):
            return folder
    raise ValueError(
        f"the file was written with {header.models_text}, which this version does not ship "
        f"({describe_shipped_models()}); name their model folder with --model"
    )


def _codec_ids() -> Iterator[tuple[str, bytes, bytes]]:
    """Yield folder, id of the tokenizer and id of the prior, empty without one, of all shipped codecs.

    Ids of earlier models with the same tokens follow those of the models themselves.
    """
    earlier: list[tuple[str, bytes, bytes]] = []
    for model in list_shipped_models():
        header = model_folder.read_model_header(str(model.folder))
        if isinstance(header.config, config.MaskedLMConfig):
            continue
        tokenizer, prior_id = header, b""
        if isinstance(header.config, config.PriorConfig):
            tokenizer = model_folder.read_model_header(storage.join(header.url, "tokenizer"))
            prior_id = bytes.fromhex(header.model_id)
        yield header.url, bytes.fromhex(tokenizer.model_id), prior_id
        earlier += [(header.url, bytes.fromhex(model_id), prior_id) for model_id in tokenizer.same_tokens]
    yield from earlier
