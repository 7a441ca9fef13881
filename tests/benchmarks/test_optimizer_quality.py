"""AdamW against Muon: quality of the demo models, three seeds of each; models of tokens after equal times.

Numbers of steps are fixed, so that other programs on the machine do not matter: a step with Muon takes longer by the
factor in docs/results/muon-cost-cpu.json. Single-threaded, so that two of these tests can run at once on two cores.
"""

import json
import statistics

import pytest
from seed_quality import SEEDS, clip_quality

from bsq_ray.config import load_config
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.tokenize import tokenize
from bsq_ray.demos.prepare_data import PHOTOS
from bsq_ray.samples.labeled_photos import collect_labeled_photos
from bsq_ray.training.launch import train

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("single_thread"), pytest.mark.timeout(7200)]
TOKENIZER_STEPS, NUM_CROPS, CROP_SCALE = 400, 12, 1.25
# Muon needs whole matrices, AdamW is compared with the same engine.
COMMON = ("training.engine.kind=ddp", "training.eval_every=1000000", "training.sample_every=1000000")
MUON = ("training.optimizer.kind=muon",)
TOKEN_WARMUP = "training.schedule.warmup_steps=30"
TOKEN_STEPS = {
    "masked-lm-demo": {"adamw": 230, "muon": 200},
    "prior-demo": {"adamw": 345, "muon": 300},
}
# Learning rates of the matrices are two times those of AdamW, three times for videos.
TOKEN_SETTINGS = {
    "adamw": ("training.optimizer.kind=adamw",),
    "muon": (*MUON, "training.optimizer.muon.base_learning_rate=8e-3"),
}
# The GAN starts at half of the steps.
VIDEO_GAN = "loss.adversarial.start_step=60"
VIDEO_STEPS = {"adamw": 120, "muon": 100}
VIDEO_MUON = (*MUON, "training.optimizer.muon.base_learning_rate=0.192", "training.optimizer.muon.ns_steps=3")
VIDEO_SETTINGS = {"adamw": (), "muon": VIDEO_MUON}


@pytest.fixture(scope="module")
def token_tables(single_thread, tmp_path_factory):
    """URLs of the tokens of labeled photos, by split, and the number of their classes."""
    out = tmp_path_factory.mktemp("tokens")
    folders = dict(zip(("train", "held_out"), collect_labeled_photos(out / "photos", out / "packages"), strict=True))
    shards, tables = {}, {}
    for split, folder in folders.items():
        shards[split] = str(out / "shards" / split)
        pack_images(str(folder), shards[split], PackOptions(max_side=PHOTOS.max_side, num_workers=0))
    run_config = load_config("demo", [f"training.steps={TOKENIZER_STEPS}", "training.eval_every=1000000"])
    train(run_config, shards["train"], str(out / "tokenizer"), 0)
    for split, num_crops in (("train", NUM_CROPS), ("held_out", 1)):
        tables[split] = str(out / "tables" / split)
        model = str(out / "tokenizer" / "model")
        tokenize(model, shards[split], tables[split], num_workers=0, num_crops=num_crops, scale=CROP_SCALE, flip=True)
    return tables, len(list(folders["train"].iterdir()))


@pytest.mark.parametrize("setting", list(TOKEN_SETTINGS))
@pytest.mark.parametrize("preset", ["masked-lm-demo", "prior-demo"])
def test_token_model_optimizers(preset, setting, token_tables, tmp_path, record):
    """Held-out bits per token."""
    tables, num_classes = token_tables
    num_steps = TOKEN_STEPS[preset][setting]
    overrides = [*COMMON, *TOKEN_SETTINGS[setting], TOKEN_WARMUP, f"training.steps={num_steps}"]
    if preset == "masked-lm-demo":
        overrides.append(f"model.num_classes={num_classes}")
    bits = []
    for seed in SEEDS:
        out = tmp_path / str(seed)
        run_config = load_config(preset, [*overrides, f"training.seed={seed}"])
        train(run_config, tables["train"], str(out), 0, held_out_url=tables["held_out"])
        summary = json.loads((out / "summary.json").read_text())
        bits.append(summary["metrics"]["held_out/bits_per_token"])
    record(
        "optimizer-quality-cpu",
        f"{preset}-{setting}",
        steps=num_steps,
        bits_per_token=statistics.mean(bits),
        bits_per_token_min=min(bits),
        bits_per_token_max=max(bits),
    )


@pytest.mark.parametrize("setting", list(VIDEO_SETTINGS))
def test_video_tokenizer_optimizers(setting, video_folders, tmp_path, record):
    """Held-out PSNR and LPIPS of `demo-video`."""
    num_steps = VIDEO_STEPS[setting]
    overrides = [*COMMON, *VIDEO_SETTINGS[setting], VIDEO_GAN, f"training.steps={num_steps}"]
    columns = clip_quality("demo-video", overrides, video_folders, tmp_path)
    record("video-optimizer-quality-cpu", setting, steps=num_steps, **columns)
