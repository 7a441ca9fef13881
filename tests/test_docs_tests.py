"""tests/README.md and the documents in the root name only files, targets and packages that exist."""

import re
from pathlib import Path

import pytest
from integration_files import INTEGRATION

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
    "tests/README.md",
    "examples/README.md",
]


def test_every_package_has_a_row():
    text = (ROOT / "tests/README.md").read_text()
    packages = [path.name for path in (ROOT / "bsq_ray").iterdir() if (path / "__init__.py").exists()]
    assert [name for name in packages if f"`bsq_ray/{name}/" not in text] == []


def test_files_of_the_test_table_exist():
    text = (ROOT / "tests/README.md").read_text()
    for path in re.findall(r"`((?:[a-z0-9_]+/)*(?:test_)?[a-z0-9_]+\.py|(?!bsq_ray)[a-z]+/)`", text):
        places = [ROOT / "tests" / path, ROOT / path, *ROOT.glob(f"bsq_ray/**/{path}")]
        assert any(place.exists() for place in places), path


def test_integration_list_names_existing_files():
    assert [path for path in INTEGRATION if not (ROOT / "tests" / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_names_links_files_and_targets_that_exist(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:bsq_ray|tests|docs|jobs|cluster)/[\w./-]+(?:\.\w+|/))`", text):
        assert "NAME" in path or (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target


def test_workflows_call_existing_targets():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for target in re.findall(r"run: make ([a-z-]+)", path.read_text()):
            assert target in targets, (path.name, target)
