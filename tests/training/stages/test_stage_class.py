"""`training.stage_class`: a stage outside the package trains and exports like those of the package."""

import pytest
import torch
import torch.nn.functional as F
from small_runs import RecordingReporter, local_worker, small_spec

from bsq_ray import Tokenizer
from bsq_ray.config import load_config
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.training.stages import Stage, find_stage_class
from bsq_ray.training.stages.stage import PhaseOutput
from bsq_ray.training.trainer import run_training

SCALED_STAGE = f"{__name__}:ScaledStage"


class ScaledStage(Stage):
    """Trains a tokenizer with a scaled L2 loss."""

    def __init__(self, run_config, source, device, scale=1.0):
        self.scale = scale
        self.modules = {"tokenizer": Tokenizer(run_config.model).to(device)}

    def phases(self, step):
        return ["tokenizer"]

    def loss(self, phase, batch, engines, context, step):
        images_BCHW = to_float(batch.values_B)
        loss = self.scale * F.mse_loss(engines[phase](images_BCHW).images, images_BCHW)
        return PhaseOutput(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def evaluate(self, batch, engines):
        return {"scale": self.scale}, to_uint8(engines["tokenizer"](to_float(batch.values_B)).images[0])

    def pop_metrics(self):
        return {}


def train(shards, out, *overrides):
    reporter = RecordingReporter()
    spec = small_spec(shards, out, ["training.engine.kind=ddp", *overrides])
    return run_training(spec, local_worker(reporter)), reporter.training_records


def test_own_stage_trains_and_exports_its_model(photo_shards, tmp_path):
    """The stage receives its options, its loss is recorded, and its first module is the exported model."""
    losses = {}
    for scale in (1.0, 8.0):
        overrides = [f"training.stage_class={SCALED_STAGE}", f"training.stage_options.scale={scale}"]
        result, records = train(photo_shards, tmp_path / str(scale), *overrides)
        assert result.metrics == {"train/scale": scale}
        losses[scale] = records[0]["loss"]
        Tokenizer.from_pretrained(str(tmp_path / str(scale) / "model"))
    assert losses[8.0] == pytest.approx(8 * losses[1.0], rel=1e-5)
    with pytest.raises(ValueError, match=r"training\.stage_class was '.*:ScaledStage' and is None"):
        train(photo_shards, tmp_path / "1.0")


@pytest.mark.parametrize(
    ("stage_class", "options", "message"),
    [
        ("ScaledStage", "{}", "'ScaledStage' is malformed; write module:Class"),
        (":ScaledStage", "{}", "malformed"),
        ("no_such_package:ScaledStage", "{}", "No module named 'no_such_package'.* PYTHONPATH"),
        (f"{__name__}:NoStage", "{}", "has no attribute 'NoStage'"),
        (f"{__name__}:SCALED_STAGE", "{}", r"is not a subclass of bsq_ray\.training\.stages\.Stage"),
        ("collections:OrderedDict", "{}", "is not a subclass"),
        (SCALED_STAGE, "{size: 3}", "training.stage_options: .* unexpected keyword argument 'size'"),
        (SCALED_STAGE, "{source: 3}", "training.stage_options: .* multiple values for argument 'source'"),
    ],
)
def test_find_stage_class_invalid_name_or_option_raises(stage_class, options, message):
    """The error names the key and what is wrong with it."""
    overrides = [f"training.stage_class='{stage_class}'", f"training.stage_options={options}"]
    with pytest.raises(ValueError, match=message):
        find_stage_class(load_config("demo-gan", overrides))
