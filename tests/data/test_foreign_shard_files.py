"""Files that are called `.tar` and are none, or not to their end.

Add a case: a row of `WRONG_FILES` (content, message), or of `ENDS` (what follows the tar, number of unused members).
"""

import tarfile

import imagecodecs
import pytest
from foreign_shards import image_bytes, samples, write_tar

from bsq_ray.data.index import index_shards
from bsq_ray.data.inspect import inspect_shards


@pytest.fixture
def plain(tmp_path):
    """Content of a tar of six samples."""
    return write_tar(tmp_path / "plain.tar", samples()).read_bytes()


def index_content(tmp_path, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "s.tar").write_bytes(content)
    return index_shards(str(tmp_path / "set"))


def header(name, size, kind=tarfile.REGTYPE, pax_headers=None):
    """Return the header of a member of any size, also of a negative one."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.pax_headers = kind, pax_headers or {}
    content = bytearray(entry.tobuf(tarfile.PAX_FORMAT if pax_headers else tarfile.GNU_FORMAT))
    content[-388:-376] = (size % 2**96 if size < 0 else size + 2**95).to_bytes(12, "big")
    content[-364:-356] = b" " * 8
    content[-364:-356] = b"%06o\0 " % sum(content[-512:])
    return bytes(content)


def with_damaged_header(content):
    position = content.index(b"n001.jpg")
    return content[:position] + b"\xff" * 200 + content[position + 200 :]


WRONG_FILES = {
    "Git LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 84318612\n",
        "is a Git LFS pointer; fetch the file with `git lfs pull`",
    ),
    "git-annex pointer": (lambda _: b"/annex/objects/SHA256E-s84--d41d8.tar\n", "is a git-annex pointer"),
    "web page": (lambda _: b"<!DOCTYPE html><html>" + b" " * 3000, "is a web page"),
    "response of a server": (lambda _: b"<Error><Code>AccessDenied</Code></Error>", "XML: AccessDenied"),
    "short text": (lambda _: b"Not Found", "is a text: Not Found"),
    "zstd": (imagecodecs.zstd_encode, "compressed with zstd"),
    "zstd in parallel": (lambda data: b"\x50\x2a\x4d\x18\4\0\0\0abcd" + imagecodecs.zstd_encode(data), "with zstd"),
    "lz4 of old programs": (lambda _: b"\x02\x21\x4c\x18" + bytes(600), "compressed with lz4"),
    "lzip": (lambda _: b"LZIP\1" + bytes(600), "compressed with lzip"),
    "lzop": (lambda _: b"\x89LZO\0\r\n\x1a\n" + bytes(600), "compressed with lzop"),
    "damaged header": (with_damaged_header, "is damaged: the header at byte 2560 is invalid"),
    "negative size": (
        lambda data: header("a.jpg", -512) + data,
        "the header at byte 0 has a negative size",
    ),
    "negative size behind a member": (
        lambda data: header("a.jpg", 512) + bytes(512) + header("b.jpg", -512) + data,
        "is damaged: the header at byte 1024 has a negative size",
    ),
    "negative size in an extended header": (
        lambda data: header("a.jpg", 0, pax_headers={"size": "-100000000"}) + data,
        "the header at byte 0 has a negative size",
    ),
    "huge name": (lambda data: header("a.jpg", 2**62, tarfile.GNUTYPE_LONGNAME) + data, "is damaged: a header is inv"),
    "damaged map of a sparse file": (
        lambda data: header("a.jpg", 0, pax_headers={"GNU.sparse.map": "a,b"}) + data,
        "is damaged: a header is invalid: ",
    ),
    "half a header": (lambda data: data[: data.index(b"n003.jpg") + 50], "is damaged: "),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_index_shards_wrong_file_is_described(tmp_path, plain, case):
    make, message = WRONG_FILES[case]
    with pytest.raises(ValueError, match=rf"s\.tar.*{message}"):
        index_content(tmp_path, make(plain))
    assert not (tmp_path / "set" / "manifest.parquet").exists()


ENDS = {
    "nothing": (lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), 0),
    "many zeros": (lambda data: data + bytes(3_000_000), 0),
    "line end": (lambda data: data + b"\n", 1),
    "other data": (lambda data: data + b"garbage" * 200, 1),
    "damaged tar": (lambda data: data + b"\xff" + data[1:], 1),
}


@pytest.mark.parametrize("case", ENDS)
def test_index_shards_ends_behind_the_last_member(tmp_path, plain, case):
    """Whatever follows the end of a tar, its samples are used and the rest is named."""
    make, num_unused = ENDS[case]
    report = index_content(tmp_path, make(plain))
    assert (report.manifest.num_samples, report.unused.total()) == (6, num_unused)
    assert report.num_used + num_unused == report.num_members
    assert all("behind the end of the tar" in line for line in report.describe_unused())
    assert inspect_shards(str(tmp_path / "set")).errors == []


@pytest.mark.parametrize(("mode", "format_name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz", "s.TAR.ZST", "s.tar.lz4"])
def test_index_shards_compressed_tar_is_named_by_its_content(tmp_path, mode, format_name, name):
    """A compressed tar is named with its format and the command that unpacks it, whatever its suffix."""
    write_tar(tmp_path / name, samples(), mode)
    with pytest.raises(
        ValueError, match=rf"{name}.*compressed with {format_name}; unpack it: {format_name} -dc {name} > s"
    ):
        index_shards(str(tmp_path))


def test_index_shards_plain_tar_with_compressed_name_is_used(tmp_path):
    write_tar(tmp_path / "s.tar.gz", samples())
    assert index_shards(str(tmp_path)).manifest.num_samples == 6


def test_index_shards_concatenated_tars_are_read_to_the_end(tmp_path):
    """Members behind the end mark of a first tar are used, too."""
    parts = [write_tar(tmp_path / f"{n}" / "p.tar", samples(2, name=f"p{n}-{{}}")).read_bytes() for n in range(3)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "s.tar").write_bytes(b"".join(parts))
    assert index_shards(str(tmp_path / "set")).manifest.num_samples == 6
    assert inspect_shards(str(tmp_path / "set")).errors == []


@pytest.mark.parametrize("num_parts", [1, 3])
def test_index_shards_tar_behind_empty_tar_is_read(tmp_path, plain, num_parts):
    """A tar without members ends nothing: `cat empty.tar full.tar` has the members of the second."""
    empty = write_tar(tmp_path / "empty.tar", []).read_bytes()
    assert index_content(tmp_path, empty * num_parts + plain).manifest.num_samples == 6
    assert inspect_shards(str(tmp_path / "set")).errors == []


def test_index_shards_truncated_tar_raises(tmp_path):
    content = write_tar(tmp_path / "whole.tar", samples()).read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "s.tar").write_bytes(content[: content.index(image_bytes(5)) + 20])
    with pytest.raises(ValueError, match="s.tar is damaged"):
        index_shards(str(tmp_path / "set"))
