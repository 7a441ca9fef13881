"""The quickstart: from photographs or clips to a report."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from bsq_ray.data.manifest import read_manifest
from bsq_ray.demos.quickstart import CLIPS, run_quickstart, split_by_content
from bsq_ray.training import launch

_SMALL = (
    "model.image_size=32", "model.encoder.width=32", "model.encoder.layers=1", "model.encoder.heads=2",
    "model.decoder.width=32", "model.decoder.layers=1", "model.decoder.heads=2", "model.decoder.head_width=64",
    "loss.adversarial.start_step=4", "loss.adversarial.channel_base=256", "loss.adversarial.channel_max=16",
    "training.steps=12", "training.log_every=4", "training.evaluate_every=6", "training.checkpoint_every=6",
)  # fmt: skip


@pytest.mark.slow
def test_own_photographs_end_in_a_report_and_a_second_call_goes_on(photos, tmp_path, ray_local):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.jpg")
    photos[0].save(folder / "copy of the first.png")
    (folder / "broken.jpg").write_text("no image")
    done = run_quickstart(folder, tmp_path / "out", minutes=5, overrides=_SMALL)
    html = done.report.read_text()
    assert "Images it has never seen" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report needs nothing from elsewhere"
    assert html.count("<svg") >= 3
    assert "training.batch" not in html
    assert "batch_size: 16" in html
    assert (done.model / "model.safetensors").exists()
    assert json.loads((tmp_path / "out/run/summary.json").read_text())["workers"] == 2
    assert Image.open(tmp_path / "out/evaluation/reconstructions.png").width > 100
    assert "mean colours" in done.summary
    again = run_quickstart(folder, tmp_path / "out", minutes=5, overrides=_SMALL)
    assert again.results["model_id"] == done.results["model_id"]
    with pytest.raises(ValueError, match="was made from .*mine; choose another --out"):
        run_quickstart(None, tmp_path / "out", minutes=5)


@pytest.mark.slow
@pytest.mark.long
def test_clips_end_in_a_report_with_an_animation_of_clips_from_another_file(tmp_path, ray_local):
    small = (*_SMALL, "training.steps=6", "training.batch_size=2", "data.clips_per_video=2")
    done = run_quickstart(None, tmp_path / "out", minutes=5, overrides=small, material=CLIPS)
    html = done.report.read_text()
    assert "Clips it has never seen" in html
    assert "data:image/webp;base64," in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report needs nothing from elsewhere"
    assert "PSNR by place in the clip" in html
    assert "rFVD" in html
    assert "rFVD" in done.summary
    manifests = [read_manifest(str(tmp_path / "out" / "data" / side)) for side in ("train", "held_out")]
    names = [{key.split("_", 1)[1] for shard in manifest.shards for key in shard.keys} for manifest in manifests]
    assert names == [{"demo", "bikes", "bigbuckbunny"}, {"carphone_pristine", "cityCC0"}]
    with pytest.raises(ValueError, match="was made from sample clips; choose another --out for sample photographs"):
        run_quickstart(None, tmp_path / "out", minutes=5)


def test_copies_of_a_file_count_once_and_one_file_in_five_is_held_out(photo_folders, tmp_path):
    found = sorted(photo_folders[0].iterdir())[:11]
    copies = [Path(shutil.copy(path, tmp_path / f"copy-{path.name}")) for path in found]
    split_by_content([*found, *copies], tmp_path / "train", tmp_path / "held_out", 5)
    sides = [{path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("train", "held_out")]
    assert [len(side) for side in sides] == [8, 3]
    assert set.union(*sides) == {path.read_bytes() for path in found}


def test_the_minutes_and_not_the_steps_of_the_preset_end_it(photos, tmp_path, ray_local, monkeypatch):
    asked = []

    def train(run, *arguments, minutes, **more):
        asked.append((run.training.steps, minutes))
        raise launch.Interrupted("stopped")

    monkeypatch.setattr(launch, "train", train)
    (tmp_path / "mine").mkdir()
    for number, photo in enumerate(photos):
        photo.resize((64, 64)).save(tmp_path / "mine" / f"{number}.png")
    with pytest.raises(launch.Interrupted, match="Run the same quickstart again"):
        run_quickstart(tmp_path / "mine", tmp_path / "out", minutes=600)
    [(steps, minutes)] = asked
    # More than two cores could take in ten hours.
    assert minutes == 600
    assert steps > 300_000


def test_a_folder_with_one_clip_is_too_little(video_folders, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "clip.mp4").write_bytes((video_folders[0] / "bikes.mp4").read_bytes())
    with pytest.raises(ValueError, match="holds 1 videos; the quickstart needs at least 2"):
        run_quickstart(tmp_path / "one", tmp_path / "out", minutes=1, material=CLIPS)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: f / "missing", "does not exist"),
        (lambda f: (f / "empty").mkdir() or f / "empty", "holds 0 images; the quickstart needs at least 10"),
        (lambda f: (f / "file").write_text("x") and f / "file", "is not a folder"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, prepare, message):
    with pytest.raises(ValueError, match=message):
        run_quickstart(prepare(tmp_path), tmp_path / "out", minutes=1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write to"):
        run_quickstart(None, tmp_path / "file" / "out", minutes=1)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_note_of_what_a_folder_was_made_from_is_named(tmp_path, text):
    (tmp_path / "quickstart.json").write_text(text)
    with pytest.raises(ValueError, match=r"quickstart.json is damaged and does not say what .*; choose another --out"):
        run_quickstart(None, tmp_path, 1.0)
