"""Muon: its orthogonalization, its steps against those of PyTorch, and the same steps on any number of workers."""

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from process_group import spawn_group
from small_runs import train_runs
from torch import nn

from bsq_ray.config import load_config
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.training.optimizers import build
from bsq_ray.training.optimizers.muon import Muon, assign_owners, orthogonalize

MUON = ["training.engine.kind=ddp", "training.optimizer.kind=muon"]
SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_brings_singular_values_near_one(shape, dtype):
    """Singular vectors stay, and singular values over two orders of magnitude become about 1."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    matrices = u @ torch.diag_embed(torch.logspace(0, -2, 32).expand(2, 32)) @ v
    result = orthogonalize(matrices.to(dtype))
    assert result.dtype == dtype
    in_basis = u.mT @ result.float() @ v.mT
    singular_values = in_basis.diagonal(dim1=-2, dim2=-1)
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3
    off_diagonal = in_basis - torch.diag_embed(singular_values)
    assert off_diagonal.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_in_fp32_equals_the_plain_iteration(shape):
    """Iterating on Gram matrices only gives the results of the iteration as published, in fp64 to rounding of fp32."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    x = (matrix if shape[0] <= shape[1] else matrix.T).double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = x if shape[0] <= shape[1] else x.T
    torch.testing.assert_close(orthogonalize(matrix[None])[0].double(), expected, atol=1e-4, rtol=0)


def test_orthogonalize_zero_gradient_is_zero():
    """A matrix without gradient stays where it is."""
    assert not orthogonalize(torch.zeros(1, 4, 8)).any()


@pytest.mark.parametrize("ns_steps", [5, 3])
def test_muon_takes_the_steps_of_torch(ns_steps):
    """Twenty steps on one worker in bf16 are those of `torch.optim.Muon`."""
    results = []
    for build_optimizer in (
        functools.partial(Muon, lr_ratio=1.0, dtype=torch.bfloat16),
        functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
    ):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        targets = [torch.randn(shape) for shape in SHAPES]
        optimizer = build_optimizer(weights, lr=0.01, momentum=0.95, weight_decay=0.1, ns_steps=ns_steps)
        losses = []
        for _ in range(20):
            loss = sum((w - t).square().mean() for w, t in zip(weights, targets, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
    ours, torchs = results
    assert ours == pytest.approx(torchs, rel=1e-5)
    assert ours[-1] < 0.95 * ours[0]


def test_muon_skips_steps_while_found_inf_is_set():
    """With the flag set, NaN gradients reach neither weights nor momentum; without, the flag changes no bit."""
    torch.manual_seed(0)
    gradients = [torch.randn(4, 6) for _ in range(3)]
    weights = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    flag = torch.zeros(())
    flagged, plain = (
        Muon([weight], lr=0.1, lr_ratio=1.0, momentum=0.9, weight_decay=0.1, ns_steps=5, dtype=torch.float32)
        for weight in weights
    )
    flagged.found_inf = flag
    for gradient in gradients:
        for optimizer, weight in ((flagged, weights[0]), (plain, weights[1])):
            weight.grad = gradient.clone()
            optimizer.step()
    momentum = flagged.state[weights[0]]["momentum"].clone()
    flag.fill_(1)
    weights[0].grad = torch.full((4, 6), torch.nan)
    flagged.step()
    assert torch.equal(*weights)
    assert torch.equal(flagged.state[weights[0]]["momentum"], momentum)


def distributed_steps(rank, world_size):
    """Return the weights after five steps on gradients that are the same on every worker."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Muon(weights, lr=0.01, lr_ratio=1.0, momentum=0.95, weight_decay=0.1, ns_steps=5, dtype=torch.float32)
    for _ in range(5):
        for weight in weights:
            weight.grad = weight.detach().cos()
        optimizer.step()
    return [weight.detach().numpy() for weight in weights]


def test_workers_share_the_orthogonalization():
    """Three workers, of which two own one matrix and one owns two, have the weights of one."""
    expected = distributed_steps(0, 1)
    for weights in spawn_group(3, distributed_steps):
        for left, right in zip(expected, weights, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def stopped_runs(rank, world_size, shards, out, overrides_by_name):
    """`reference_runs`, each stopped after ten steps."""
    return reference_runs(rank, world_size, shards, out, overrides_by_name, dict.fromkeys(overrides_by_name, 10))


def reference_runs(rank, world_size, shards, out, overrides_by_name, stop_after=None):
    """`train_runs` with `torch.optim.Muon`, or with ours in its precision."""
    original = build.Muon
    results = {}
    try:
        for name, overrides in overrides_by_name.items():

            def build_torch(matrices, *, lr_ratio, dtype, **options):
                optimizer = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
                optimizer.param_groups[0]["lr_ratio"] = lr_ratio
                return optimizer

            def build_ours(matrices, *, dtype, **rates):
                return original(matrices, dtype=torch.bfloat16, **rates)

            build.Muon = mock.Mock(side_effect=build_torch if name == "torch" else build_ours)
            results |= train_runs(rank, world_size, shards, out, {name: overrides}, stop_after)
            # The discriminator has no transformer blocks, and its kernels are left to AdamW by default.
            build.Muon.assert_called_once()
    finally:
        build.Muon = original
    return results


TWENTY_STEPS = [*MUON, "training.steps=20", "training.optimizer.muon.base_learning_rate=0.032"]
# The entropy of a batch is not the mean over its parts, so its weight is 0 where parts are compared.
SIX_STEPS = [*MUON, "training.steps=6", "model.quantizer.entropy.codebook_weight=0"]


@pytest.fixture(scope="module")
def losses(photo_shards, tmp_path_factory):
    """Losses of twenty steps by name: PyTorch's optimizer in one process, and ours on one and two workers."""
    out = str(tmp_path_factory.mktemp("muon"))
    runs = {"torch": TWENTY_STEPS, "one worker": TWENTY_STEPS, "whole batch": SIX_STEPS}
    one = reference_runs(0, 1, photo_shards, out, runs)
    runs = {"two workers": TWENTY_STEPS, "accumulated": [*SIX_STEPS, "training.micro_batch_size=4"]}
    [two, _] = spawn_group(2, reference_runs, photo_shards, out, runs)
    # Stopped on two workers after half of the steps, and resumed by one.
    spawn_group(2, stopped_runs, photo_shards, out, {"resumed": TWENTY_STEPS})
    one |= reference_runs(0, 1, photo_shards, out, {"resumed": TWENTY_STEPS})
    return {**one, **two}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"),
    [("one worker", "torch"), ("two workers", "torch"), ("accumulated", "whole batch")],
)
def test_training_losses_are_those_of_torch_in_one_process(losses, name, reference):
    """Over twenty steps the losses are those of one process with `torch.optim.Muon`, also with accumulation."""
    assert len(losses[name]) == (6 if name == "accumulated" else 20)
    for left, right in zip(losses[reference], losses[name], strict=True):
        for key in ("loss", "reconstruction", "loss/generator", "loss/discriminator"):
            assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-5), (left["step"], key)


@pytest.mark.slow
def test_resumed_run_takes_the_same_steps_on_another_number_of_workers(losses):
    """The momentum is in the checkpoint: ten steps on two workers and ten on one are twenty steps."""
    assert [record["step"] for record in losses["resumed"]] == list(range(11, 21))
    for left, right in zip(losses["torch"][10:], losses["resumed"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5, abs=1e-5), left["step"]


def test_muon_optimizes_matrices_of_transformer_blocks_only():
    """Every linear layer of the blocks belongs to Muon, and nothing else."""
    tokenizer = Tokenizer(load_config("demo-gan").model)
    names = set(build.muon_matrices(tokenizer, convolutions=True))
    in_blocks = {
        name for name, module in tokenizer.named_modules() if isinstance(module, nn.Linear) and "blocks" in name
    }
    assert names == {f"{name}.weight" for name in in_blocks}
    assert len(names) == 2 * 4 * 4
    assert len(build.muon_matrices(MaskedLM(load_config("masked-lm-demo").model), convolutions=False)) % 4 == 0


@pytest.mark.parametrize("kind", ["stylegan2", "patchgan", "stylegan2-3d"])
def test_muon_convolutions_take_kernels_as_matrices(kind):
    """A step on the kernels of a discriminator is that of `torch.optim.Muon` on the same numbers as matrices."""
    overrides = [*MUON, "training.optimizer.muon.convolutions=true", f"loss.adversarial.discriminator={kind}"]
    run = load_config("demo-video" if kind == "stylegan2-3d" else "demo-gan", overrides)
    torch.manual_seed(0)
    discriminator = build_discriminator(run.loss.adversarial, run.model.image_size, run.model.frames)
    kernels = build.muon_matrices(discriminator, convolutions=True)
    assert set(kernels) == {name for name, value in discriminator.named_parameters() if value.ndim in (4, 5)}
    matrices = {name: nn.Parameter(kernel.detach().flatten(1).clone()) for name, kernel in kernels.items()}
    for name, parameter in discriminator.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        if name in matrices:
            matrices[name].grad = parameter.grad.flatten(1).clone()
    optimizers = build.build_optimizers(discriminator, run.training.optimizer, use_bf16=True)
    rates = {"lr": run.training.optimizer.base_learning_rate, "weight_decay": 1e-4}
    expected = torch.optim.Muon(matrices.values(), adjust_lr_fn="match_rms_adamw", **rates)
    before = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    for optimizer in (*optimizers.values(), expected):
        optimizer.step()
    for name, kernel in kernels.items():
        step, expected_step = kernel.flatten(1) - before[name], matrices[name] - before[name]
        # Matrix units of some processors add bf16 products of a stack of matrices in another order than of one.
        assert (step - expected_step).norm() < 0.03 * expected_step.norm()


def test_describe_optimizers_counts_parameters():
    """The description names both optimizers with the sizes of their shares."""
    tokenizer = Tokenizer(load_config("demo-gan").model)
    run = load_config("demo-gan")
    adversarial = run.loss.adversarial
    modules = {"generator": tokenizer, "discriminator": build_discriminator(adversarial, run.model.image_size)}
    with_kernels = [*MUON, "training.optimizer.muon.convolutions=true"]
    adamw, muon, both = (load_config("demo-gan", each).training.optimizer for each in ([], MUON, with_kernels))
    of_generator = "muon: 32 matrices (6.29 M); adamw: 83 tensors (0.58 M)"
    assert build.describe_optimizers(modules, adamw) == "adamw: 115 tensors (6.87 M)"
    assert build.describe_optimizers(modules, muon) == of_generator
    assert build.describe_optimizers(modules, both).startswith(f"{of_generator}; discriminator: muon: ")


@pytest.mark.parametrize(
    "base", ["imagenet128-bsq18", "imagenet256-bsq36", "imagenet128-masked-lm", "imagenet128-prior"]
)
def test_muon_presets_change_nothing_but_optimizer_and_engine(base):
    """A preset with Muon has the rates, the schedule, the model and the loss of its base."""
    muon, adamw = load_config(f"{base}-muon").model_dump(), load_config(base).model_dump()
    assert muon["training"]["optimizer"].pop("kind") == "muon"
    assert muon["training"]["engine"].pop("kind") == "ddp"
    for run in (muon, adamw):
        del run["name"], run["description"]
    del adamw["training"]["optimizer"]["kind"], adamw["training"]["engine"]["kind"]
    assert muon == adamw


def test_muon_with_zero_raises():
    """ZeRO divides matrices, so the combination raises an error with what to use instead."""
    with pytest.raises(ValueError, match="needs whole matrices, and ZeRO divides them .* use engine.kind ddp"):
        load_config("demo-gan", ["training.optimizer.kind=muon"])


def test_assign_owners_balances_the_work():
    """Every matrix has one owner, and no worker has more than its share and the largest matrix."""
    shapes = [shape for shape in SHAPES for _ in range(5)]
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    for world_size in (1, 2, 3, 8, 64):
        owned_by = assign_owners(shapes, world_size)
        assert sorted(index for indexes in owned_by for index in indexes) == list(range(len(shapes)))
        largest = max(sum(costs[index] for index in indexes) for indexes in owned_by)
        assert largest <= sum(costs) / world_size + max(costs)
