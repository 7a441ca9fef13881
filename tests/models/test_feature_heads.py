"""The discriminator on frozen features: gradients, groups, and what belongs to the module."""

import copy

import pytest
import torch
from reference_dino import random_dino_weights
from torch import nn

from bsq_ray import config
from bsq_ray.config import load_config
from bsq_ray.losses.adversarial import discriminator_loss
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.discriminators.feature_heads import SpectralConv, VirtualBatchNorm

SIZES = {"alex": 48, "vgg": 32, "dino": 16}
# Positions of each map.
NUM_LOGITS = {"alex": [11**2, 5**2, 2**2, 2**2, 2**2], "vgg": [32**2, 16**2, 8**2, 4**2, 2**2], "dino": 5 * [2**2]}


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save(random_dino_weights(), path)
    return str(path)


def build(features, weights_path=None):
    torch.manual_seed(0)
    path = weights_path if features == "dino" else None
    adversarial = config.AdversarialConfig(
        discriminator="features", features=features, features_weights=path, channel_max=8, r1_gamma=0
    )
    return build_discriminator(adversarial, SIZES[features])


def images(count, features="alex", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZES[features], SIZES[features], generator=generator) * 2 - 1


def directional_derivative(function, x, direction, step=1e-8):
    """Return the central difference of a scalar function in a direction."""
    with torch.no_grad():
        values = [function(x + sign * step * direction) for sign in (1, -1)]
    return float((values[0] - values[1]) / (2 * step))


@pytest.mark.parametrize("features", SIZES)
def test_feature_logits_are_one_per_position(features, weights_path):
    model = build(features, weights_path)
    real, fake = model(images(4, features), images(2, features, seed=1))
    assert [logits.shape for logits in real] == [(4, count) for count in NUM_LOGITS[features]]
    assert [logits.shape for logits in fake] == [(2, count) for count in NUM_LOGITS[features]]
    assert {logits.dtype for logits in real} == {torch.float32}
    assert all(0.1 < logits.std() < 3 for logits in real)


@pytest.mark.parametrize("features", SIZES)
def test_feature_joint_batches_match_separate_batches(features, weights_path):
    """Batches passed in one call get the logits they get in separate calls."""
    model, real, fake = build(features, weights_path), images(4, features), images(8, features, seed=1) / 3
    together = model(real, fake)
    for logits, batch in zip(together, (real, fake), strict=True):
        torch.testing.assert_close(logits, model(batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", SIZES)
def test_feature_image_gradient_matches_finite_differences(features, weights_path):
    """The gradient passes through the frozen network to the images."""
    model, x = build(features, weights_path).double(), images(2, features).double().requires_grad_()
    mixing = torch.randn(sum(NUM_LOGITS[features]), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def value(x):
        return (torch.cat(model(x)[0], 1) @ mixing).sum()

    [gradient] = torch.autograd.grad(value(x), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = directional_derivative(value, x, direction)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("features", "with_r1"), [("alex", False), ("vgg", False), ("dino", False), ("alex", True), ("vgg", True)]
)
def test_feature_head_gradients_match_finite_differences(features, weights_path, with_r1):
    """So do those of the heads' parameters, of the loss and of the R1 penalty through the frozen network."""
    model = build(features, weights_path).double()
    real, fake = images(4, features).double(), images(4, features, seed=1).double()
    parameters = list(model.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()

    def value():
        x = real.requires_grad_(with_r1)
        if with_r1:
            with torch.enable_grad():
                # As `r1_penalty`, but in fp64.
                total = torch.stack([logits.mean(1) for logits in model(x)[0]]).mean(0).sum()
                [gradient] = torch.autograd.grad(total, x, create_graph=True)
                return gradient.square().sum((1, 2, 3)).mean()
        return discriminator_loss(*model(x, fake), "non_saturating")

    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    gradient = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )
    direction = torch.randn(vector.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def value_at(changed):
        nn.utils.vector_to_parameters(changed, parameters)
        return value().detach()

    expected = directional_derivative(value_at, vector, direction)
    assert float(gradient @ direction) == pytest.approx(expected, rel=1e-4)


def test_virtual_batch_norm_matches_batch_norm_of_each_group():
    """Group i of 8 images has images i, i + 2, i + 4 and i + 6; each is normalized as by `nn.BatchNorm1d`."""
    norm, reference = VirtualBatchNorm(3, 4), nn.BatchNorm1d(3)
    for module in (norm, reference):
        nn.init.constant_(module.weight, 1.5)
        nn.init.constant_(module.bias, 0.5)
    x = torch.randn(8, 3, 5)
    output = norm(x, [8])
    for group in (0, 1):
        torch.testing.assert_close(output[group::2], reference(x[group::2]))
    # One worker of two has every second image.
    torch.testing.assert_close(norm(torch.cat([x[1::2], x[::2]]), [4, 4])[:4], output[1::2])


@pytest.mark.parametrize(("channels", "kernel"), [((5, 7), 1), ((6, 6), 9)])
def test_spectral_conv_matches_circular_convolution_of_norm_one(channels, kernel):
    """After many updates the matrix of the kernel has spectral norm 1; borders wrap around."""
    torch.manual_seed(0)
    conv = SpectralConv(*channels, kernel)
    for _ in range(300):
        conv.update_norm()
    assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-4)
    reference = nn.Conv1d(*channels, kernel, padding=kernel // 2, padding_mode="circular")
    reference.load_state_dict({"weight": conv.weight, "bias": conv.bias})
    x = torch.randn(2, channels[0], 11)
    torch.testing.assert_close(conv(x), reference(x))


def test_spectral_norms_change_by_update_only():
    """Forward passes in any mode leave the estimates as they are."""
    model = build("alex")
    before = copy.deepcopy(model.state_dict())
    model.train()(images(4))
    model.eval()(images(4))
    model.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.update_spectral_norms()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"_u", "_v"}


@pytest.mark.parametrize("features", SIZES)
def test_frozen_network_is_no_part_of_the_module(features, weights_path):
    """Parameters, buffers, state dict and submodules are those of the heads; the network follows moves and copies."""
    model = build(features, weights_path)
    names = [*dict(model.named_parameters()), *dict(model.named_buffers()), *model.state_dict()]
    assert all(name.startswith("heads.") for name in names)
    assert model.frozen_network not in list(model.modules())
    frozen = [*model.frozen_network.parameters(), *model.frozen_network.buffers()]
    assert len(frozen) > 10
    model.train().requires_grad_(True)
    assert not any(module.training for module in model.frozen_network.modules())
    assert not any(value.requires_grad for value in frozen)
    model.double()
    moved = [*model.frozen_network.parameters(), *model.frozen_network.buffers()]
    assert all(value.dtype == torch.float64 for value in moved)
    copied = copy.deepcopy(model)
    assert copied.frozen_network is not model.frozen_network
    for logits, expected in zip(
        copied(images(2, features).double())[0], model(images(2, features).double())[0], strict=True
    ):
        assert torch.equal(logits, expected)


def test_frozen_network_is_on_the_cpu_under_meta_device():
    with torch.device("meta"):
        model = build("alex")
    assert {value.device.type for value in model.parameters()} == {"meta"}
    assert {value.device.type for value in model.frozen_network.parameters()} == {"cpu"}


def test_feature_steps_leave_frozen_network_unchanged():
    model, x = build("alex"), images(4)
    before = copy.deepcopy(model.frozen_network.state_dict())
    weights = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        model.update_spectral_norms()
        loss = discriminator_loss(*model(x, x.flip(2) / 2), "hinge")
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.frozen_network.state_dict().items())
    assert all(
        not torch.equal(value, weights[name]) for name, value in model.named_parameters() if "out.bias" not in name
    )


@pytest.mark.parametrize("features", SIZES)
def test_image_size_limits_are_those_of_the_networks(features, weights_path):
    """The smallest image size gives the last map 2 x 2 positions; a smaller one is rejected with a way out."""
    overrides = ["discriminator=features", f"features={features}", f"features_weights={weights_path}", "r1_gamma=0"]
    overrides = [f"loss.adversarial.{override}" for override in overrides]
    smallest = {"alex": 47, "vgg": 32, "dino": 16}[features]
    with pytest.raises(
        ValueError, match=f"must be .*at least {smallest}.* for loss.adversarial.features {features}; cho"
    ):
        load_config("demo-gan", [*overrides, f"model.image_size={smallest - 8}", "model.patch_size=1"])
    run = load_config("demo-gan", [*overrides, f"model.image_size={smallest}", "model.patch_size=1"])
    network = build_discriminator(run.loss.adversarial, smallest).frozen_network
    assert network.feature_maps(torch.zeros(1, 3, smallest, smallest))[-1].shape[2:] == (2, 2)


def test_dino_without_weights_raises():
    with pytest.raises(
        ValueError, match="features dino needs the published weights .* set features_weights to the path"
    ):
        load_config("demo-features", ["loss.adversarial.features=dino"])
    load_config("demo-features", ["loss.adversarial.features=dino", "loss.adversarial.weight=0"])
