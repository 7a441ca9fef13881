"""The vocabulary of the repository, and the checker itself."""

import pytest
from vocabulary import check_python, check_repository, check_text


def words(text):
    return [hit.word for hit in check_text(text, "page.md")]


@pytest.mark.integration
def test_repository_has_no_dialect():
    hits = [f"{hit.path}:{hit.line}: {hit.word}: {hit.instead}" for hit in check_repository()]
    assert not hits, f"{len(hits)} words to replace, among them\n" + "\n".join(hits[:50])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("The run tells its head how it goes on.", ["tells", "goes on"]),
        ("classes_told = 3", ["told"]),
        ("class ResizeWish(Exception):", ["wish"]),
        ("A picture of the same colour", ["picture", "colour"]),
        ("def normalise(quantiser): ...", ["normalise", "quantiser"]),
        ("images that are drawn from the model", ["drawn"]),
        ("left in vain", ["in vain"]),
    ],
)
def test_check_text_dialect_is_found(line, expected):
    assert words(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "study.tell(trial, value) after study.ask()",
        "retried when the connection is refused: ConnectionRefusedError",
        "offsets drawn uniformly from [0, 1)",
        "a foretold headroom in the mushroom",
        '<section aria-labelledby="compare">',
        "noise is raised with a promise, with emphasis on otherwise precise analysis",
    ],
)
def test_check_text_standard_senses_pass(line):
    assert words(line) == []


def test_check_python_docstring_with_relative_opener_is_found():
    source = 'def length(self):\n    """How long it is."""\n\ndef size(self):\n    """Return the size in bytes."""\n'
    assert [(hit.line, hit.word) for hit in check_python(source, "module.py")] == [(2, '"""How')]


def test_check_python_participle_as_name_is_found():
    source = "wanted = [1]\nfor shown in wanted:\n    print(shown)\ndef f(told): return told\n"
    assert sorted(hit.word for hit in check_python(source, "module.py")) == ["shown", "told", "wanted"]
