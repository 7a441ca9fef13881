"""The first steps after --init never destroy the model."""

import pytest
from small_runs import RecordingReporter, local_worker

from bsq_ray.config import load_config
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.trainer import run_training

SMALL = [
    "model.image_size=32",
    *(f"model.{part}.{size}" for part in ("encoder", "decoder") for size in ("width=64", "layers=2", "heads=2")),
    "model.decoder.head_hidden_dim=128",
    "loss.adversarial.start_step=0",
    "loss.adversarial.channel_base=128",
    "loss.adversarial.channel_max=8",
    "loss.adversarial.r1_every=16",
    "training.engine.kind=ddp",
    "training.sample_every=1000",
    "training.checkpoint_every=1000",
]
FINE_TUNED = ["training.steps=100", "training.eval_every=10", "training.optimizer.base_learning_rate=3.2e-3"]


def held_out_losses(shards, held_out, out, overrides, init_url=None):
    """Train, and return the perceptual loss on held-out photos at every evaluation."""
    reporter = RecordingReporter()
    run_config = load_config("demo-gan", [*SMALL, *overrides])
    run_training(RunSpec(run_config, shards, str(out), held_out, init_url=init_url), local_worker(reporter))
    return [record["held_out/perceptual"] for record in reporter.records if record["kind"] == "evaluation"]


@pytest.fixture(scope="module")
def base(photo_shards, held_out_shards, tmp_path_factory):
    """(model folder, perceptual loss): trained with a GAN until the loss has fallen."""
    out = tmp_path_factory.mktemp("base")
    losses = held_out_losses(photo_shards, held_out_shards, out, ["training.steps=200", "training.eval_every=200"])
    assert losses[-1] < 0.8 * losses[0]
    return f"{out}/model", losses[-1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("overrides", [[], ["training.only=decoder"]], ids=["everything", "decoder"])
def test_first_100_steps_after_init_keep_perceptual_loss(base, photo_shards, held_out_shards, tmp_path, overrides):
    """Held-out LPIPS is never more than 10 % above that of the first model, with the discriminator of its run."""
    url, first_loss = base
    losses = held_out_losses(photo_shards, held_out_shards, tmp_path, [*FINE_TUNED, *overrides], url)
    assert losses[0] == pytest.approx(first_loss, rel=1e-3)
    assert len(losses) == 11
    assert max(losses) <= 1.1 * first_loss
