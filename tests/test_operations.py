"""OPERATIONS.md and the guide to clusters name only what exists."""

import re
from pathlib import Path

import pytest

from bsq_ray.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "OPERATIONS.md", ROOT / "cluster" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_every_key_that_is_named_is_one_of_the_configuration(page):
    run = load_config("imagenet256-bsq18", []).model_dump()
    named = set(re.findall(r"`((?:training|data|loss|model)\.[a-z_0-9.]+)", page.read_text()))
    assert named
    for key in named:
        section = run
        for part in key.split("."):
            assert part in section, key
            section = section[part]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_every_file_that_is_linked_or_called_is_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"\b((?:jobs|cluster)/[\w./-]+\.(?:py|yaml|sh|md))", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("the machines do not read the same newest checkpoint", "bsq_ray/training/trainer.py"),
        ("no Ray cluster answers at", "bsq_ray/runtime/ray_session.py"),
        ("nonfinite.json", "bsq_ray/training/nonfinite.py"),
    ],
)
def test_a_message_that_is_quoted_is_one_that_is_given(words, source):
    assert words in (ROOT / "OPERATIONS.md").read_text()
    assert words in (ROOT / source).read_text()
