"""Thirty training steps of the published code, and the same steps of the training loop.

tests/golden/README.md describes the files.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import yaml
from safetensors import safe_open
from small_runs import RecordingReporter

from bsq_ray.config import load_config
from bsq_ray.data.data_source import Batch
from bsq_ray.import_bsq_vit import import_bsq_vit
from bsq_ray.training import trainer as trainer_module
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.scalar_means import ScalarMeans
from bsq_ray.training.worker_context import WorkerContext

GOLDEN = Path(__file__).parent.parent / "golden"
# Names of the published scalars, and ours.
SCALARS = {
    "total": "loss",
    "reconstruction": "reconstruction",
    "perceptual": "perceptual",
    "generator": "loss/generator",
    "quantizer": "quantizer",
    "discriminator": "loss/discriminator",
    "r1": "r1",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
    "gradient_generator": "grad_norm/generator",
    "gradient_discriminator": "grad_norm/discriminator",
}


def load_case(name):
    """Return the hyper-parameters and the tensors of a case."""
    path = GOLDEN / f"trajectory-{name}.safetensors"
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
    return case, safetensors.torch.load_file(path)


def config_values(case):
    """Return the configuration of a case, as the content of a file."""
    transformer = {"width": case["width"], "layers": case["layers"], "heads": case["heads"]}
    return {
        "base": "imagenet128-bsq18",
        "name": "published-steps",
        "model": {
            "image_size": case["image_size"],
            "patch_size": case["patch_size"],
            "encoder": transformer,
            "decoder": {**transformer, "head_hidden_dim": case["head_width"]},
            "quantizer": {
                "entropy": {"estimate": case["estimate"], "group_size": case["group_size"]},
                "commitment_weight": case["commit_weight"],
            },
        },
        "loss": {
            "perceptual_weight": case["perceptual_weight"],
            "clamp_reconstruction": case["clamp"] is not None,
            "quantizer_weight": case["quantizer_weight"],
            "quantizer_weight_start_factor": case["quantizer_ramp_from"],
            "quantizer_weight_ramp_steps": case["quantizer_ramp_steps"],
            "adversarial": {
                "weight": case["generator_weight"],
                "channel_base": case["channel_base"],
                "channel_max": case["channel_max"],
                "r1_gamma": case["r1_gamma"],
                "r1_every": case["r1_every"],
                "r1_gradient": case["r1_gradient"],
            },
        },
        "training": {
            "steps": case["steps"],
            "batch_size": case["batch_size"],
            "optimizer": {"betas": case["betas"], "weight_decay": case["weight_decay"], "eps": case["epsilon"]},
            "engine": {"precision": "fp32"},
            "ema_decay": 0,
        },
    }


def import_weights(case, tensors, folder):
    """Import weights under the published names; return ours by module."""
    values = config_values(case)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    names = {"generator": "state_dict", "discriminator": "state_dict_discriminator"}
    checkpoint = {
        key: {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        for module, key in names.items()
    }
    torch.save(checkpoint, folder / "checkpoint.pt")
    import_bsq_vit(str(folder / "checkpoint.pt"), str(folder / "config.yaml"), str(folder / "model"), "raw")
    weights = {"generator": safetensors.torch.load_file(folder / "model" / "model.safetensors")}
    if checkpoint["state_dict_discriminator"]:
        weights["discriminator"] = safetensors.torch.load_file(folder / "model" / "discriminator.safetensors")
    return weights


def take_steps(rank, world_size, name, shards, out, overrides=(), num_steps=None):
    """Take the steps of a case with the training loop, in its precision.

    Args:
        num_steps: number of steps; None takes all.

    Returns:
        This rank's mean scalars of each step, bits of each step (B, N, L), and final weights by module.
    """
    case, _ = load_case(name)
    case["steps"] = num_steps or case["steps"]
    inputs = safetensors.torch.load_file(GOLDEN / "trajectory-inputs.safetensors")
    folder = Path(out) / f"rank-{rank}"
    initial = import_weights(case, inputs, folder / "initial")
    values = config_values(case)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    dtype = torch.float64 if case["precision"] == "fp64" else torch.float32
    with computing_in(dtype):
        return _take_steps(rank, world_size, case, (initial, inputs["images"]), shards, folder, overrides, dtype)


def _take_steps(rank, world_size, case, data, shards, folder, overrides, dtype):
    initial, images_SBCHW = data
    build_stage = trainer_module.build_stage

    def build_published_stage(*arguments):
        stage = build_stage(*arguments)
        for name, module in stage.modules.items():
            module.load_state_dict(initial[name])
            module.to(dtype)
        if stage.perceptual is not None:
            stage.perceptual.to(dtype)
        return stage

    trainer_module.build_stage = build_published_stage
    try:
        spec = RunSpec(load_config(str(folder / "config.yaml"), list(overrides)), shards, f"{folder.parent}/run")
        worker = WorkerContext(rank, world_size, torch.device("cpu"), "local", RecordingReporter())
        trainer = trainer_module.Trainer(spec, worker)
    finally:
        trainer_module.build_stage = build_stage
    parts = []
    trainer.stage.modules["generator"].quantizer.register_forward_hook(
        lambda module, inputs, output: parts.append(output.bits_BNL)
    )
    records, bits = [], []
    for trainer.step in range(case["steps"]):
        share = images_SBCHW[trainer.step, rank::world_size]
        batch = Batch(share, torch.zeros(len(share)), [str(index) for index in range(len(share))])
        scalars = ScalarMeans()
        parts.clear()
        trainer.train_step(batch, case["learning_rate"], scalars)
        # Micro batches are strides of the batch.
        bits.append(torch.stack(parts, 1).flatten(0, 1).numpy())
        records.append(scalars.pop())
    weights = {}
    for name, engine in trainer.engines.items():
        with engine.gathered_parameters():
            weights[name] = {key: value.double().numpy().copy() for key, value in engine.module.state_dict().items()}
    return records, bits, weights


@contextmanager
def computing_in(dtype):
    """Compute in fp64 where the code casts to fp32, so that rounding cannot move a bit across zero."""
    cast = torch.Tensor.float
    if dtype == torch.float64:
        torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = cast
