"""Tars and Parquet files as people have them: every member is packed, or counted and named.

Add a case: a row of `TARS` (members, classes, class of each image, text of the report), of `BAD_TARS` (content,
message), of `NEIGHBORS` (files next to the tars, text of the report) or of `PARQUET_LABELS` (column, classes, or
message).
"""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_shards import Link, image_bytes, samples, write_tar

from bsq_ray.data.pack import PackOptions, pack_images

HERE = PackOptions(num_workers=0, storage_timeout_s=0)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 84318612\n"
NUMBERS, THREE = ("0", "1", "2"), [0, 0, 1, 1, 2, 2]


def pack(source, tmp_path, options=HERE):
    """Pack a source; return the classes, the sorted classes of the images, and the text of the report."""
    report = pack_images(str(source), str(tmp_path / "packed"), options)
    labels = sorted(label for shard in report.manifest.shards for label in shard.labels)
    return report.manifest.classes, labels, "\n".join(report.ignored.describe() + report.damaged_files)


def tar_bytes(tmp_path, members, mode="w"):
    return write_tar(tmp_path / "part.tar", members, mode).read_bytes()


TARS = {
    "links": ([*samples(), ("x.jpg", Link("n000.jpg")), ("x.cls", "1")], NUMBERS, [0, 0, 1, 1, 1, 2, 2], ""),
    "links that lead nowhere": ([*samples(), ("x.jpg", Link("../x.jpg"))], NUMBERS, THREE, "1 links to files that"),
    "dots in names": (
        [*samples(), ("a.b.jpg", image_bytes(7)), ("a.b.cls", "1"), ("c.d.jpg", image_bytes(8)), ("c.cls", "2")],
        NUMBERS,
        [0, 0, 1, 1, 1, 2, 2, 2],
        "",
    ),
    "labels in JSON": (
        samples(label=lambda n: json.dumps({"label": n % 3}), label_suffix="json"),
        NUMBERS,
        THREE,
        "",
    ),
    "JSON without labels": (
        samples(label=lambda n: '{"caption": "a"}', label_suffix="json"),
        ("all",),
        [0] * 6,
        "6 .json files without a label field, such as n000.json",
    ),
    "upper case": (samples(suffix="JPG", label_suffix="CLS"), NUMBERS, THREE, ""),
    "another label suffix": (samples(label_suffix="class"), NUMBERS, THREE, ""),
    "byte-order marks": (samples(label=lambda n: str(n % 3).encode("utf-8-sig")), NUMBERS, THREE, ""),
    "UTF-16": (samples(label=lambda n: str(n % 3).encode("utf-16")), NUMBERS, THREE, ""),
    "ids": (
        samples(label=lambda n: str(10**9 + n % 3)),
        ("1000000000", "1000000001", "1000000002"),
        THREE,
        "",
    ),
    "ids beyond 32 bits": (samples(2, label=lambda n: str(2**40 - n)), (str(2**40 - 1), str(2**40)), [0, 1], ""),
    "folders": (samples(2, name="d/{}", label=None) + samples(1, name="e/{}", label=None), ("d", "e"), [0, 0, 1], ""),
    "folders that are ids": (
        samples(1, name="99/{}", label=None) + samples(1, name="1000000007/{}", label=None),
        ("99", "1000000007"),
        [0, 1],
        "",
    ),
    "leftovers": (
        [
            *samples(2, name="a/{}", label=None),
            ("__MACOSX/a/1.jpg", b"x"),
            (".ipynb_checkpoints/1.jpg", image_bytes()),
            ("a/@eaDir/1.jpg", image_bytes()),
        ],
        ("a",),
        [0, 0],
        "3 leftovers of systems and tools, such as __MACOSX/a/1.jpg",
    ),
    "other types": (
        [*samples(), ("a.heic", b"x"), ("README", "x")],
        NUMBERS,
        THREE,
        "2 files of other types: .heic (1), no suffix (1); .heic is an image format that is not read",
    ),
    "name that starts with a dot": ([*samples(), (".a.jpg", image_bytes())], NUMBERS, THREE, "starts with a dot"),
    "labels without images": (
        [
            *samples(1, name="a/{}", label=None),
            *samples(1, name="b/{}", label=None),
            ("info.json", '{"category": "animals"}'),
            ("labels.json", '{"label": ["cat", "dog"]}'),
            ("notes.json", '{"a": 1}\n{"a": 2}'),
            ("b/x.label", b"\0\1\xff\xfe"),
        ],
        ("a", "b"),
        [0, 1],
        "4 labels without an image of their key, such as info.json",
    ),
    "large JSON": (
        [*samples(), ("n000.json", b'{"label": "' + bytes(2**24))],
        NUMBERS,
        THREE,
        "1 .json files of samples with another label",
    ),
    "large JSON without another label": (
        [*samples(2, name="a/{}", label=None), ("a/0.json", b'{"label": "' + bytes(2**24))],
        ("a",),
        [0, 0],
        "1 label files of more than 16 MiB, which are not read, such as a/0.json",
    ),
    "masks before the images": (
        [("n000.pgm", image_bytes(9, "PPM")), *samples()],
        NUMBERS,
        THREE,
        "1 images whose key another one in the tar has, such as n000.pgm",
    ),
    "masks of the same key": ([*samples(), ("n000.png", image_bytes(9, "PNG"))], NUMBERS, THREE, "such as n000.png"),
    "labels of the same key": ([*samples(), ("n000.cls", "2")], NUMBERS, THREE, "1 labels whose key occurs earlier"),
    "two labels": ([*samples(), ("n000.label", "2")], NUMBERS, THREE, "1 .label files of samples with another label"),
    "empty image": (
        [*samples(), ("x.jpg", b""), ("x.cls", "1")],
        NUMBERS,
        THREE,
        "x.jpg: not an image of a known format",
    ),
}


@pytest.mark.parametrize("case", TARS)
def test_pack_images_packs_or_names_members_of_tars(tmp_path, case):
    members, classes, labels, text = TARS[case]
    write_tar(tmp_path / "set" / "s.tar", members)
    packed = pack(tmp_path / "set", tmp_path)
    assert packed[:2] == (classes, labels)
    assert text in packed[2]
    assert bool(packed[2]) == bool(text)


def test_pack_images_packs_concatenated_and_nested_tars(tmp_path):
    """Tars that were appended with `cat`, and tars in tars, are packed to their end."""
    first, second = (tar_bytes(tmp_path, samples(3, name=name + "{}", label=None)) for name in "ab")
    write_tar(tmp_path / "all.tar", [("x.tar", first + second), ("y.tar", second + b"\n")])
    classes, labels, text = pack(tmp_path / "all.tar", tmp_path)
    assert (classes, labels) == (("x", "y"), [0] * 6 + [1] * 3)
    assert text.startswith("1 parts behind the end of the tar that are no tar")


def test_pack_images_equal_keys_of_parts_keep_their_labels(tmp_path):
    """Appended tars and tars in tars may use the same keys; `data index` counts the second images of a shard."""
    first, second = (tar_bytes(tmp_path, samples(1, label=lambda _, label=label: label)) for label in "07")
    write_tar(tmp_path / "nested.tar", [("x.tar", first), ("y.tar", second)])
    (tmp_path / "appended.tar").write_bytes(first + second)
    assert pack(tmp_path / "nested.tar", tmp_path / "1")[1:] == ([0, 7], "")
    assert pack(tmp_path / "appended.tar", tmp_path / "2")[1:] == ([0, 7], "")


def damaged_header(tmp_path):
    """Return a tar whose third header is overwritten."""
    content = tar_bytes(tmp_path, samples())
    position = content.index(b"n001.jpg")
    return content[:position] + b"\xff" * 200 + content[position + 200 :]


BAD_TARS = {
    "Git LFS pointer": (lambda _: LFS_POINTER, "s.tar is a Git LFS pointer; fetch the file with"),
    "web page": (lambda _: b"<!DOCTYPE html><html>" + b" " * 3000, "s.tar is a web page"),
    "response of a server": (
        lambda _: b"<Error><Code>NoSuchKey</Code></Error>",
        "response of a server .XML: NoSuchKey",
    ),
    "gzip": (
        lambda path: tar_bytes(path, samples(), "w:gz"),
        "s.tar is not a plain tar file: it is compressed with gzip",
    ),
    "xz": (lambda path: tar_bytes(path, samples(), "w:xz"), "compressed with xz; unpack it: xz -dc s.tar > s-unpacked"),
    "pzstd": (lambda _: b"\x50\x2a\x4d\x18\4\0\0\0" + bytes(600), "compressed with zstd"),
    "lzip": (lambda _: b"LZIP\1" + bytes(600), "compressed with lzip"),
    "damaged header": (damaged_header, "s.tar .*the header at byte 2560 is invalid"),
    "truncated": (lambda path: tar_bytes(path, samples())[:1000], "s.tar .*(ends inside|unexpected end)"),
    "negative label": (
        lambda path: tar_bytes(path, samples(label=lambda n: str(-n))),
        "s.tar: n001.cls has the class -1",
    ),
    "empty label": (lambda path: tar_bytes(path, samples(label=lambda n: "")), "s.tar: n000.cls is empty"),
    "some labels": (
        lambda path: tar_bytes(path, [*samples(), ("x.jpg", image_bytes())]),
        "s.tar: x.jpg has no class, but others have",
    ),
    "numbers and names": (
        lambda path: tar_bytes(path, samples(label=lambda n: "cat" if n else "0")),
        "n000.cls is the number 0, but .*n001.cls is 'cat'",
    ),
    "no images": (
        lambda path: tar_bytes(path, [("a.heic", b"x")]),
        "contains no files with .*; it has 1 files of other",
    ),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_pack_images_bad_tar_raises_with_its_name(tmp_path, case):
    make, message = BAD_TARS[case]
    content = make(tmp_path / "parts")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "s.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "set", tmp_path)


NEIGHBORS = {
    "leftover folders": (["@eaDir/a.jpg", "lost+found/x", "__MACOSX/._s.tar"], "3 leftovers of systems and tools"),
    "leftover files": (["._s.tar", ".DS_Store", "t.tar.part"], "3 leftovers of systems and tools"),
    "compressed tars": (
        ["t.tar.gz", "u.tgz"],
        "2 compressed tars, which are not read; unpack them first, such as t.tar",
    ),
    "files that start with a dot": (
        [".x.jpg", ".x.parquet", ".x"],
        "3 files with a name that starts with a dot, such as .x",
    ),
    "other files": (["README.md", "SHA256SUMS"], "2 files of other types: .md (1), no suffix (1)"),
}


@pytest.mark.parametrize("case", NEIGHBORS)
def test_pack_images_names_what_is_next_to_tars(tmp_path, case):
    names, text = NEIGHBORS[case]
    write_tar(tmp_path / "set" / "s.tar", samples())
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(gzip.compress(b"x"))
    packed = pack(tmp_path / "set", tmp_path)
    assert packed[:2] == (NUMBERS, THREE)
    assert text in packed[2]


@pytest.mark.parametrize(
    ("folder", "source"),
    [("a*b", "a*b"), ("a*b", "a*b/s.tar"), ("[1] x?", "[1] x?/*.tar"), ("a::b", "a::b/*.tar"), ("~x", "~x")],
)
def test_pack_images_existing_source_is_no_pattern(tmp_path, monkeypatch, folder, source):
    """A source is a pattern only where no file or folder has the name."""
    write_tar(tmp_path / folder / "s.tar", samples())
    monkeypatch.chdir(tmp_path)
    assert pack(source, tmp_path)[:2] == (NUMBERS, THREE)


@pytest.mark.parametrize(
    ("pattern", "num_images"), [("s-[01].tar", 2), ("s-[!2]*.tar", 2), ("s-?.tar", 3), ("s-?.t*", 3)]
)
def test_pack_images_pattern_of_shells_is_expanded(tmp_path, pattern, num_images):
    """`?` and brackets are patterns where no name contains them."""
    for number in range(3):
        write_tar(tmp_path / f"s-{number}.tar", samples(1, label=lambda _, number=number: str(number)))
    assert pack(tmp_path / pattern, tmp_path)[1] == list(range(num_images))


def test_pack_images_folder_with_star_is_no_pattern(tmp_path):
    (tmp_path / "a*b").mkdir()
    (tmp_path / "a*b" / "x.jpg").write_bytes(image_bytes())
    assert pack(tmp_path / "a*b", tmp_path)[1] == [0]


@pytest.mark.parametrize(
    ("suffix", "image_format"),
    [("jfif", "JPEG"), ("JPE", "JPEG"), ("mpo", "MPO"), ("MPO", "JPEG"), ("dib", "BMP"), ("j2k", "JPEG2000")],
)
def test_pack_images_knows_all_suffixes_of_a_format(tmp_path, suffix, image_format):
    """Files of a format that is read are packed, whatever the program that wrote them calls them."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"a.{suffix}").write_bytes(image_bytes(1, image_format))
    assert pack(tmp_path / "set", tmp_path) == (("all",), [0], "")


PARQUET_LABELS = {
    "numbers": (pa.array([0, 2, 1]), NUMBERS),
    "ids": (pa.array([10**9, 7, 10**9]), ("7", "1000000000")),
    "ids beyond 32 bits": (pa.array([2**40, 7, 8]), ("7", "8", str(2**40))),
    "whole floats": (pa.array([0.0, 1.0, 2.0]), NUMBERS),
    "texts": (pa.array(["dog", "cat", "dog"]), ("cat", "dog")),
    "texts by number": (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ("cat", "dog")),
    "numbers by number": (pa.array([0, 2, 1]).dictionary_encode(), NUMBERS),
    "views of texts": (pa.array(["dog", "cat", "dog"], pa.string_view()), ("cat", "dog")),
    "beyond 64 bits": (pa.array([1, 2, 2**63], pa.uint64()), f"has the label {2**63}; labels are at most"),
    "not a number": (pa.array([0.0, float("nan"), 1.0]), "has the label NaN; some rows have no label"),
    "ids as texts": (pa.array(["1000000007", "5", "5"]), ("5", "1000000007")),
    "fractions": (pa.array([0.5, 1, 2]), "labels of the type double; they must be whole numbers or texts"),
    "lists": (pa.array([[0], [1], [2]]), "labels of the type list"),
    "negative": (pa.array([-1, 0, 1]), "has the label -1"),
    "missing": (pa.array([0, None, 1]), "some rows of .* have no label"),
}


@pytest.mark.parametrize("case", PARQUET_LABELS)
def test_pack_images_numbers_labels_of_parquet(tmp_path, case):
    labels, expected = PARQUET_LABELS[case]
    images = pa.array([{"bytes": image_bytes(number)} for number in range(3)])
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "t.parquet")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            pack(tmp_path / "t.parquet", tmp_path)
    else:
        assert pack(tmp_path / "t.parquet", tmp_path)[0] == expected


def test_pack_images_parquet_labels_of_two_types_raise(tmp_path):
    for number, label in enumerate(["cat", 1]):
        images = pa.array([{"bytes": image_bytes(number)}])
        pq.write_table(pa.table({"image": images, "label": [label]}), tmp_path / f"{number}.parquet")
    with pytest.raises(ValueError, match="labels of different types, such as .*0.parquet"):
        pack(tmp_path / "*.parquet", tmp_path)


@pytest.mark.parametrize(("content", "message"), [(LFS_POINTER, "Git LFS pointer"), (b"Not Found", "is a text: Not")])
def test_pack_images_wrong_parquet_file_is_described(tmp_path, content, message):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "t.parquet", tmp_path)
