"""Pointers, web pages and other substitutes of a file are recognized and named wherever files are read."""

import gzip
import json

import pytest
import torch

from bsq_ray import config, model_folder
from bsq_ray.codec.container import read_header
from bsq_ray.data.manifest import read_manifest
from bsq_ray.models import pretrained_weights
from bsq_ray.runtime.wrong_files import describe_wrong_binary, describe_wrong_file

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 84318612\n"
SUBSTITUTES = [
    (b"", "is empty"),
    (bytes(4096), "contains only zeros"),
    (LFS_POINTER, "is a Git LFS pointer; fetch the file with `git lfs pull`"),
    (b"\xef\xbb\xbf" + LFS_POINTER, "is a Git LFS pointer"),
    (b"/annex/objects/MD5E-s84--d41d8.safetensors\n", "is a git-annex pointer"),
    (b"# xet version 0\nfilesize = 84\nhash = '3a'\n", "is a Git Xet pointer"),
    (b"<!DOCTYPE html>\n<html lang='en'>Sign in</html>", "is a web page"),
    (b"\n\n  <HTML><head></head></HTML>", "is a web page"),
    (b"<!-- saved --><html></html>", "is a web page"),
    (b"<?xml version='1.0'?><!DOCTYPE html PUBLIC '-//W3C'><html/>", "is a web page"),
    (
        b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>The key does not exist.</Message></Error>',
        "is the response of a server (XML: NoSuchKey)",
    ),
    (b'{"error": "Repository not found"}', "is the response of a server (JSON: Repository not found)"),
    (b'{"message": "Not Found", "status": 404}', "is the response of a server (JSON: Not Found)"),
    (b'{"detail": [{"msg": "x"}]}', "is the response of a server (JSON"),
    (
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n" + bytes(9),
        "is the response of a server with its headers: HTTP/1.1 200 OK",
    ),
    (gzip.compress(b"data", mtime=0), "is compressed (gzip)"),
    (b"\xfd7zXZ\0\0\4", "is compressed (xz)"),
    (b"\x28\xb5\x2f\xfd\4\0", "is compressed (Zstandard)"),
]


@pytest.mark.parametrize(("content", "description"), SUBSTITUTES, ids=lambda value: ascii(value)[:30])
def test_substitute_is_described(content, description):
    assert describe_wrong_file(content).startswith(description)
    assert describe_wrong_binary(content).startswith(description)
    assert "\n" not in describe_wrong_file(content)


@pytest.mark.parametrize(
    "content",
    [
        b"BSQ1\1\0\0\0", b"\x10\0\0\0\0\0\0\0{}", b"PK\3\4", b"\x80\2.", b"PAR1", b"{}", b'{"model": {}}', b"[1]",
        b"<", b"x" * 500, b"{" * 10_000, b'{"version": 1}', bytes(10) + b"x", "größer".encode("latin-1"),
    ],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_other_content_is_not_described(content):
    assert describe_wrong_file(content) == ""


@pytest.mark.parametrize("text", ["Not Found", "Entry not found\n", "404: Not Found", "Zugriff verweigert: größer"])
def test_short_text_is_described_in_place_of_binary(text):
    assert describe_wrong_binary(text.encode()) == f"is a text: {text.strip()}; download the file again"
    assert describe_wrong_file(text.encode()) == ""


def read_model_weights(folder, content):
    weights = {"weight": torch.zeros(1)}
    model_folder.write_model_folder(str(folder), config.dump_config(config.load_config("demo")), weights)
    (folder / "model.safetensors").write_bytes(content)
    model_folder.load_model_folder(str(folder))


def read_model_config(folder, content):
    if not content.strip(b"\0"):
        pytest.skip("an empty configuration has a message of its own")
    (folder / "config.yaml").write_bytes(content)
    model_folder.load_model_folder(str(folder))


def read_bsq_file(folder, content):
    read_header(content)


def read_metric_weights(folder, content):
    (folder / "weights.pth").write_bytes(content)
    pretrained_weights.resolve("lpips-alex", str(folder / "weights.pth"))


def read_data_set(folder, content):
    (folder / "manifest.parquet").write_bytes(content)
    read_manifest(str(folder))


READERS = [read_model_weights, read_model_config, read_bsq_file, read_metric_weights, read_data_set]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("content", "description"), SUBSTITUTES, ids=lambda value: ascii(value)[:30])
def test_readers_name_the_substitute(tmp_path, read, content, description):
    """The error of every reader describes the file in place of a damaged format."""
    with pytest.raises(ValueError, match=".") as raised:
        read(tmp_path, content)
    assert description in str(raised.value) or "is not a text file" in str(raised.value)


def test_configuration_with_error_key_is_named_as_such(tmp_path):
    """A JSON configuration is parsed as before; only responses of servers are rejected."""
    (tmp_path / "config.json.yaml").write_text(json.dumps({"base": "demo", "name": "mine"}))
    assert config.load_config(str(tmp_path / "config.json.yaml")).name == "mine"
