"""Sampling: the schedule, what is kept, what a seed determines, and that classes and guidance matter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_masked_lm import small_model

from bsq_ray import config
from bsq_ray.models.masked_lm import masked_cross_entropy
from bsq_ray.models.sampling import between, masked_after, sample, sample_steps


def section(**changes):
    return config.Sampling(**({"steps": 4, "temperature": 1.0, "guidance": 0.5} | changes))


def classes(model, *labels):
    return model.classes_of(torch.tensor(labels))


@given(st.integers(1, 40), st.integers(1, 300))
def test_every_step_reveals_something_and_the_last_one_everything(steps, units):
    left = [masked_after(step, steps, units) for step in range(1, steps + 1)]
    assert left[-1] == 0
    assert all(after < before or before == 0 for before, after in zip([units, *left], left, strict=False))


@pytest.mark.parametrize("mask_by", ["token", "sub_token"])
def test_units_are_revealed_as_scheduled_and_stay(mask_by):
    model = small_model(mask_by=mask_by)
    units = 6 if mask_by == "token" else 12
    before = None
    for step, tokens_BNS in enumerate(sample_steps(model, classes(model, 0, 3), section(), seed=1), 1):
        masked_BNS = tokens_BNS == model.mask
        left = masked_BNS.all(2).sum(1) if mask_by == "token" else masked_BNS.sum((1, 2))
        assert left.tolist() == [masked_after(step, 4, units)] * 2
        if mask_by == "token":
            assert torch.equal(masked_BNS.all(2), masked_BNS.any(2))
        if before is not None:
            assert torch.equal(tokens_BNS[before != model.mask], before[before != model.mask])
        before = tokens_BNS
    assert step == 4


def test_an_image_depends_on_the_seed_and_its_number_not_on_its_batch():
    model = small_model()
    together = sample(model, classes(model, 0, 1, 2), section(), seed=5)
    alone = [sample(model, classes(model, n), section(), seed=5, first=n) for n in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, sample(model, classes(model, 0, 1, 2), section(), seed=6))


def test_inpainting_keeps_what_is_given():
    model = small_model()
    given_BNS = torch.randint(0, 8, (2, 6, 2))
    open_BN = torch.tensor([[True, False, True, False, False, False], [False] * 6])
    *_, filled_BNS = sample_steps(model, classes(model, 1, 2), section(), 0, given_BNS=given_BNS, open_BN=open_BN)
    assert torch.equal(filled_BNS[~open_BN], given_BNS[~open_BN])
    assert (filled_BNS < model.mask).all()
    with pytest.raises(ValueError, match="needs both"):
        sample(model, classes(model, 1, 2), section(), 0, given_BNS=given_BNS)


def test_a_class_can_turn_into_another():
    model = small_model()
    path = between(model, [0, 2], 5)
    assert path.sum(1).tolist() == pytest.approx([1] * 5)
    assert path[2].tolist() == [0.5, 0, 0.5, 0, 0]
    assert sample(model, path, section(), 0).shape == (5, 6, 6)
    with pytest.raises(ValueError, match="two classes"):
        between(model, [1], 5)


@pytest.fixture(scope="module")
def taught():
    """A model that has seen class c mostly as sub-tokens of value c, and as random ones in a third of the cases."""
    model = small_model().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(150):
        labels_B = torch.randint(0, 4, (32,), generator=rng)
        noise_BNS = torch.randint(0, 8, (32, 6, 2), generator=rng)
        clear = torch.rand(32, 6, 2, generator=rng) < 2 / 3
        tokens_BNS = torch.where(clear, labels_B[:, None, None], noise_BNS)
        masked_BNS = torch.rand(32, 6, 1, generator=rng).expand(-1, -1, 2) < 0.6
        hidden_B = labels_B.masked_fill(torch.rand(32, generator=rng) < 0.2, model.any_class)
        logits = model(tokens_BNS.masked_fill(masked_BNS, model.mask), model.classes_of(hidden_B))
        loss = masked_cross_entropy(logits, tokens_BNS, masked_BNS, 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def share_of_class(model, **changes):
    labels_B = torch.arange(4).repeat(16)
    drawn_BNS = model.split(sample(model, model.classes_of(labels_B), section(**changes), seed=3))
    return (drawn_BNS == labels_B[:, None, None]).float().mean().item()


def test_what_is_drawn_follows_the_distribution_and_guidance_sharpens_it(taught):
    plain = share_of_class(taught, steps=1, guidance=0.0)
    assert plain == pytest.approx(2 / 3 + 1 / 24, abs=0.1)
    assert share_of_class(taught, steps=1, guidance=2.0) > plain + 0.1


def test_a_ramp_reaches_the_whole_guidance_in_the_last_step_only(taught):
    classes_BC = taught.classes_of(torch.arange(4))

    def drawn(steps, schedule):
        return sample(taught, classes_BC, section(steps=steps, guidance=4.0, guidance_schedule=schedule), seed=2)

    assert torch.equal(drawn(1, "ramped"), drawn(1, "constant"))
    assert not torch.equal(drawn(4, "ramped"), drawn(4, "constant"))


def test_without_noise_the_surest_places_come_first(taught):
    assert share_of_class(taught, temperature=0.0, guidance=0.0) > 0.6
