"""OPERATIONS.md and the guide to clusters name only what exists."""

import re
from pathlib import Path

import pytest

from bsq_ray.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "OPERATIONS.md", ROOT / "cluster" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_documented_keys_exist_in_config(page):
    """Every configuration key that the page names exists."""
    config_dict = load_config("imagenet256-bsq18", []).model_dump()
    documented_keys = set(re.findall(r"`((?:training|data|loss|model)\.[a-z_0-9.]+)", page.read_text()))
    assert documented_keys
    for key in documented_keys:
        node = config_dict
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_documented_files_exist(page):
    """Every file that the page links or calls exists."""
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
def test_quoted_messages_exist_in_source(words, source):
    """Every message that OPERATIONS.md quotes exists in the source."""
    assert words in (ROOT / "OPERATIONS.md").read_text()
    assert words in (ROOT / source).read_text()
