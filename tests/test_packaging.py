"""Wheel and source distribution: contents, and the wheel alone in an empty environment."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USE_CORE = """
import sys
import torch
from PIL import Image
import bsq_ray
from bsq_ray import Codec, Tokenizer

folder = sys.argv[1]
tokenizer = Tokenizer.from_pretrained(folder)
tokens = tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
assert tokenizer.decode(tokens).shape == (2, 3, 32, 32)
image = Image.new("RGB", (50, 40), (200, 30, 30))
codec = Codec.from_pretrained(folder)
assert codec.decompress(codec.compress(image).data).size == image.size
optional = {"ray", "deepspeed", "lpips", "webdataset", "boto3", "pyarrow", "torchvision", "scipy", "matplotlib"}
assert not optional & set(sys.modules)
print(bsq_ray.__version__)
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(wheel, source distribution) of the working tree."""
    out = tmp_path_factory.mktemp("dist")
    # Not in the working tree: setuptools leaves build/ and *.egg-info behind.
    tree = tmp_path_factory.mktemp("tree")
    copied = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in copied.stdout.splitlines():
        if (ROOT / name).is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel], [source] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def test_version_is_that_of_the_installed_package():
    import bsq_ray

    assert bsq_ray.__version__ == version("bsq-ray")


def test_changelog_and_citation_have_the_current_version():
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_constraints_cover_every_direct_dependency():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["optional-dependencies"]
    direct = [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]
    names = {each.split(">")[0].split("[")[0].lower().replace("_", "-") for each in direct}
    assert names - pinned - {"bsq-ray"} == set()


@pytest.mark.slow
def test_wheel_contains_the_data_files_and_no_tests(distributions):
    wheel, source = distributions
    assert wheel.name.startswith(f"bsq_ray-{PROJECT['version']}-py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    expected = [path.relative_to(ROOT).as_posix() for path in (ROOT / "bsq_ray").rglob("*") if path.is_file()]
    missing = {name for name in expected if "__pycache__" not in name} - set(names)
    assert not missing
    assert all(name.startswith(("bsq_ray/", "bsq_ray-")) for name in names)
    with tarfile.open(source) as archive:
        roots = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", "bsq_ray"} <= roots


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bare_wheel_encodes_and_compresses(distributions, tmp_path):
    """A new virtual environment with the core dependencies alone."""
    from small_models import save_tokenizer

    folder = save_tokenizer(tmp_path / "model", seed=1)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(distributions[0])]
    done = subprocess.run(install, capture_output=True, text=True, env=environment)
    if done.returncode and "Could not find a version" in done.stderr:
        pytest.skip("needs a package index")
    assert done.returncode == 0, done.stderr[-2000:]
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment}
    done = subprocess.run([python, "-c", USE_CORE, folder], **run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == PROJECT["version"]
    for command in (["--help"], ["info", folder]):
        done = subprocess.run([python, "-m", "bsq_ray", *command], **run)
        assert done.returncode == 0, done.stderr[-2000:]
