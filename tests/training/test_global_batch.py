"""Training does not depend on how the global batch is split: one worker, two workers, accumulated micro batches.

The shipped presets are compared with nothing changed but their size, so whatever they turn on must be exact.
"""

from itertools import islice

import numpy as np
import pytest
import torch
from process_group import spawn_group
from small_runs import RecordingReporter

from bsq_ray.config import load_config
from bsq_ray.config.batch_split import split_batch, valid_world_sizes
from bsq_ray.data.stream import training_batches
from bsq_ray.data.token_table import TokenTable, TokenTableInfo, write_part, write_table
from bsq_ray.losses.adversarial import adaptive_weight
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.scalar_means import ScalarMeans
from bsq_ray.training.trainer import Trainer
from bsq_ray.training.worker_context import WorkerContext

BATCH, LEARNING_RATE, STEPS = 16, 3e-4, 2
ALL = [
    f"training.batch_size={BATCH}",
    "training.engine.precision=fp32",
    "training.engine.kind=ddp",
    "data.interleave=4",
    "data.shuffle_block_size=32",
]
IMAGES = [
    "model.image_size=16",
    "model.patch_size=4",
    *(f"model.{part}.{size}" for part in ("encoder", "decoder") for size in ("width=16", "layers=1", "heads=2")),
    "model.decoder.head_hidden_dim=32",
    "model.gradient_checkpointing=false",
    # LPIPS is a mean over images, and its network takes most of the time.
    "loss.perceptual_weight=0",
    "loss.adversarial.start_step=0",
    "loss.adversarial.channel_base=128",
    "loss.adversarial.channel_max=8",
    "loss.adversarial.r1_every=2",
]
# Share of the weights whose gradients are near zero.
MAX_SHARE_NEAR_ZERO = 5e-4
# Dropout draws other random numbers on every worker.
TOKENS = ["model.width=16", "model.layers=1", "model.heads=2", "model.dropout=0", "model.grid=[1, 4, 4]"]
# The last feature map of AlexNet has 2 x 2 positions.
FEATURES = [*IMAGES, "model.image_size=48", "model.patch_size=16"]
TEXTURE = [*IMAGES, "loss.perceptual_weight=0.1", "loss.perceptual_network=vgg", "loss.gram_weight=10"]
# By name: preset and overrides.
CASES = {
    "imagenet128-bsq18": ("imagenet128-bsq18", IMAGES),
    "imagenet128-bsq18-group9": ("imagenet128-bsq18-group9", IMAGES),
    "imagenet128-lfq18": ("imagenet128-lfq18", IMAGES),
    "imagenet128-vq10": ("imagenet128-vq10", IMAGES),
    "demo-gan": ("demo-gan", IMAGES),
    "demo-features": ("demo-features", FEATURES),
    "demo-features with R1": ("demo-features", [*FEATURES, "loss.adversarial.r1_gamma=1"]),
    "demo-nested": ("demo-nested", IMAGES),
    "demo-any-size": ("demo-any-size", [*IMAGES, "model.attention_radius=2"]),
    "bit noise": ("imagenet128-bsq18", [*IMAGES, "training.bit_noise.images=0.6", "training.bit_noise.rate=0.3"]),
    "texture loss": ("imagenet128-bsq18-no-gan", TEXTURE),
    "imagenet128-masked-lm": ("imagenet128-masked-lm", [*TOKENS, "model.num_classes=3"]),
    "imagenet128-prior": ("imagenet128-prior", TOKENS),
}


def token_table(folder):
    """Write random tokens."""
    rng = np.random.default_rng(0)
    info = TokenTableInfo("tokenizer", 18, (1, 4, 4), ("a", "b", "c"), 1, "random")
    keys = [f"{index}" for index in range(64)]
    packed = rng.integers(0, 256, (64, info.row_bytes), dtype=np.uint8)
    write_part(f"{folder}/part-0.parquet", info, keys, rng.integers(0, 3, 64), np.zeros(64, np.int16), packed)
    write_table(TokenTable(str(folder), info, (("part-0.parquet", 64, "0"),)))
    return str(folder)


def train_all(rank, world_size, urls, out, overrides):
    """Take a few steps of every case; return losses and weights of each."""
    results = {}
    for name, (preset, small) in CASES.items():
        run_config = load_config(preset, [*small, *ALL, *overrides])
        url = urls[run_config.stage == "tokenizer"]
        worker = WorkerContext(rank, world_size, torch.device("cpu"), "local", RecordingReporter())
        trainer = Trainer(RunSpec(run_config, url, f"{out}/{name}"), worker)
        batches = training_batches(
            trainer.source, run_config.data, batch_size=BATCH, rank=rank, world_size=world_size, seed=0
        )
        scalars = ScalarMeans()
        for trainer.step, batch in enumerate(islice(batches, STEPS)):
            trainer.train_step(batch, LEARNING_RATE, scalars)
        batches.close()
        weights = {
            f"{module}.{key}": value.numpy()
            for module, engine in trainer.engines.items()
            for key, value in engine.module.state_dict().items()
        }
        results[name] = scalars.pop(), weights
    return results


@pytest.fixture(scope="module")
def runs(photo_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("split")
    urls = {True: photo_shards, False: token_table(out / "tokens")}
    accumulated = ["training.micro_batch_size=4"]
    torch.manual_seed(0)
    return {
        "one worker": train_all(0, 1, urls, out / "one", []),
        "two workers": spawn_group(2, train_all, urls, str(out / "two"), [])[0],
        "four micro batches": train_all(0, 1, urls, out / "accumulated", accumulated),
        "two workers, two micro batches": spawn_group(2, train_all, urls, str(out / "both"), accumulated)[0],
    }


@pytest.mark.parametrize("split", ["two workers", "four micro batches", "two workers, two micro batches"])
@pytest.mark.parametrize("case", CASES)
def test_preset_takes_same_steps_for_any_split(runs, case, split):
    """Weights after two steps, and norms of all gradients, are those of one worker with the whole batch."""
    expected_scalars, expected = runs["one worker"][case]
    scalars, weights = runs[split][case]
    differs = {key: ~np.isclose(weights[key], expected[key], rtol=1e-7, atol=1e-6) for key in weights}
    # AdamW divides a gradient by its size: in the features of a whole network, rounding shows in those near zero.
    max_share = MAX_SHARE_NEAR_ZERO if case.startswith("demo-features") else 0
    different = {key: int(each.sum()) for key, each in differs.items() if each.any()}
    assert sum(different.values()) <= max_share * sum(each.size for each in differs.values()), different
    for key in (key for key in scalars if key.startswith("grad_norm/")):
        assert scalars[key] == pytest.approx(expected_scalars[key], rel=1e-5), key


def images_config(*overrides):
    return load_config("imagenet128-bsq18", [*IMAGES, *ALL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "world_size", "reason"),
    [
        ([], 8, r"micro batches of 2 samples give .* groups of 2 .* 16 gives groups of 4.*stddev_group_size=2"),
        (["training.micro_batch_size=1"], 2, "micro batches of 1 samples give .* groups of 1"),
        (["loss.adversarial.discriminator=stylegan2-3d", "model.frames=4"], 16, "micro batches of 1 samples"),
        (
            ["loss.adversarial.discriminator=features", "model.image_size=32", "training.micro_batch_size=1"],
            2,
            "micro batches of 1 samples give the discriminator groups of 1 for its batch norm, and the whole batch",
        ),
        (["loss.adversarial.adaptive_weight=true", "training.micro_batch_size=4"], 2, "adaptive_weight compares .*"),
    ],
)
def test_split_that_changes_adversarial_loss_is_rejected(overrides, world_size, reason):
    """A split with other discriminator groups, or other gradient ratios, is rejected before the run starts."""
    with pytest.raises(ValueError, match=reason):
        split_batch(images_config(*overrides), world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 4),
        (["loss.adversarial.stddev_group_size=2"], 8),
        (["loss.adversarial.weight=0"], 16),
        (["loss.adversarial.discriminator=patchgan", "model.image_size=32"], 16),
        # Frames of one clip form the groups.
        (["model.frames=4"], 16),
        (["training.batch_size=6"], 2),
        (["training.batch_size=2"], 1),
    ],
)
def test_split_with_same_groups_is_accepted(overrides, world_size):
    split_batch(images_config(*overrides), world_size)


def test_elastic_sizes_skip_those_with_other_groups():
    assert valid_world_sizes(images_config(), 1, 4) == [1, 2, 4]
    assert valid_world_sizes(images_config("training.batch_size=12"), 1, 3) == [1, 3]


def ratio_of_halves(rank, world_size, x, y):
    weight = torch.ones(3, requires_grad=True)
    share = slice(rank, None, world_size)
    losses = [(part[share] @ weight).square().mean() for part in (x, y)]
    return float(adaptive_weight(*losses, weight))


def test_adaptive_weight_on_two_workers_is_of_whole_batch():
    """The ratio of gradient norms is that of the whole batch, not the mean of the workers' ratios."""
    x, y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    assert spawn_group(2, ratio_of_halves, x, y) == pytest.approx([ratio_of_halves(0, 1, x, y)] * 2, rel=1e-5)
