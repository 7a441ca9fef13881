"""The README's commands and its Python run as printed, shrunk by overrides where they would take hours."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bsq_ray import config

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()
_SHRUNK = {
    "imagenet256-bsq18": "demo",
    "--workers 16": "--workers 0",
    "--workers 2": "--workers 0",
    "jobs/sweeps/demo.yaml": "sweep.yaml",
}
_STEPS = ["training.steps=2", "training.batch_size=4", "loss.adversarial.start_step=1"]

_LM_STEPS = ["training.steps=2", "training.batch_size=4", "model.layers=1", "sampling.steps=2"]
_PRIOR_STEPS = ["training.steps=2", "training.batch_size=4", "model.layers=1"]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", _README, re.S)


def readme_commands():
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("bsq-ray ")]


def test_readme_presets_and_links_exist():
    """Every preset and file that the README names exists."""
    for preset in re.findall(r"`(imagenet[\w-]+)`", _README):
        assert preset in config.preset_names(), preset
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", _README):
        assert (_ROOT / path).exists(), path


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_readme_commands_run_as_printed(tmp_path, photo_folders, video_folders, monkeypatch):
    """In the order of the README, in one folder that holds photographs and clips."""
    (tmp_path / "videos").symlink_to(video_folders[0])
    (tmp_path / "held-out-videos").symlink_to(video_folders[1])
    (tmp_path / "clip.mp4").symlink_to(video_folders[1] / "carphone_pristine.mp4")
    (tmp_path / "photos").symlink_to(photo_folders[0])
    (tmp_path / "held-out").symlink_to(photo_folders[1])
    (tmp_path / "photo.png").symlink_to(photo_folders[1] / "coffee.png")
    sweep = yaml.safe_load((_ROOT / "jobs/sweeps/demo.yaml").read_text())
    sweep["space"] = {"model.quantizer.bits": {"values": [6]}}
    sweep["budget"] |= {"steps": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    num_commands = 0
    for command in readme_commands():
        if any(word in command for word in ("quickstart", "--address", "import-reference", "s3://", "bsq-ray serve")):
            continue
        for long, short in _SHRUNK.items():
            command = command.replace(long, short)
        words = shlex.split(command)[1:]
        if words[0] == "train":
            words += {"tokenizer": _STEPS, "masked-lm": _LM_STEPS, "prior": _PRIOR_STEPS}[words[1]]
        done = subprocess.run(
            [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr[-2000:])
        num_commands += 1
    assert num_commands >= 12
    monkeypatch.chdir(tmp_path)
    [python] = code_blocks("python")
    exec(compile(python, "README.md", "exec"), {})
