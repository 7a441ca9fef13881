"""README, getting-started pages and guides: what they name exists, and their commands and their Python run as printed.

Long commands are shortened by overrides. Those that need a cluster, a bucket or a service are only parsed.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from bsq_ray import config
from bsq_ray.cli.main import app
from bsq_ray.shipped_models import catalog

ROOT = Path(__file__).parents[1]
# In the order in which a reader meets them: each page uses what the pages before it have made.
PAGES = [
    "docs/getting-started/install.md",
    "docs/getting-started/first-model-on-your-images.md",
    "docs/getting-started/quickstart.md",
    "README.md",
    "docs/guides/train.md",
    "docs/guides/generate.md",
    "docs/guides/compress.md",
    "docs/guides/shipped-models.md",
    "docs/guides/fine-tune.md",
    "docs/guides/video.md",
    "docs/guides/sweep.md",
    "docs/guides/plan.md",
    "docs/guides/import-reference.md",
    "docs/guides/serve.md",
    "docs/guides/cluster.md",
    "docs/guides/large-scale.md",
]
# A model of two steps reaches no quality.
PARSED_ONLY = (
    "bsq-ray quickstart",
    "bsq-ray serve",
    "import-reference",
    "--address",
    "s3://",
    "--target-lpips",
    "pretrain photo",
)
SHORTENED = {"--workers 2": "--workers 0", "jobs/sweeps/demo.yaml": "sweep.yaml"}
STEPS = {
    "tokenizer": ["training.steps=2", "training.batch_size=8", "loss.adversarial.start_step=1"],
    "masked-lm": ["training.steps=2", "training.batch_size=4", "model.layers=1", "sampling.steps=2"],
    "prior": ["training.steps=2", "training.batch_size=4", "model.layers=1"],
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def commands(page):
    """The commands of a page, one string each, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(?:^|\s+)# .*$", "", line).strip())]


def own_commands(page):
    """Arguments of `bsq-ray`, also where a job of `jobs/` calls it."""
    jobs = {"pack": ["data", "pack"], "tokenize_images": ["tokenize"], "train_masked_lm": ["train", "masked-lm"]}
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "bsq-ray":
            yield words[1:]
        elif job := re.search(r"python jobs/(\w+)\.py (.*)", command):
            yield [*jobs.get(job[1], job[1].split("_")), *shlex.split(job[2])]


def test_pages_are_complete():
    pages = [*(ROOT / "docs/getting-started").glob("*.md"), *(ROOT / "docs/guides").glob("*.md"), ROOT / "README.md"]
    assert {path.relative_to(ROOT).as_posix() for path in pages} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_page_names_presets_links_and_files_that_exist(page):
    text = (ROOT / page).read_text()
    for preset in re.findall(r"(?:`|--config )((?:imagenet|ucf)\w*-[\w-]+)", text):
        assert preset in config.preset_names(), preset
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in re.findall(r"\b((?:jobs|cluster|examples)/[\w./-]+\.(?:py|yaml|sh|md|ipynb))", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_page_names_configuration_keys_that_exist(page):
    runs = [config.load_config(name, []).model_dump() for name in ("demo-video", "masked-lm-demo", "prior-demo")]
    text = (ROOT / page).read_text()
    for key in re.findall(r"[` ]((?:training|data|loss|model|sampling)\.[a-z_0-9.]*[a-z_0-9])", text):
        assert any(_has(run, key.split(".")) for run in runs), key


def _has(section, parts):
    return not parts or (isinstance(section, dict) and parts[0] in section and _has(section[parts[0]], parts[1:]))


@pytest.mark.parametrize("page", PAGES)
def test_page_commands_parse(page):
    """Options and arguments are those of the command line."""
    for words in own_commands(page):
        command, context = typer.main.get_command(app), None
        while hasattr(command, "commands") and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        if words == ["--help"]:
            continue
        context = command.make_context("bsq-ray", words, parent=context)
        assert context.params is not None


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_pages_run_as_printed(tmp_path, photo_folders, video_folders, monkeypatch):
    """In one folder that contains photos and clips, page after page."""
    monkeypatch.chdir(tmp_path)
    inputs = {
        "photos": photo_folders[0],
        "held-out": photo_folders[1],
        "photo.png": photo_folders[1] / "coffee.png",
        "videos": video_folders[0],
        "held-out-videos": video_folders[1],
        "clip.mp4": video_folders[1] / "carphone_pristine.mp4",
        "jobs": ROOT / "jobs",
        # What the quickstart would have left.
        "quickstart/run/model": tmp_path / "runs/demo/model",
        "quickstart/photos/held_out": photo_folders[1],
    }
    for name, target in inputs.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(target)
    sweep = yaml.safe_load((ROOT / "jobs/sweeps/demo.yaml").read_text())
    sweep["space"] = {"model.quantizer.bits": {"values": [6]}}
    sweep["budget"] |= {"steps": 2}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    num_run = 0
    for page in PAGES:
        for command in commands(page):
            if command.startswith("bsq-ray ") and is_runnable(command):
                run_shortened(command)
                num_run += 1
        for number, python in enumerate(blocks(page, "python")):
            exec(compile(python, f"{page}, block {number}", "exec"), {})
    assert num_run >= 20


def is_runnable(command):
    """Commands that need a shipped model run in versions that ship it."""
    uses_default = re.match(r"bsq-ray (compress|decompress|reconstruct) (?!.*--model)", command)
    if (uses_default or "--model photo" in command) and catalog.find_shipped_model(catalog.DEFAULT_CODEC) is None:
        return False
    return not any(words in command for words in PARSED_ONLY)


def run_shortened(command):
    for long, short in SHORTENED.items():
        command = command.replace(long, short)
    words = shlex.split(command)[1:]
    if words[0] == "train":
        words += STEPS[words[1]]
    done = subprocess.run([sys.executable, "-m", "bsq_ray", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (command, done.stderr[-2000:])
