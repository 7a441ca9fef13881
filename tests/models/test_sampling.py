"""Sampling: the schedule, what is kept, what a seed determines, and that classes and guidance matter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_masked_lm import small_model

from bsq_ray import config
from bsq_ray.models.masked_lm import masked_cross_entropy
from bsq_ray.models.sampling import interpolate_classes, num_masked, sample, sample_steps


def sampling_config(**changes):
    return config.SamplingConfig(**({"steps": 4, "temperature": 1.0, "guidance_scale": 0.5} | changes))


def class_weights(model, *labels):
    return model.class_weights(torch.tensor(labels))


@given(st.integers(1, 40), st.integers(1, 300))
def test_num_masked_decreases_every_step_to_zero(steps, units):
    """Every step reveals at least one unit while any is masked, and the last step reveals all."""
    remaining = [num_masked(step, steps, units) for step in range(1, steps + 1)]
    assert remaining[-1] == 0
    assert all(after < before or before == 0 for before, after in zip([units, *remaining], remaining, strict=False))


@pytest.mark.parametrize("mask_unit", ["token", "sub_token"])
def test_sample_steps_follow_schedule_and_keep_tokens(mask_unit):
    model = small_model(mask_unit=mask_unit)
    units = 6 if mask_unit == "token" else 12
    before = None
    for step, tokens_BNS in enumerate(sample_steps(model, class_weights(model, 0, 3), sampling_config(), seed=1), 1):
        masked_BNS = tokens_BNS == model.mask_token
        num_left = masked_BNS.all(2).sum(1) if mask_unit == "token" else masked_BNS.sum((1, 2))
        assert num_left.tolist() == [num_masked(step, 4, units)] * 2
        if mask_unit == "token":
            assert torch.equal(masked_BNS.all(2), masked_BNS.any(2))
        if before is not None:
            assert torch.equal(tokens_BNS[before != model.mask_token], before[before != model.mask_token])
        before = tokens_BNS
    assert step == 4


def test_sample_depends_on_seed_and_index_not_batch():
    """An image depends on the seed and its index, not on the batch it is sampled in."""
    model = small_model()
    together = sample(model, class_weights(model, 0, 1, 2), sampling_config(), seed=5)
    alone = [sample(model, class_weights(model, n), sampling_config(), seed=5, first_index=n) for n in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, sample(model, class_weights(model, 0, 1, 2), sampling_config(), seed=6))


def test_sample_inpainting_keeps_known_tokens():
    model = small_model()
    known_BNS = torch.randint(0, 8, (2, 6, 2))
    inpaint_mask_BN = torch.tensor([[True, False, True, False, False, False], [False] * 6])
    *_, filled_BNS = sample_steps(
        model, class_weights(model, 1, 2), sampling_config(), 0, known_BNS=known_BNS, inpaint_mask_BN=inpaint_mask_BN
    )
    assert torch.equal(filled_BNS[~inpaint_mask_BN], known_BNS[~inpaint_mask_BN])
    assert (filled_BNS < model.mask_token).all()
    with pytest.raises(ValueError, match="needs both"):
        sample(model, class_weights(model, 1, 2), sampling_config(), 0, known_BNS=known_BNS)


def test_interpolate_classes_is_linear():
    model = small_model()
    path = interpolate_classes(model, [0, 2], 5)
    assert path.sum(1).tolist() == pytest.approx([1] * 5)
    assert path[2].tolist() == [0.5, 0, 0.5, 0, 0]
    assert sample(model, path, sampling_config(), 0).shape == (5, 6, 6)
    with pytest.raises(ValueError, match="two classes"):
        interpolate_classes(model, [1], 5)


@pytest.fixture(scope="module")
def trained_model():
    """A model that has seen class c mostly as sub-tokens of value c, and as random ones in a third of the cases."""
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(150):
        labels_B = torch.randint(0, 4, (32,), generator=rng)
        noise_BNS = torch.randint(0, 8, (32, 6, 2), generator=rng)
        keeps_class_value = torch.rand(32, 6, 2, generator=rng) < 2 / 3
        tokens_BNS = torch.where(keeps_class_value, labels_B[:, None, None], noise_BNS)
        masked_BNS = torch.rand(32, 6, 1, generator=rng).expand(-1, -1, 2) < 0.6
        dropped_labels_B = labels_B.masked_fill(torch.rand(32, generator=rng) < 0.2, model.null_class)
        logits = model(tokens_BNS.masked_fill(masked_BNS, model.mask_token), model.class_weights(dropped_labels_B))
        loss = masked_cross_entropy(logits, tokens_BNS, masked_BNS, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def class_fraction(model, **changes):
    labels_B = torch.arange(4).repeat(16)
    sampled_BNS = model.split_bits(sample(model, model.class_weights(labels_B), sampling_config(**changes), seed=3))
    return (sampled_BNS == labels_B[:, None, None]).float().mean().item()


def test_sample_matches_distribution_and_guidance_sharpens(trained_model):
    """Samples follow the learned distribution, and guidance raises the share of the class's own value."""
    plain = class_fraction(trained_model, steps=1, guidance_scale=0.0)
    assert plain == pytest.approx(2 / 3 + 1 / 24, abs=0.1)
    assert class_fraction(trained_model, steps=1, guidance_scale=2.0) > plain + 0.1


def test_guidance_linear_schedule_is_full_at_last_step(trained_model):
    """A linear guidance schedule reaches the full scale only in the last step."""
    classes_BC = trained_model.class_weights(torch.arange(4).repeat(8))

    def sample_with(steps, schedule):
        return sample(
            trained_model,
            classes_BC,
            sampling_config(steps=steps, guidance_scale=4.0, guidance_schedule=schedule),
            seed=2,
        )

    assert torch.equal(sample_with(1, "linear"), sample_with(1, "constant"))
    assert not torch.equal(sample_with(4, "linear"), sample_with(4, "constant"))


def test_sample_zero_temperature_picks_most_confident(trained_model):
    assert class_fraction(trained_model, temperature=0.0, guidance_scale=0.0) > 0.6
