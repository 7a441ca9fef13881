"""Shards made elsewhere: every member is used, or counted and named; what is indexed can be read.

Add a case: a row of `USED` (members, options, number of samples, number of unused members, text of the report), of
`REJECTED` (members, options, message), or of `LABELS` (labels, options, classes, indices).
"""

import gzip
import json
import subprocess
import sys
import tarfile

import pytest
import webdataset
from foreign_shards import Link, image_bytes, samples, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsq_ray.data.index import IndexOptions, index_shards
from bsq_ray.data.inspect import inspect_shards
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.tar_members import is_member_of, split_member_name

PLAIN = IndexOptions()
LAST_DOT = IndexOptions(key_until="last-dot")
LONG = "long/" + "x" * 140
HARD = tarfile.LNKTYPE

USED = {
    "plain": (samples(), PLAIN, 6, 0, ""),
    "in a folder": (samples(name="dataset/n{:03}"), PLAIN, 6, 0, ""),
    "in ./": (samples(name="./n{:03}"), PLAIN, 6, 0, ""),
    "below a leading slash": (samples(name="/data/set/n{:03}"), PLAIN, 6, 0, ""),
    "folder with dots": (samples(name="v1.0/a.b/n{:03}"), PLAIN, 6, 0, ""),
    "folder members": ([("dataset", None), *samples(name="dataset/n{:03}")], PLAIN, 6, 0, ""),
    "same names in two folders": (samples(name="a/n{:03}") + samples(name="b/n{:03}"), PLAIN, 12, 0, ""),
    "upper case": (samples(suffix="JPEG", label_suffix="CLS"), PLAIN, 6, 0, ""),
    "labels at the end": (sorted(samples(), key=lambda pair: pair[0].endswith(".cls")), PLAIN, 6, 0, ""),
    "dots in some names": (
        [*samples(), ("IMG_1.small.jpg", image_bytes()), ("2017.10.08-1.jpg", image_bytes())],
        PLAIN,
        6,
        2,
        "2 files whose key ends at the first dot of the name, such as s.tar: IMG_1.small.jpg (key IMG_1, "
        "suffix .small.jpg); index with --key-until last-dot",
    ),
    "dots in all names": (samples(name="2017.10.{:02}-1"), LAST_DOT, 6, 0, ""),
    "other files": (
        [*samples(), ("n000.txt", "a caption"), ("n001.txt", "another"), ("n000.npy", b"123"), ("README", "text")],
        PLAIN,
        6,
        4,
        "2 .txt files, such as s.tar: n000.txt",
    ),
    "masks of the same key": ([*samples(), ("n000.png", image_bytes(9, "PNG"))], PLAIN, 6, 1, "s.tar: n000.png"),
    "masks before the images": ([("n000.pgm", image_bytes(9, "PPM")), *samples()], PLAIN, 6, 1, "s.tar: n000.pgm"),
    "each name twice": (samples() * 2, PLAIN, 6, 12, "6 images or videos whose key another one in the shard has"),
    "label without image": ([*samples(), ("x.cls", "1")], PLAIN, 6, 1, "labels without an image"),
    "empty image": ([*samples(), ("x.jpg", b""), ("x.cls", "1")], PLAIN, 6, 2, "1 empty images or videos"),
    "leftovers": (
        [
            *samples(),
            ("._n000.jpg", b"x"),
            ("__MACOSX/._n.jpg", b"x"),
            (".DS_Store", b"x"),
            ("a/Thumbs.db", b"x"),
            (".ipynb_checkpoints/n000-checkpoint.jpg", image_bytes()),
        ],
        PLAIN,
        6,
        5,
        "5 leftovers of systems and tools",
    ),
    "name that starts with a dot": ([*samples(), (".hidden.jpg", image_bytes())], PLAIN, 6, 1, "starts with a dot"),
    "symbolic link": ([*samples(), ("x.jpg", Link("n000.jpg")), ("x.cls", "2")], PLAIN, 7, 0, ""),
    "relative link": (
        [*samples(name="a/n{:03}"), ("b/x.jpg", Link("../a/n000.jpg")), ("b/x.cls", Link("../a/n001.cls"))],
        PLAIN,
        7,
        0,
        "",
    ),
    "hard link": (
        [*samples(), ("y/x.jpg", Link("n000.jpg", HARD)), ("y/x.cls", Link("n000.cls", HARD))],
        PLAIN,
        7,
        0,
        "",
    ),
    "link to a link": (
        [*samples(), ("x.jpg", Link("y.jpg")), ("x.cls", "1"), ("y.jpg", Link("n000.jpg")), ("y.cls", "1")],
        PLAIN,
        8,
        0,
        "",
    ),
    "links that lead nowhere": (
        [*samples(), ("x.jpg", Link("/home/me/x.jpg")), ("y.jpg", Link("../y.jpg")), ("z.jpg", Link("z.jpg"))],
        PLAIN,
        6,
        3,
        "2 links to files that are not in the shard; archive with `tar --dereference`",
    ),
    "names that are not UTF-8": (samples(name="gr\udcfcn-{:03}"), PLAIN, 6, 0, ""),
    "letters beyond ASCII": (samples(name="küche/猫-{:03}"), PLAIN, 6, 0, ""),
    "names of 140 letters": (samples(name=LONG + "{:03}"), PLAIN, 6, 0, ""),
    "labels in JSON": (
        samples(label=lambda n: json.dumps({"url": "x", "label": n % 3}), label_suffix="json"),
        PLAIN,
        6,
        0,
        "",
    ),
    "JSON without labels": (
        samples(label=lambda n: json.dumps({"caption": "a", "key": n}), label_suffix="json"),
        PLAIN,
        6,
        6,
        "6 .json files without a label field (label, class, cls, category, …; choose with --label-field)",
    ),
    "JSON next to .cls": ([*samples(), *((f"n{n:03}.json", "{}") for n in range(6))], PLAIN, 6, 6, "6 .json files of"),
    "a field of JSON": (
        samples(label=lambda n: json.dumps({"label": "x", "meta": {"wnid": f"n0{n % 3}"}}), label_suffix="json"),
        IndexOptions(label_field="meta.wnid"),
        6,
        0,
        "names from n00 to n02",
    ),
}


def index_one(tmp_path, members, options=PLAIN, **tar_options):
    write_tar(tmp_path / "set" / "s.tar", members, **tar_options)
    return index_shards(str(tmp_path / "set"), options)


def report_text(report):
    return "\n".join([*report.describe_unused(), report.class_rule, *report.notes])


@pytest.mark.parametrize("case", USED)
def test_index_shards_uses_or_names_every_member(tmp_path, case):
    """Used and unused members add up, the report names an example, and inspection can read each sample."""
    members, options, num_samples, num_unused, text = USED[case]
    report = index_one(tmp_path, members, options)
    num_members = sum(content is not None for _, content in members)
    assert (report.manifest.num_samples, report.unused.total()) == (num_samples, num_unused)
    assert (report.num_members, report.num_used) == (num_members, num_members - num_unused)
    assert text in report_text(report)
    inspection = inspect_shards(str(tmp_path / "set"))
    assert (inspection.num_measured, inspection.errors) == (num_samples, [])


@pytest.mark.parametrize(
    "case",
    ["plain", "in a folder", "names that are not UTF-8", "letters beyond ASCII", "names of 140 letters", "hard link"],
)
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT], ids=["ustar", "gnu"])
def test_index_shards_reads_other_tar_formats(tmp_path, case, tar_format):
    """The headers of old tars and of GNU tars are read like those of PAX."""
    members, options, num_samples, _, _ = USED[case]
    if tar_format == tarfile.USTAR_FORMAT and case == "names of 140 letters":
        pytest.skip("the format has no such names")
    index_one(tmp_path, members, options, tar_format=tar_format)
    assert inspect_shards(str(tmp_path / "set")).num_measured == num_samples


names = st.sampled_from(["a", "b.c", "d/e", "./f", "d.x/g.h", "._a", ".h", "__MACOSX/a", "k" * 120, "ü"])
suffixes = st.sampled_from([".jpg", ".PNG", ".cls", ".json", ".txt", "", ".a.jpg", ".mp4x"])
contents = st.sampled_from(
    [
        image_bytes(1),
        image_bytes(2),
        b"1",
        b"0",
        b'{"label": 1}',
        b"",
        Link("a.jpg"),
        Link("a.jpg", HARD),
        Link("q"),
        None,
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(names, suffixes, contents), max_size=12), st.sampled_from(["first-dot", "last-dot"]))
def test_index_shards_random_tars_add_up(tmp_path, entries, key_until):
    """For any tar: used members and unused members are all members, or an error names the shard."""
    members = [(name + suffix, content) for name, suffix, content in entries]
    try:
        report = index_one(tmp_path, [*members, ("sample.jpg", image_bytes())], IndexOptions(key_until))
    except ValueError:
        with pytest.raises(ValueError, match=r"s\.tar"):
            index_shards(str(tmp_path / "set"), IndexOptions(key_until))
        return
    assert report.num_used + report.unused.total() == report.num_members
    assert report.num_members == 1 + sum(content is not None for _, content in members)
    assert all(report.examples[reason] for reason in report.unused)


@given(st.text("ab./-_0ü", min_size=1, max_size=12), st.sampled_from(["first-dot", "last-dot"]))
def test_split_member_name_is_accepted_by_the_reader(name, key_until):
    """The reader accepts every key that the index makes."""
    parts = split_member_name(name, key_until)
    assert parts is None or is_member_of(name, parts[0])
    assert parts is None or (parts[0] and parts[1].startswith("."))


LABELS = {
    "numbers": (["2", "0", "2"], PLAIN, ("0", "1", "2"), (2, 0, 2)),
    "line ends": (["0\n", "1\r\n", " 2 "], PLAIN, ("0", "1", "2"), (0, 1, 2)),
    "byte-order marks": ([b"\xef\xbb\xbf0", "1".encode("utf-16"), "2"], PLAIN, ("0", "1", "2"), (0, 1, 2)),
    "UTF-16 without a mark": (
        ["12".encode("utf-16-le"), "0".encode("utf-16-be"), "1"],
        PLAIN,
        tuple(map(str, range(13))),
        (12, 0, 1),
    ),
    "decimals": (["0.0", "1.", "2.00"], PLAIN, ("0", "1", "2"), (0, 1, 2)),
    "invisible ends": (["2\0\0", "\u200b0\u00a0", "1\r\n\x1a"], PLAIN, ("0", "1", "2"), (2, 0, 1)),
    "ids": (["1000000007", "999999990", "1000000007"], PLAIN, ("999999990", "1000000007"), (1, 0, 1)),
    "ids beyond 64 bits": ([str(2**70), "5", str(2**70)], PLAIN, ("5", str(2**70)), (1, 0, 1)),
    "WordNet ids": (["n02", "n01", "n02"], PLAIN, ("n01", "n02"), (1, 0, 1)),
    "names with spaces": (["traffic light", "bus", "Straße"], PLAIN, ("Straße", "bus", "traffic light"), (2, 1, 0)),
    "WordNet ids of a list": (
        ["n02", "n01", "n02"],
        "n01 tench, Tinca tinca\nn02 goldfish\nn03 shark",
        ("n01 tench, Tinca tinca", "n02 goldfish", "n03 shark"),
        (1, 0, 1),
    ),
    "numbers of a list": (
        ["2", "0", "0"],
        "tench\ngoldfish\ngreat white shark",
        ("tench", "goldfish", "great white shark"),
        (2, 0, 0),
    ),
    "numbers of a numbered list": (["2", "1", "1"], "1 Archery\r\n2 Bowling", ("1 Archery", "2 Bowling"), (1, 0, 0)),
    "names of a list": (
        ["great white shark", "tench", "tench"],
        "\ufefftench\r\n\r\n# fish\r\ngreat white shark\r\n",
        ("tench", "great white shark"),
        (1, 0, 0),
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_index_shards_numbers_classes_of_labels(tmp_path, case):
    """Labels as people have them become classes; no list grows with the numbers."""
    labels, options, classes, indices = LABELS[case]
    if isinstance(options, str):
        (tmp_path / "classes.txt").write_bytes(options.encode())
        options = IndexOptions(class_list=str(tmp_path / "classes.txt"))
    manifest = index_one(tmp_path, samples(3, label=lambda n: labels[n]), options).manifest
    assert (manifest.classes, manifest.shards[0].labels) == (classes, indices)
    assert read_manifest(str(tmp_path / "set")) == manifest


@pytest.mark.parametrize("suffix", ["cls", "class", "label", "target", "json"])
def test_index_shards_label_suffixes(tmp_path, suffix):
    """A label can be in a file of several suffixes."""
    content = '{"class": %s}' if suffix == "json" else "%s"
    report = index_one(tmp_path, samples(3, label=lambda n: content % n, label_suffix=suffix))
    assert report.manifest.shards[0].labels == (0, 1, 2)


REJECTED = {
    "JSON that is not a number": (
        samples(label=lambda n: '{"label": NaN}', label_suffix="json"),
        PLAIN,
        "n000.json: the field label is NaN; expected a class number",
    ),
    "no images": ([("a.txt", "x")], PLAIN, "contains no images .* it has 1 .txt files, such as s.tar: a.txt"),
    "all names with dots": (samples(name="a.{}"), PLAIN, r"contains no images .* --key-until last-dot"),
    "empty label": (samples(label=lambda n: ""), PLAIN, "s.tar: n000.cls is empty; expected a class number"),
    "label of two lines": (samples(label=lambda n: "1\n2"), PLAIN, "n000.cls has more than one line"),
    "label that is an array": (samples(label=lambda n: b"\0\1\2\xff\0\xd8\0"), PLAIN, "n000.cls is not text"),
    "label of a binary format": (samples(label=lambda n: b"\0\1\xff\xfe"), PLAIN, "n000.cls is not text"),
    "negative label": (samples(label=lambda n: str(-n)), PLAIN, "n001.cls has the class -1; classes are numbers"),
    "numbers and names": (
        samples(label=lambda n: "cat" if n else "0"),
        PLAIN,
        "n000.cls is the number 0, but .*n001.cls",
    ),
    "some labels": ([*samples(), ("x.jpg", image_bytes())], PLAIN, "1 of 7 samples .* have no class, such as s.tar: x"),
    "damaged JSON": (samples(label=lambda n: '{"label":', label_suffix="json"), PLAIN, "n000.json is not JSON"),
    "no such field": (
        samples(label=lambda n: '{"tag": 1}', label_suffix="json"),
        IndexOptions(label_field="kind"),
        "n000.json has no field kind; it has the fields tag",
    ),
    "several labels": (
        samples(label=lambda n: '{"label": [1, 2]}', label_suffix="json"),
        PLAIN,
        r"field label is \[1, 2\]",
    ),
    "several fields": (
        samples(label=lambda n: '{"label": 1}' if n else '{"class": 1}', label_suffix="json"),
        PLAIN,
        "several fields: class .*n000.json.*, label .*n001.json.*--label-field",
    ),
    "no readable image": (
        [("a.jpg", b"text"), ("b.jpg", b"text")],
        PLAIN,
        "no image of .*s.tar can be read; first: s.tar: a",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_index_shards_rejects_with_shard_and_member(tmp_path, case):
    """An error names the shard, the member and what is expected, and no manifest is written."""
    members, options, message = REJECTED[case]
    with pytest.raises(ValueError, match=message):
        index_one(tmp_path, members, options)
    assert not (tmp_path / "set" / "manifest.parquet").exists()


@pytest.mark.parametrize("labels", ["n07", "3"])
def test_index_shards_label_outside_the_list_raises(tmp_path, labels):
    (tmp_path / "classes.txt").write_text("n01\nn02\n")
    with pytest.raises(
        ValueError, match=rf"s.tar: n000.cls is {labels}, which is none of the 2 classes of .*classes.txt"
    ):
        index_one(tmp_path, samples(label=lambda n: labels), IndexOptions(class_list=str(tmp_path / "classes.txt")))


def test_index_shards_names_what_it_does_not_index(tmp_path):
    """Compressed shards, shards in subfolders and leftovers next to shards are counted and named."""
    write_tar(tmp_path / "a.tar", samples())
    write_tar(tmp_path / "b.tar.gz", samples(), "w:gz")
    write_tar(tmp_path / "more" / "c.tar", samples())
    write_tar(tmp_path / "more" / "d.tar", samples())
    (tmp_path / "._a.tar").write_bytes(b"x")
    (tmp_path / "e.tar.part").write_bytes(b"x")
    report = index_shards(str(tmp_path))
    assert report.manifest.num_samples == 6
    text = "\n".join(report.notes)
    assert "1 shards are compressed, so that no sample can be read alone: b.tar.gz" in text
    assert "2 shards are in subfolders: more (2)" in text
    assert "2 leftovers of systems and tools: *.part (1), ._* (1)" in text
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"contains no \.tar shards.*b\.tar\.gz.*more \(2\)"):
        index_shards(str(tmp_path))


def test_index_shards_damaged_first_sample_is_noted(tmp_path):
    report = index_one(tmp_path, [("a.jpg", b"not an image"), *samples(label=None)])
    [note] = report.notes
    assert note.startswith("s.tar: a: not an image of a known format: it is a text: not an image")


def test_data_index_command_prints_what_is_not_used(tmp_path):
    """The command prints counts, reasons, examples and notes."""
    write_tar(tmp_path / "s.tar", USED["dots in some names"][0])
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(b"x"))
    command = [sys.executable, "-m", "bsq_ray", "data", "index", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "6 images, shards 1, classes 3; wrote" in output
    assert "not used 2 of 14 files in the shards:\n  2 files whose key ends at the first dot" in output
    assert "note: 1 shards are compressed" in output


def test_index_shards_with_ray_gives_the_same_data_set(tmp_path, photos, ray_local):
    """Tasks write the indexes that this process writes, and leave nothing else behind."""
    for number, photo in enumerate(photos[:6]):
        with webdataset.TarWriter(str(tmp_path / f"s-{number}.tar")) as writer:
            writer.write(
                {"__key__": f"n{number}", "jpg": photo.resize((32, 32)), "cls": f"class {number % 4}".encode()}
            )
    here = index_shards(str(tmp_path)).manifest
    there = index_shards(str(tmp_path), IndexOptions(num_workers=2)).manifest
    assert (there, list(there.shards)) == (here, list(here.shards))
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar", ".arrow", ".parquet"}
