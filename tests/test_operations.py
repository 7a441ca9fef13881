"""The pages of docs/ outside the guides name only keys, files, modules and messages that exist."""

import re
from pathlib import Path

import pytest

from bsq_ray.config.loader import STAGE_CONFIGS, list_config_keys

ROOT = Path(__file__).parents[1]
TROUBLESHOOTING = ROOT / "docs" / "operations" / "troubleshooting.md"
# Guides are checked by test_readme.py; the lab notebook and the results describe earlier versions.
FOLDERS = ("concepts", "operations", "reference")
PAGES = [
    *(page for folder in FOLDERS for page in sorted((ROOT / "docs" / folder).rglob("*.md"))),
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "cluster/README.md", "examples/README.md")),
]
# An invalid key in an example of an error message.
INVALID_KEYS = {"training.stepz"}


def page_name(page):
    return f"{page.parent.name}/{page.stem}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_documented_keys_exist_in_config(page):
    """Every configuration key that the page names exists."""
    keys = {key for schema in STAGE_CONFIGS.values() for key in list_config_keys(schema)}
    used = set(
        re.findall(r"[` ]((?:training|data|loss|model|sampling)\.[a-z_]\w*(?:\.\w+)*)(?=[`=])", page.read_text())
    )
    files = {key for key in used if key.endswith((".safetensors", ".py", ".md"))}
    assert {key for key in used - files - INVALID_KEYS if not key.startswith("training.stage_options.")} <= keys


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_documented_files_exist(page):
    """Every file that the page links or calls exists."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    pattern = r"(?<![\w/.-])([a-z_]+/[\w./-]+\.(?:py|sh|yaml|md))\b"
    for path in re.findall(pattern, text):
        if "NAME" not in path:
            assert any((base / path).exists() for base in (ROOT, ROOT / "bsq_ray", ROOT / "bsq_ray/models")), path


@pytest.mark.parametrize(
    ("message", "source"),
    [
        ("workers were lost (", "training/ray_trainer.py"),
        ("insufficient cluster capacity", "training/ray_trainer.py"),
        ("a node is draining; all steps are saved", "training/ray_trainer.py"),
        ("capacity for more workers is available; all steps are saved", "training/ray_trainer.py"),
        ("workers could not start (", "training/ray_trainer.py"),
        ("this cluster has no GPU yet, so training uses CPUs", "training/worker_resources.py"),
        ("need a GPU each, but the cluster has", "training/worker_resources.py"),
        ("no Ray cluster responds at", "runtime/ray_session.py"),
        ("nonfinite.json", "training/nonfinite.py"),
    ],
)
def test_quoted_messages_exist_in_source(message, source):
    """Every message that the troubleshooting page quotes exists in the source."""
    assert message in TROUBLESHOOTING.read_text()
    assert message in (ROOT / "bsq_ray" / source).read_text()
