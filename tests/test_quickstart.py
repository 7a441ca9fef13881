"""The quickstart: from images or clips to a report."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from bsq_ray.data.manifest import read_manifest
from bsq_ray.demos import quickstart
from bsq_ray.demos.prepare_data import CLIPS, split_by_content
from bsq_ray.demos.quickstart import run_quickstart
from bsq_ray.media.near_duplicates import near_duplicate_pairs, stack_vectors, thumbnail_vector
from bsq_ray.training import launch

_SMALL_OVERRIDES = (
    "model.image_size=32", "model.encoder.width=32", "model.encoder.layers=1", "model.encoder.heads=2",
    "model.decoder.width=32", "model.decoder.layers=1", "model.decoder.heads=2", "model.decoder.head_hidden_dim=64",
    "loss.adversarial.start_step=4", "loss.adversarial.channel_base=256", "loss.adversarial.channel_max=16",
    "training.steps=12", "training.log_every=4", "training.eval_every=6", "training.checkpoint_every=6",
)  # fmt: skip


@pytest.mark.slow
def test_quickstart_photos_write_report_and_resume(photos, tmp_path, ray_local, monkeypatch):
    """A quickstart on a photo folder writes a report, and a second call resumes it."""
    # Evaluations in worker processes are tested elsewhere, and each starts its own.
    monkeypatch.setattr(quickstart, "_EVALUATION_WORKERS", 0)
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.jpg")
    photos[0].save(folder / "copy of the first.png")
    (folder / "broken.jpg").write_text("no image")
    result = run_quickstart(folder, tmp_path / "out", minutes=5, overrides=_SMALL_OVERRIDES)
    html = result.report.read_text()
    assert "Images not seen in training" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report needs nothing from elsewhere"
    assert html.count("<svg") >= 3
    assert "training.batch" not in html
    assert "batch_size: 16" in html
    assert (result.model / "model.safetensors").exists()
    assert json.loads((tmp_path / "out/run/summary.json").read_text())["workers"] == 2
    assert Image.open(tmp_path / "out/evaluation/reconstructions.png").width > 100
    assert "mean colors" in result.summary
    assert result.summary.startswith("After 12 steps, on ")
    resumed_result = run_quickstart(folder, tmp_path / "out", minutes=5, overrides=_SMALL_OVERRIDES)
    assert resumed_result.results["model_id"] == result.results["model_id"]
    with pytest.raises(ValueError, match="was made from .*mine; choose another --out"):
        run_quickstart(None, tmp_path / "out", minutes=5)


@pytest.mark.slow
@pytest.mark.long
def test_quickstart_clips_write_report_with_animation(tmp_path, ray_local):
    """A quickstart on clips writes a report with an animation of held-out clips."""
    overrides = (*_SMALL_OVERRIDES, "training.steps=6", "training.batch_size=2", "data.clips_per_video=2")
    result = run_quickstart(None, tmp_path / "out", minutes=5, overrides=overrides, sample_set=CLIPS)
    html = result.report.read_text()
    assert "Clips not seen in training" in html
    assert "data:image/webp;base64," in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report needs nothing from elsewhere"
    assert "PSNR by position in the clip" in html
    assert "rFVD" in html
    assert "rFVD" in result.summary
    manifests = [read_manifest(str(tmp_path / "out" / "data" / side)) for side in ("train", "held_out")]
    names = [{key.split("_", 1)[1] for shard in manifest.shards for key in shard.keys} for manifest in manifests]
    assert names == [{"demo", "bikes", "bigbuckbunny"}, {"carphone_pristine", "cityCC0"}]
    with pytest.raises(ValueError, match="was made from sample clips; choose another --out for sample photos"):
        run_quickstart(None, tmp_path / "out", minutes=5)


def test_split_by_content_deduplicates_and_holds_out_fifth(photo_folders, tmp_path):
    """Copies of a file count once, and one file in five is held out."""
    files = sorted(photo_folders[0].iterdir())[:11]
    copies = [Path(shutil.copy(path, tmp_path / f"copy-{path.name}")) for path in files]
    split_by_content([*files, *copies], tmp_path / "train", tmp_path / "held_out", 5)
    sides = [{path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("train", "held_out")]
    assert [len(side) for side in sides] == [8, 3]
    assert set.union(*sides) == {path.read_bytes() for path in files}


# Functions that put something at a path that is no file to read.
UNREADABLE = {
    "nothing": lambda path: None,
    "a broken link": lambda path: path.symlink_to("gone.jpg"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a file below a file": lambda path: path.parent.joinpath("x").write_text("x"),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_split_by_content_names_what_is_no_file(photo_folders, tmp_path, capsys, make):
    """Unreadable files are named and skipped; all other files are used."""
    path = tmp_path / "caf\udce9.jpg"
    make(path)
    path = tmp_path / "x" / "y.jpg" if (tmp_path / "x").exists() else path
    files = sorted(photo_folders[0].iterdir())[:5]
    split_by_content([*files, path], tmp_path / "train", tmp_path / "held_out", 5)
    assert sum(len(list((tmp_path / side).iterdir())) for side in ("train", "held_out")) == 5
    assert f"ignored {path}: ".encode("utf-8", "backslashreplace").decode() in capsys.readouterr().err


def test_split_by_content_keeps_near_duplicates_apart(photos, tmp_path, capsys):
    """A training image is not used if it is a held-out one in another size, and it is named."""
    (tmp_path / "files").mkdir()
    for number, photo in enumerate(photos[:6]):
        photo.save(tmp_path / "files" / f"{number}.png")
        photo.resize((photo.width // 2, photo.height // 2)).save(tmp_path / "files" / f"{number}-small.jpg", quality=90)
    (tmp_path / "files" / "damaged.png").write_bytes(b"no image")
    folders = tmp_path / "train", tmp_path / "held_out"
    split_by_content(sorted((tmp_path / "files").iterdir()), *folders, 4)
    images = ((path for path in folder.iterdir() if path.stat().st_size > 100) for folder in folders)
    vectors = [
        stack_vectors(thumbnail_vector(Image.open(path).convert("RGB")) for path in paths)[0] for paths in images
    ]
    assert near_duplicate_pairs(*vectors) == []
    assert sum(len(list(folder.iterdir())) for folder in folders) < 13
    assert "not used for training, near-duplicates of held-out files: " in capsys.readouterr().err


def test_quickstart_minutes_limit_replaces_preset_steps(photos, tmp_path, ray_local, monkeypatch):
    """The minutes end the training, not the steps of the preset."""
    calls = []

    def train(run, *arguments, minutes, **more):
        calls.append((run.training.steps, minutes))
        raise launch.Interrupted("stopped")

    monkeypatch.setattr(launch, "train", train)
    (tmp_path / "mine").mkdir()
    for number, photo in enumerate(photos):
        photo.resize((64, 64)).save(tmp_path / "mine" / f"{number}.png")
    with pytest.raises(launch.Interrupted, match="Run the same quickstart again"):
        run_quickstart(tmp_path / "mine", tmp_path / "out", minutes=600)
    [(steps, minutes)] = calls
    # More than two cores compute in ten hours.
    assert minutes == 600
    assert steps > 300_000


def test_quickstart_one_clip_raises(video_folders, tmp_path):
    """A folder with a single clip raises an error."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "clip.mp4").write_bytes((video_folders[0] / "bikes.mp4").read_bytes())
    with pytest.raises(ValueError, match="contains 1 videos; the quickstart needs at least 2"):
        run_quickstart(tmp_path / "one", tmp_path / "out", minutes=1, sample_set=CLIPS)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: f / "missing", "does not exist"),
        (lambda f: (f / "empty").mkdir() or f / "empty", "contains 0 images; the quickstart needs at least 10"),
        (lambda f: (f / "file").write_text("x") and f / "file", "is not a folder"),
    ],
)
def test_quickstart_wrong_folder_raises(tmp_path, prepare, message):
    """A missing folder, an empty folder and a file raise an error."""
    with pytest.raises(ValueError, match=message):
        run_quickstart(prepare(tmp_path), tmp_path / "out", minutes=1)


def test_quickstart_unwritable_folder_raises(tmp_path):
    """An output folder that cannot be written raises an error."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write to"):
        run_quickstart(None, tmp_path / "file" / "out", minutes=1)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_quickstart_damaged_source_file_raises(tmp_path, text):
    """A damaged quickstart.json raises an error that names it."""
    (tmp_path / "quickstart.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"quickstart.json is damaged: the source of .* is unknown; choose another --out"
    ):
        run_quickstart(None, tmp_path, 1.0)
