"""Folders as people have them: links, leftovers of systems and tools, names; and the lists that people edit.

Add a case: a row of `FOLDERS` (files, names that are found, text of the report), of `LISTS` (lines, names that are
selected) or of `BAD_LISTS` (lines, message).
"""

import os
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray.data.file_list import find_files, list_files
from bsq_ray.data.folder_listing import FolderListing, leftover_name, natural_key, printable, walk_files
from bsq_ray.data.split_list import class_lookup
from bsq_ray.data.text_lines import decode_text, read_lines

SUFFIXES = (".jpg", ".png")

LEFTOVERS = [
    ".ipynb_checkpoints/a-checkpoint.jpg", "cats/.thumbnails/a.jpg", "__MACOSX/cats/._a.jpg", "cats/@eaDir/a.jpg",
    "cats/._a.jpg", "Thumbs.db", "cats/.DS_Store", "desktop.ini", ".git/objects/a.jpg", "$RECYCLE.BIN/a.jpg",
    "lost+found/a.jpg", "cats/a.jpg.part", "cats/a.jpg.crdownload", "cats/a.jpg~", ".Trash-1000/files/a.jpg",
    "System Volume Information/a.jpg", "#recycle/a.jpg", "@Recycle/a.jpg", ".@__thumb/a.jpg", "cats/.AppleDouble/a.jpg",
    ".cache/huggingface/a.jpg", ".svn/a.jpg", "cats/~$a.jpg", "cats/a.jpg.aria2", "cats/a.jpg.filepart",
    "THUMBS.DB", "__macosx/a.jpg", "cats/.nfs0001", "cats/Icon\r", "cats/.a.jpg.swp", "__pycache__/a.jpg",
    "a.download/b.jpg", ".stversions/a.jpg", ".dvc/cache/a.jpg", "cats/a.jpg:Zone.Identifier",
]  # fmt: skip
DATA = [
    "a.jpg", "cats/a.jpg", ".a.jpg", "-a.jpg", "gits/a.jpg", "Thumbs/a.jpg", "part/a.jpg", "a~b.jpg", "cats/a.part.jpg",
    "tmp/a.jpg", "recycle/a.jpg", "git/a.jpg", "a..jpg",
]  # fmt: skip


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftover_name_finds_leftovers(name):
    assert leftover_name(name) is not None


@pytest.mark.parametrize("name", DATA)
def test_leftover_name_keeps_data(name):
    assert leftover_name(name) is None


def make_tree(folder, names):
    """Make files; a name with " -> " is a link to what follows."""
    for name in names:
        name, _, target = name.partition(" -> ")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        else:
            path.write_bytes(b"x")
    return str(folder)


FOLDERS = {
    "linked class folders": (
        ["store/c/1.jpg", "store/d/2.jpg", "set/c -> ../store/c", "set/d -> ../store/d", "set/e/3.jpg"],
        ["c/1.jpg", "d/2.jpg", "e/3.jpg"],
        "",
    ),
    "linked files": (["store/1.jpg", "set/a.jpg -> ../store/1.jpg", "set/b.jpg -> a.jpg"], ["a.jpg", "b.jpg"], ""),
    "links to links": (["store/c/1.jpg", "link -> store", "set/c -> ../link/c"], ["c/1.jpg"], ""),
    "absolute link": (["store/c/1.jpg", "set/c -> {root}/store/c"], ["c/1.jpg"], ""),
    "broken links": (
        ["set/a.jpg", "set/b.jpg -> gone.jpg", "set/c -> ../gone", "set/d.jpg -> d.jpg"],
        ["a.jpg"],
        "3 broken links: b.jpg, c, d.jpg",
    ),
    "loops": (
        ["set/c/a.jpg", "set/c/up -> ..", "set/c/self -> .", "set/c/deep/top -> {root}/set"],
        ["c/a.jpg"],
        "3 links to a folder that contains them: c/deep/top, c/self, c/up",
    ),
    "two folders that link to each other": (
        ["set/a/1.jpg", "set/b/2.jpg", "set/a/b -> ../b", "set/b/a -> ../a"],
        ["a/1.jpg", "a/b/2.jpg", "b/2.jpg", "b/a/1.jpg"],
        "2 links to a folder that contains them: a/b/a, b/a/b",
    ),
    "leftovers": (
        ["set/c/a.jpg", *(f"set/{name}" for name in LEFTOVERS)],
        ["c/a.jpg"],
        "leftovers of systems and tools: ",
    ),
    "leftovers with colons": (
        ["set/a.jpg", "set/Thumbs.db:encryptable", "set/a.jpg:Zone.Identifier", "set/b.jpg:Zone.Identifier"],
        ["a.jpg"],
        "3 leftovers of systems and tools: *:Zone.Identifier (2), Thumbs.db:encryptable (1)",
    ),
    "broken leftovers": (["set/a.jpg", "set/.#a.jpg~ -> me@host.1:2"], ["a.jpg"], "1 leftovers"),
    "other types": (
        ["set/a.jpg", "set/b.heic", "set/c.HEIC", "set/d.txt", "set/README"],
        ["a.jpg"],
        "4 files of other types: .heic (2), .txt (1), no suffix (1); .heic is an image format that is not read, "
        "convert these files to .jpg or .png",
    ),
    "raw files of cameras": (
        ["set/a.jpg", "set/b.RWL", "set/c.Nrw", "set/d.gpr"],
        ["a.jpg"],
        ".gpr, .nrw, .rwl are image formats that are not read",
    ),
    "many other types": (
        ["set/a.jpg", "set/b.nef", "set/b.jxl", *(f"set/{n}.x{n}" for n in range(9))],
        ["a.jpg"],
        "…; .jxl, .nef are image formats that are not read",
    ),
    "folder with the suffix of a file": (["set/x.jpg/a.jpg", "set/y.jpg/b.jpg"], ["x.jpg/a.jpg", "y.jpg/b.jpg"], ""),
    "names": (
        [f"set/{name}.jpg" for name in ("a::b", "a#b", "a?b", "50%", "a*", "[1]", "a\nb", "-a", ".a", "猫", "x" * 240)],
        sorted(
            f"{name}.jpg" for name in ("a::b", "a#b", "a?b", "50%", "a*", "[1]", "a\nb", "-a", ".a", "猫", "x" * 240)
        ),
        "",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_find_files_lists_folders_as_people_have_them(tmp_path, case):
    """Links are followed, loops end, leftovers are ignored, and everything else is counted and named."""
    tree, expected_names, text = FOLDERS[case]
    make_tree(tmp_path, [name.replace("{root}", str(tmp_path)) for name in tree])
    files, ignored = find_files(str(tmp_path / "set"), "images", SUFFIXES)
    assert [file.name for file in files] == expected_names
    assert text in "\n".join(ignored.describe())
    assert bool(ignored.describe()) == bool(text)
    assert all(file.size == 1 for file in files)


def test_walk_files_follows_a_linked_root(tmp_path):
    make_tree(tmp_path, ["store/a.jpg", "link -> store"])
    assert [file.name for file in walk_files(str(tmp_path / "link"))] == ["a.jpg"]


def test_walk_files_skips_pipes(tmp_path):
    make_tree(tmp_path, ["a.jpg"])
    os.mkfifo(tmp_path / "b.jpg")
    assert [file.name for file in walk_files(str(tmp_path))] == ["a.jpg"]


def test_walk_files_in_object_storage(bucket):
    """Leftovers in object storage are ignored and counted, too."""
    from bsq_ray import storage

    for name in ("c/a.jpg", "c/.DS_Store", ".ipynb_checkpoints/a.jpg"):
        storage.write_bytes(f"{bucket}/set/{name}", b"xy")
    listing = FolderListing()
    assert [(file.name, file.size) for file in walk_files(f"{bucket}/set", listing)] == [("c/a.jpg", 2)]
    assert listing.leftovers == {".DS_Store": 1, ".ipynb_checkpoints": 1}


def test_list_files_ignores_leftover_classes(tmp_path):
    """A folder that a program left behind is no class, and does not turn a flat folder into one of classes."""
    tree = make_tree(tmp_path / "flat", ["a.jpg", "b.jpg", ".thumbnails/a.jpg", "@eaDir/a.jpg"])
    assert list_files(tree, "images", SUFFIXES).classes == ("all",)
    tree = make_tree(tmp_path / "classes", ["c/a.jpg", "d/b.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/c/a.jpg"])
    listed = list_files(tree, "images", SUFFIXES)
    assert (listed.classes, listed.labels) == (("c", "d"), [0, 1])


def test_list_files_without_images_names_what_there_is(tmp_path):
    make_tree(tmp_path, ["a.heic", "b.jpg -> gone"])
    with pytest.raises(
        ValueError, match=r"contains no images .*1 files of other types: \.heic \(1\).*1 broken links: b"
    ):
        list_files(str(tmp_path), "images", SUFFIXES)


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10.png", "2.png", "1.png"], ["1.png", "2.png", "10.png"]),
        (["f10b2", "f10b10", "f9"], ["f9", "f10b2", "f10b10"]),
        (["im00002.png", "im00010.png", "im00001.png"], ["im00001.png", "im00002.png", "im00010.png"]),
        (["b", "a", "1"], ["1", "a", "b"]),
        (["frame-2-of-10", "frame-10-of-10", "frame-1-of-10"], ["frame-1-of-10", "frame-2-of-10", "frame-10-of-10"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        ([f"{n}.9999999999999999999999" for n in (3, 20, 1)], [f"{n}.9999999999999999999999" for n in (1, 3, 20)]),
    ],
)
def test_natural_key_compares_numbers(names, ordered):
    assert sorted(names, key=natural_key) == ordered


@given(st.sets(st.text("a1.0²٣-", max_size=6)))
def test_natural_key_orders_any_names(names):
    """Any names can be compared, and different names have different keys."""
    keys = [natural_key(name) for name in sorted(names, key=natural_key)]
    assert all(first < second for first, second in pairwise(keys))


def test_printable_escapes_what_terminals_cannot_show():
    assert printable("a\nb\udcfc猫\x1b") == r"a\nb\udcfc猫\x1b"


NAMES = ["Archery/a.avi", "Archery/b c.avi", "Archery/d 2.avi", "Bowling/é.avi", "Bowling/#1.avi", "Bowling/x,y.avi"]
LISTS = {
    "names": ("Archery/a.avi\nBowling/x,y.avi", [0, 5]),
    "numbers": ("Archery/a.avi 1\nBowling/x,y.avi 2", [0, 5]),
    "spaces in names": ("Archery/b c.avi\nArchery/d 2.avi", [1, 2]),
    "spaces and numbers": ("Archery/b c.avi 1\nArchery/d 2.avi 1", [1, 2]),
    "commas, tabs, semicolons": (
        "Archery/a.avi,1\nBowling/x,y.avi\t2\nArchery/b c.avi;1\nArchery/d 2.avi , 1",
        [0, 5, 1, 2],
    ),
    "class names": ("Archery/a.avi Archery\nBowling/x,y.avi,Bowling", [0, 5]),
    "line ends of Windows": ("Archery/a.avi 1\r\nBowling/x,y.avi 2\r\n", [0, 5]),
    "line ends of old Macs": ("Archery/a.avi 1\rBowling/x,y.avi 2\r", [0, 5]),
    "byte-order mark": ("\ufeffArchery/a.avi 1\n", [0]),
    "UTF-16": ("\ufeffArchery/a.avi 1\nBowling/é.avi 2\n".encode("utf-16-le"), [0, 3]),
    "UTF-16, big end first": ("Archery/a.avi 1\r\n".encode("utf-16-be"), [0]),
    "comments": ("# training\nArchery/a.avi 1 # the first\n\n   \n#\n", [0]),
    "name that looks like a comment": ("Bowling/#1.avi", [4]),
    "./": ("./Archery/a.avi 1\n././Archery//b c.avi", [0, 1]),
    "prefix": ("UCF-101/Archery/a.avi 1\nUCF-101/Bowling/#1.avi 2", [0, 4]),
    "absolute": ("/data/UCF-101/Archery/a.avi\n/data/UCF-101/Archery/b c.avi", [0, 1]),
    "backslashes": ("Archery\\a.avi 1\nArchery\\b c.avi 1", [0, 1]),
    "drive": ("D:\\sets\\UCF-101\\Archery\\a.avi 1", [0]),
    "marks and ends of other systems": (
        "Archery/a.avi 1\r\n\u200bBowling/x,y.avi 2\r\n\ufeffArchery/b c.avi 1\r\n\x1a" + "\0" * 9,
        [0, 5, 1],
    ),
    "empty cells": ("Archery/a.avi,\nArchery/b c.avi;;\nArchery/d 2.avi,1,,\nBowling/x,y.avi,2,", [0, 1, 2, 5]),
    "quotes": ("\"Archery/b c.avi\" 1\n'Archery/a.avi'", [1, 0]),
    "twice": ("Archery/a.avi\nArchery/a.avi 1\n./Archery/a.avi", [0]),
    "letters composed otherwise": (unicodedata.normalize("NFD", "Bowling/é.avi 2"), [3]),
    "spaces around": ("   Archery/a.avi   1   \n\tArchery/b c.avi", [0, 1]),
}


def write_list(tmp_path, content, name="list.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("case", LISTS)
def test_list_files_reads_lists_as_people_write_them(tmp_path, case):
    content, selected = LISTS[case]
    source = make_tree(tmp_path / "videos", NAMES)
    listed = list_files(source, "videos", (".avi",), write_list(tmp_path, content))
    assert listed.urls == [f"{source}/{NAMES[index]}" for index in selected]
    assert listed.labels == [0 if index < 3 else 1 for index in selected]


def test_list_files_name_that_is_not_utf8_is_listed(tmp_path):
    """A list in another encoding finds a file whose name has the same bytes."""
    (tmp_path / "videos").mkdir()
    with open(os.fsencode(tmp_path) + b"/videos/\xfc.avi", "wb") as file:
        file.write(b"x")
    listed = list_files(str(tmp_path / "videos"), "videos", (".avi",), write_list(tmp_path, b"\xfc.avi\n"))
    assert len(listed.urls) == 1


BAD_LISTS = {
    "missing": ("Archery/a.avi\n\nArchery/gone.avi 1", "line 3: .* has no Archery/gone.avi$"),
    "other spelling": ("archery/a.avi 1", "line 1: .* has no archery/a.avi$"),
    "two prefixes": (
        "x/Archery/a.avi\ny/Archery/b c.avi",
        "line 2: the list puts this file into the folder y, but that of line 1",
    ),
    "numbers from 0": (
        "Archery/a.avi 0",
        "line 1: Archery/a.avi has the class number 0, but its class is number 1 of 2",
    ),
    "other number": (
        "Archery/a.avi 2",
        "line 1: .*class number 2, but its class is number 1 of 2, counted from 1; copy",
    ),
    "other word": (
        "Archery/a.avi yes",
        "line 1: Archery/a.avi is followed by yes, which is not the number of its class",
    ),
    "empty": ("\n# nothing\n", "lists no files"),
    "no text": (b"\xff\xfe\x00\xd8", "list.txt is not a text file"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_list_files_rejects_lines_with_their_number(tmp_path, case):
    content, message = BAD_LISTS[case]
    with pytest.raises(ValueError, match=message):
        list_files(make_tree(tmp_path / "v", NAMES), "videos", (".avi",), write_list(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "result"),
    [
        ("1 Bowling\n2 Archery\n", ("Bowling", "Archery")),
        ("\ufeff1 Bowling\r\n2 Archery\r\n".encode(), ("Bowling", "Archery")),
        ("\ufeff1 Bowling\n2 Archery".encode("utf-16-le"), ("Bowling", "Archery")),
        ("# classes\n2\tArchery\n1\tBowling", ("Bowling", "Archery")),
        ("1,Bowling\n2: Archery\n3 Table Tennis", ("Bowling", "Archery", "Table Tennis")),
        ("0 Bowling\n1 Archery", "must number the classes from 1, .* no number 2"),
        ("1 Bowling\n3 Archery", "must number the classes from 1, .* no number 2"),
        ("1 Bowling\n1 Archery", "line 2 repeats the number or the class of an earlier line: 1 Archery"),
        ("Bowling\nArchery", "line 1 must be a class number and a class, such as `1 Archery`: Bowling"),
        ("1 Bowling\n2 archery", "does not number the class Archery"),
    ],
)
def test_list_files_reads_class_numbers(tmp_path, content, result):
    """`classInd.txt` is read as editors write it, and errors name the line."""
    write_list(tmp_path, content, "classInd.txt")
    source, split = make_tree(tmp_path / "v", NAMES), write_list(tmp_path, "Archery/a.avi")
    if isinstance(result, str):
        with pytest.raises(ValueError, match=result):
            list_files(source, "videos", (".avi",), split)
    else:
        assert list_files(source, "videos", (".avi",), split).classes == result


def test_class_lookup_finds_classes_by_all_their_names():
    assert class_lookup(["n01 tench", "n02 shark"]) == {
        "n01": 0,
        "n02": 1,
        "0": 0,
        "1": 1,
        "n01 tench": 0,
        "n02 shark": 1,
    }
    assert "traffic" not in class_lookup(["traffic light", "traffic cone"])
    assert class_lookup(["1 a", "2 b"])["1"] == 0


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_decode_text_reads_every_encoding_of_editors(text, encoding):
    assert decode_text(text.encode(encoding)).removeprefix("\ufeff") == text.removeprefix("\ufeff")


def test_read_lines_keeps_line_numbers(tmp_path):
    lines = read_lines(write_list(tmp_path, "a\r\n\r\n# b\rc"))
    assert [(line.number, line.text, line.is_comment) for line in lines] == [
        (1, "a", False),
        (3, "# b", True),
        (4, "c", False),
    ]
