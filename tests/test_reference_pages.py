"""The pages in docs/reference that are generated from the code."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


@pytest.mark.integration
def test_generated_reference_pages_are_up_to_date():
    """The generated pages match the commands, schemas, presets and routes."""
    command = [sys.executable, str(REFERENCE / "generate.py"), "--check"]
    completed = subprocess.run(command, cwd=REFERENCE.parents[1], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-2000:]


@pytest.mark.parametrize("page", sorted((REFERENCE / "python-api").glob("*.md")), ids=lambda page: page.stem)
def test_python_api_page_names_existing_modules(page):
    """Every directive of the Python API names a module that can be imported."""
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
        importlib.import_module(name)
