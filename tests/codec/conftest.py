"""A codec with a prior, and one without, on the same tokenizer."""

import pytest
from small_codecs import save_codec

from bsq_ray import Codec


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory):
    return save_codec(tmp_path_factory.mktemp("codec") / "prior")


@pytest.fixture(scope="session")
def codec(codec_folder):
    return Codec.from_pretrained(codec_folder)


@pytest.fixture(scope="session")
def raw_codec(codec_folder):
    return Codec.from_pretrained(f"{codec_folder}/tokenizer")
