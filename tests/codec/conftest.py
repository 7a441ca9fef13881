"""A codec with a prior, and one without, on the same tokenizer."""

import pytest
import torch
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


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """The models here are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
