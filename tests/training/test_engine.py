"""All engines take the same steps: ZeRO 0 to 3 and data parallelism, on one worker or two.

Two engines in one process give wrong gradients without an error when they are called in the wrong order. Therefore full
GAN steps of the training loop are compared, including the R1 penalty, which calls autograd.grad on the discriminator.
"""

import numpy as np
import pytest
import safetensors.numpy
import torch
from process_group import spawn_group
from small_runs import PRESET, SMALL, RecordingReporter, local_worker, small_spec, train_runs

from bsq_ray.config import load_config
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import autocast_precision

ENGINES = {
    "zero 0": ["training.engine.zero_stage=0"],
    "zero 1": ["training.engine.zero_stage=1"],
    "zero 2": ["training.engine.zero_stage=2"],
    "zero 3": ["training.engine.zero_stage=3"],
    "zero 2 offloaded": ["training.engine.zero_stage=2", "training.engine.offload_optimizer=true"],
    "ddp": ["training.engine.kind=ddp"],
}
BF16_GRADIENTS = "training.engine.communication_data_type=bf16"


def load_weights(out, name, which="model.plain"):
    return safetensors.numpy.load_file(f"{out}/{name}/model/{which}.safetensors")


# Times and texts differ by nature, and one flipped bit changes the usage of codes by more than the tolerance.
UNCOMPARED = {"kind", "images_per_second", "data_wait", "seconds", "code_usage", "bit_entropy"}


def assert_same_run(out, losses, left_name, right_name, tolerance=1e-5, uncompared=frozenset()):
    """Compare losses and gradient norms of each step, and the final weights."""
    for left, right in zip(losses[left_name], losses[right_name], strict=True):
        for key in left.keys() - UNCOMPARED - uncompared:
            assert left[key] == pytest.approx(right[key], rel=tolerance, abs=tolerance), (
                left_name,
                right_name,
                left["step"],
                key,
            )
    for which in ("model.plain", "model", "discriminator"):
        left, right = load_weights(out, left_name, which), load_weights(out, right_name, which)
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_allclose(
                left[key], right[key], atol=tolerance, err_msg=f"{left_name} {right_name} {which} {key}"
            )


@pytest.fixture(scope="module", autouse=True)
def _restore_linear():
    """Restore `F.linear`, which ZeRO-3 replaces for the rest of the process."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="module")
def runs(photo_shards, tmp_path_factory):
    """(folder, losses by name) of the same training with every engine, on two workers and on one."""
    out = str(tmp_path_factory.mktemp("engines"))
    [two_workers, _] = spawn_group(2, train_runs, photo_shards, out, ENGINES)
    accumulated = {
        "accumulated ddp": [*ENGINES["ddp"], "training.micro_batch_size=4"],
        "accumulated zero 1": ["training.micro_batch_size=4"],
        "accumulated zero 2": ["training.engine.zero_stage=2", "training.micro_batch_size=4"],
        "accumulated zero 2 offloaded": [*ENGINES["zero 2 offloaded"], "training.micro_batch_size=4"],
        "bf16 ddp": [*ENGINES["ddp"], BF16_GRADIENTS],
        "bf16 zero 1": [*ENGINES["zero 1"], BF16_GRADIENTS],
        "bf16 zero 3": [*ENGINES["zero 3"], BF16_GRADIENTS],
        "clipped ddp": [*ENGINES["ddp"], "training.optimizer.max_grad_norm=0.01"],
        "clipped zero 0": [*ENGINES["zero 0"], "training.optimizer.max_grad_norm=0.01"],
        "clipped zero 1": ["training.optimizer.max_grad_norm=0.01"],
        "clipped zero 3": [*ENGINES["zero 3"], "training.optimizer.max_grad_norm=0.01"],
    }
    # The entropy of a batch is not the mean over its parts, so its weight is 0 where parts are compared.
    no_codebook = ["model.quantizer.entropy.codebook_weight=0"]
    accumulated = {name: [*overrides, *no_codebook] for name, overrides in accumulated.items()}
    accumulated["full batch ddp"] = [*ENGINES["ddp"], *no_codebook]
    [variants, _] = spawn_group(2, train_runs, photo_shards, out, accumulated)
    one_worker = train_runs(0, 1, photo_shards, out, {"alone ddp": ENGINES["ddp"], "alone zero 1": []})
    return out, {**two_workers, **variants, **one_worker}


ACCUMULATED = ["accumulated ddp", "accumulated zero 1", "accumulated zero 2", "accumulated zero 2 offloaded"]
DEEPSPEED = [engine for engine in ENGINES if engine != "ddp"]


@pytest.mark.parametrize("engine", DEEPSPEED)
def test_deepspeed_steps_match_ddp(runs, engine):
    """DeepSpeed takes the same steps as plain data parallelism."""
    assert_same_run(*runs, "ddp", engine)


def test_code_usage_is_that_of_all_workers(runs):
    """Two workers report the code usage and the bit entropy of their tokens together, as one worker does."""
    _, losses = runs
    for left, right in zip(losses["alone ddp"], losses["ddp"], strict=True):
        for key in ("code_usage", "bit_entropy"):
            assert left[key] == pytest.approx(right[key], rel=1e-3), (left["step"], key)


@pytest.fixture(scope="module")
def long_runs(photo_shards, tmp_path_factory):
    """(folder, losses by name) of twenty steps with every engine."""
    out = str(tmp_path_factory.mktemp("long"))
    longer = {name: [*overrides, "training.steps=20"] for name, overrides in ENGINES.items()}
    return out, spawn_group(2, train_runs, photo_shards, out, longer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", DEEPSPEED)
def test_deepspeed_twenty_steps_match_ddp(long_runs, engine):
    """Over twenty steps the losses of DeepSpeed are those of plain data parallelism."""
    _, losses = long_runs
    assert len(losses[engine]) == 20
    for left, right in zip(losses["ddp"], losses[engine], strict=True):
        for key in ("loss", "reconstruction", "loss/generator", "loss/discriminator"):
            assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-5), (left["step"], key)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_optimizer_enables_deepspeed_offload(stage):
    """The option offload_optimizer makes DeepSpeed keep the optimizer state in host memory."""
    training_config = load_config(PRESET, [*SMALL, f"training.engine.zero_stage={stage}"]).training
    for offload in (False, True):
        changed = training_config.model_copy(
            update={"engine": training_config.engine.model_copy(update={"offload_optimizer": offload})}
        )
        engine = build_engine(
            torch.nn.Linear(4, 4), changed, micro_batch=4, accumulation_steps=1, device=torch.device("cpu")
        )
        assert bool(engine._ds_engine.zero_offload_optimizer()) is offload


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["zero_stage=0"], "zero_stage 0 partitions none; use zero_stage 1, 2 or 3"),
        (["kind=ddp"], "offload_optimizer needs DeepSpeed"),
    ],
)
def test_offload_optimizer_unsupported_raises(overrides, reason):
    """Offloading is rejected where the engine has nothing to offload."""
    with pytest.raises(ValueError, match=reason):
        load_config(PRESET, ["training.engine.offload_optimizer=true", *(f"training.engine.{o}" for o in overrides)])


def test_compared_steps_include_r1_penalty(runs):
    _, losses = runs
    assert ["r1" in record for record in losses["ddp"]] == [False, True, False, True]


@pytest.mark.parametrize("engine", ["ddp", "zero 1"])
def test_two_workers_match_one_at_same_batch(runs, engine):
    """Two workers take the steps of one worker at the same global batch size."""
    assert_same_run(*runs, f"alone {engine}", engine)


@pytest.mark.parametrize("engine", ACCUMULATED)
def test_gradient_accumulation_matches_full_batch(runs, engine):
    """Accumulated micro batches give the step of the full batch."""
    assert_same_run(*runs, "full batch ddp", engine, uncompared={"codebook_entropy"})


@pytest.mark.parametrize("engine", ["clipped zero 0", "clipped zero 1", "clipped zero 3"])
def test_gradient_clipping_matches_across_engines(runs, engine):
    """Gradient clipping changes the losses, and equally for every engine."""
    out, losses = runs
    assert_same_run(out, losses, "clipped ddp", engine)
    assert losses["clipped ddp"][-1]["loss"] != losses["full batch ddp"][-1]["loss"]


@pytest.mark.parametrize("engine", ["bf16 ddp", "bf16 zero 1", "bf16 zero 3"])
def test_bf16_gradients_change_losses_by_less_than_one_percent(runs, engine):
    _, losses = runs
    for left, right in zip(losses["full batch ddp"], losses[engine], strict=True):
        for key in ("loss", "reconstruction", "loss/generator", "loss/discriminator"):
            assert right[key] == pytest.approx(left[key], rel=1e-2), (left["step"], key)
    assert losses[engine][-1]["loss"] != losses["full batch ddp"][-1]["loss"]


@pytest.mark.parametrize("engine", ENGINES)
def test_nonfinite_gradient_is_returned_without_step(engine):
    """A nonfinite gradient norm is returned and the weights stay unchanged."""
    module = torch.nn.Linear(2, 1, bias=False)
    training_config = load_config("demo-gan", ENGINES[engine]).training
    built = build_engine(module, training_config, micro_batch=1, accumulation_steps=1, device=torch.device("cpu"))
    built.backward(built(torch.ones(1, 2)).sum())
    assert np.isfinite(built.step(1e-3))
    with built.gathered_parameters():
        before = module.weight.detach().clone()
    # The loss is 0, and the gradient of the square root at 0 is not finite.
    built.backward((0 * built(torch.ones(1, 2))).square().sum().sqrt())
    grad_norm = built.step(1.0)
    assert grad_norm is not None
    assert not np.isfinite(grad_norm)
    with built.gathered_parameters():
        assert torch.equal(module.weight.detach(), before)


@pytest.mark.parametrize("kind", ["ddp", "deepspeed"])
def test_bf16_autocast_reaches_engine_forward(photo_shards, tmp_path, monkeypatch, kind):
    # As on a GPU, where DeepSpeed detects the outer autocast and disables it inside its engines.
    original = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: original(*device) if device else original("cpu"))
    dtypes = set()
    forward = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        y = forward(x, weight, bias)
        dtypes.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    overrides = [f"training.engine.kind={kind}", "training.engine.precision=bf16", "training.steps=1"]
    job = small_spec(photo_shards, tmp_path, [*overrides, "loss.adversarial.weight=0"])
    run_training(job, local_worker(RecordingReporter()))
    assert dtypes == {torch.bfloat16}
    weights = safetensors.numpy.load_file(tmp_path / "model" / "model.plain.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}


def test_auto_precision_is_bf16_only_with_hardware(monkeypatch):
    """Precision "auto" is bf16 only where the hardware has instructions for it."""
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)  # noqa: B023
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert autocast_precision("auto", torch.device("cpu")) == ("bf16" if has else "fp32")
    assert autocast_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_flat_buffer_parameters_are_aligned(stage):
    """Parameters that kernels read are aligned, although a bias of 18 values is among them."""
    run_config = load_config(PRESET, [*SMALL, f"training.engine.zero_stage={stage}"])
    tokenizer = Tokenizer(run_config.model)
    assert any(parameter.numel() % 4 for parameter in tokenizer.parameters())
    build_engine(tokenizer, run_config.training, micro_batch=4, accumulation_steps=1, device=torch.device("cpu"))
    offsets = {name: p.data_ptr() % 16 for name, p in tokenizer.named_parameters() if p.numel() % 4 == 0}
    assert set(offsets.values()) == {0}, offsets
