"""Text files with the classes of images, as people write them.

Add a case: a row of `LABEL_FILES` (content, classes, class of each file, or message).
"""

import pytest
from foreign_shards import image_bytes, samples, write_tar

from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.pack_labels import label_names


def pack(source, label_file):
    """Pack a source; return the classes, the sorted classes of the images, and the text of the report."""
    options = PackOptions(num_workers=0, label_file=str(label_file))
    report = pack_images(str(source), f"{label_file}-packed", options)
    labels = sorted(label for shard in report.manifest.shards for label in shard.labels)
    return report.manifest.classes, labels, "\n".join(report.ignored.describe() + report.damaged_files)


ANIMALS = ("cat", "dog")
LABEL_FILES = {
    "a class per line": ("cat\ndog\ncat\n", ANIMALS, [0, 0, 1]),
    "names with spaces": ("traffic light\nbus\nbus\n", ("bus", "traffic light"), [0, 0, 1]),
    "byte-order mark": ("\ufeffcat\r\ndog\r\ncat\r\n", ANIMALS, [0, 0, 1]),
    "UTF-16": ("cat\r\ndog\r\ncat".encode("utf-16"), ANIMALS, [0, 0, 1]),
    "comments": ("# classes\ncat\n\ndog\ncat\n", ANIMALS, [0, 0, 1]),
    "CSV": ("filename,label\n0.jpg,traffic light\n1.jpg,bus\n2.jpg,bus\n", ("bus", "traffic light"), [0, 0, 1]),
    "CSV with a mark": ("\ufeff0.jpg,cat\n1.jpg,dog\n2.jpg,cat\n", ANIMALS, [0, 0, 1]),
    "quotes and semicolons": ('"0.jpg";"cat"\n"1.jpg";"dog"\n"2.jpg";"cat"', ANIMALS, [0, 0, 1]),
    "tabs and paths": ("./0.jpg\tcat\nset\\1.jpg\tdog\nset/2.jpg\tcat\n", ANIMALS, [0, 0, 1]),
    "numbers": ("0 1\n1 0\n2 0\n", ("0", "1"), [0, 0, 1]),
    "ids": ("0 1000000007\n1 5\n2 5\n", ("5", "1000000007"), [0, 0, 1]),
    "two classes": (
        "0.jpg cat\n1.jpg dog\n0.jpg dog\n2.jpg cat",
        "line 3 gives 0.jpg another class than .* line 1",
        [],
    ),
    "negative": ("0 -1\n1 0\n2 0\n", "line 1 has the class -1", []),
    "no text": (b"\xff\xfe\x00\xd8", "labels.txt is not a text file", []),
    "other files": ("a.jpg cat\n", "has 1 lines for 3 files, and names none of them", []),
    "as many other files": (
        "a.jpg cat\nb.jpg dog\nc.jpg cat\n",
        "files: it starts with a.jpg cat, but",
        [],
    ),
    "other files without suffixes": ("img_0 n01440760\nimg_1 n01440761\nimg_2 n01440760", "names none of the", []),
    "only files": ("cat/0.jpg\ndog/1.jpg\ncat/3.jpg", "names none of the files: it starts with cat/0.jpg", []),
    "synsets and words per line": ("n01 tench\nn02 shark\nn01 tench", ("n01 tench", "n02 shark"), [0, 0, 1]),
    "longer paths": ("val/a/0.jpg cat\nval/a/1.jpg dog\nval/b/2.jpg cat", ANIMALS, [0, 0, 1]),
    "two longer paths": (
        "a/0.jpg cat\nb/0.jpg dog\na/1.jpg cat\na/2.jpg cat",
        "line 2 gives 0.jpg another class than .* line 1",
        [],
    ),
    "two classes of other files": ("x/y.jpg cat\nx/y.jpg dog\n0 dog\n1 cat\n2 cat", ANIMALS, [0, 0, 1]),
    "synsets and their words": (
        "0.jpg n01440764 tench, Tinca tinca\n1.jpg n01443537 goldfish\n2.jpg n01443537 goldfish",
        ("n01440764", "n01443537"),
        [0, 1, 1],
    ),
    "more columns": ("0.jpg 2\tx\n1.jpg 0\ty\n2.jpg 2\tz", ("0", "1", "2"), [0, 2, 2]),
    "boxes": (
        '"ImageId","PredictionString"\n0,n01440764 1 2 3 4\n1,n01443537 1 2 3 5\n"2","n01443537 1 2 3 4"',
        ("n01440764", "n01443537"),
        [0, 1, 1],
    ),
}


@pytest.mark.parametrize("name", ["my photo 1", "my, photo; 1"])
@pytest.mark.parametrize("line", ["{}.jpg,cat", "{}\tcat", '"{}.jpg" cat', "{}.jpg cat", "set/{}.jpg;cat"])
def test_pack_images_label_file_names_have_spaces(tmp_path, name, line):
    """Names of files may contain what separates names from classes."""
    write_tar(tmp_path / "s.tar", [(f"{name}.jpg", image_bytes()), ("my.jpg", image_bytes(1))])
    (tmp_path / "labels.txt").write_text(f"my.jpg dog\n{line.format(name)}\n")
    assert pack(tmp_path / "s.tar", tmp_path / "labels.txt")[:2] == (ANIMALS, [0, 1])


def test_label_names_shares_labels_of_a_class(tmp_path):
    """A label file of any length has one object for each class."""
    (tmp_path / "labels.txt").write_text("".join(f"{number}.jpg {number % 2}\n" for number in range(10)))
    labels = label_names(str(tmp_path / "labels.txt"), [f"{number}.jpg" for number in range(10)])
    assert len({id(label) for label in labels}) == 2


@pytest.mark.parametrize("case", LABEL_FILES)
def test_pack_images_reads_label_files_of_editors(tmp_path, case):
    content, expected, labels = LABEL_FILES[case]
    (tmp_path / "labels.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "set").mkdir()
    for number in range(3):
        (tmp_path / "set" / f"{number}.jpg").write_bytes(image_bytes(number))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            pack(tmp_path / "set", tmp_path / "labels.txt")
    else:
        assert pack(tmp_path / "set", tmp_path / "labels.txt")[:2] == (expected, labels)


def test_pack_images_label_file_counts_in_place_of_labels_in_tars(tmp_path):
    write_tar(tmp_path / "s.tar", [*samples(2), ("n000.png", image_bytes(5, "PNG"))])
    (tmp_path / "labels.txt").write_text("n000.jpg cat\nn001.jpg dog\nn000.png dog\n")
    classes, labels, text = pack(tmp_path / "s.tar", tmp_path / "labels.txt")
    assert (classes, labels) == (("cat", "dog"), [0, 1, 1])
    assert text == "2 labels in place of which the label file counts, such as n000.cls"
