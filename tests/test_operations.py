"""The pages for operators name only keys, files and messages that exist."""

import re
from pathlib import Path

import pytest

from bsq_ray.config import load_config

ROOT = Path(__file__).parents[1]
TROUBLESHOOTING = ROOT / "docs" / "operations" / "troubleshooting.md"
PAGES = [TROUBLESHOOTING, ROOT / "cluster" / "README.md"]


def page_name(page):
    return f"{page.parent.name}/{page.stem}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_documented_keys_exist_in_config(page):
    """Every configuration key that the page names exists."""
    config_dict = load_config("imagenet256-bsq18", []).model_dump()
    for key in set(re.findall(r"`((?:training|data|loss|model)\.[a-z_0-9.]+)", page.read_text())):
        node = config_dict
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_documented_files_exist(page):
    """Every file that the page links or calls exists."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(?<![\w/.])((?:jobs|cluster)/[\w./-]+\.(?:py|yaml|sh|md))", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("message", "source"),
    [
        ("workers were lost (", "training/ray_trainer.py"),
        ("insufficient cluster capacity", "training/ray_trainer.py"),
        ("a node is draining; all steps are saved", "training/ray_trainer.py"),
        ("capacity for more workers is available; all steps are saved", "training/ray_trainer.py"),
        ("workers could not start (", "training/ray_trainer.py"),
        ("no GPU is up on this cluster, so training uses CPUs", "training/worker_resources.py"),
        ("need a GPU each, but the cluster has", "training/worker_resources.py"),
        ("no Ray cluster answers at", "runtime/ray_session.py"),
        ("nonfinite.json", "training/nonfinite.py"),
    ],
)
def test_quoted_messages_exist_in_source(message, source):
    """Every message that the troubleshooting page quotes exists in the source."""
    assert message in TROUBLESHOOTING.read_text()
    assert message in (ROOT / "bsq_ray" / source).read_text()
