"""The prior: causal, exact, and the same token by token as in one pass."""

import math

import pytest
import torch

from bsq_ray import Prior, config
from bsq_ray.models.prior import path_cost, path_nodes


def small_section(**changes):
    keys = {"grid": [1, 2, 3], "bits": 6, "sub_bits": 3, "width": 32, "layers": 2, "heads": 4, "dropout": 0}
    return config.PriorModel.model_validate(keys | changes)


def small_prior(**changes):
    torch.manual_seed(0)
    return Prior(small_section(**changes)).eval()


def tokens(batch, prior, seed=0):
    section = prior.config
    shape = (batch, section.tokens, section.sub_tokens)
    return torch.randint(0, 2**section.sub_bits, shape, generator=torch.Generator().manual_seed(seed))


def test_the_papers_prior_has_24_blocks_of_width_768():
    with torch.device("meta"):
        prior = Prior(config.load_config("imagenet128-prior").model)
    assert sum(p.numel() for p in prior.blocks.parameters()) == 24 * (12 * 768**2 + 13 * 768)


def test_a_walk_takes_the_least_significant_bit_first():
    nodes, bits = path_nodes(torch.tensor([0b110]), 3)
    assert bits.tolist() == [[0, 1, 1]]
    assert nodes.tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("sub_bits", [1, 3, 6])
def test_probabilities_of_all_values_add_up_to_one(sub_bits):
    prior = small_prior(sub_bits=sub_bits)
    values = torch.arange(2**sub_bits)
    context = tokens(1, prior)[:, :1, :0].expand(len(values), -1, -1)
    h_BND = torch.randn(1, 1, 32).expand(len(values), -1, -1)
    logits_BNSK = prior.node_logits(h_BND, context)[:, :, None]
    nats = path_cost(logits_BNSK, values[:, None, None], sub_bits)
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)


def test_no_token_sees_itself_or_what_follows():
    prior = small_prior()
    base = tokens(1, prior)
    logits = prior(base)
    for n in range(6):
        changed = base.clone()
        changed[0, n] = (changed[0, n] + 1) % 8
        other = prior(changed)
        assert torch.equal(other[0, :n], logits[0, :n])
        assert torch.equal(other[0, n, 0], logits[0, n, 0])
        assert not torch.allclose(other[0, n, 1], logits[0, n, 1]), "a later sub-token sees the earlier one"
        if n < 5:
            assert not torch.allclose(other[0, n + 1], logits[0, n + 1])


@pytest.mark.parametrize("grid", [(1, 2, 3), (4, 16, 16)])
def test_token_by_token_gives_the_logits_of_the_parallel_pass(grid):
    """Of images, and of clips of 1,024 tokens."""
    prior = small_prior(grid=grid)
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(20)
        sub_tokens_BNS = tokens(2, prior)
        logits_BNSK = prior(sub_tokens_BNS)
        assert logits_BNSK.std() > 0.5
        decoding = prior.start_decoding(2)
        for n in range(prior.config.tokens):
            h_B1D = decoding.features()
            for s in range(2):
                step = prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])[:, 0]
                assert (step - logits_BNSK[:, n, s]).abs().max() < 1e-4
            decoding.push(sub_tokens_BNS[:, n])


def test_the_first_tokens_can_be_asked_for_alone():
    """Such as those of a clip's first frames."""
    prior = small_prior(grid=(3, 2, 2))
    sub_tokens_BNS = tokens(2, prior)
    whole = prior(sub_tokens_BNS)
    torch.testing.assert_close(prior(sub_tokens_BNS[:, :8]), whole[:, :8], rtol=0, atol=1e-5)


def test_it_learns_what_can_be_known():
    """Tokens that repeat the one before, but for the first: only that one costs anything."""
    prior = small_prior().train()
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for seed in range(150):
        sub_tokens_BNS = tokens(32, prior, seed)[:, :1].expand(-1, 6, -1)
        loss = path_cost(prior(sub_tokens_BNS), sub_tokens_BNS, 3).sum((1, 2)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() / math.log(2) == pytest.approx(6, abs=1.0)


def test_a_model_folder_gives_the_same_model_back(tmp_path):
    prior = small_prior()
    identity = prior.save_pretrained(str(tmp_path / "model"))
    again = Prior.from_pretrained(str(tmp_path / "model"))
    assert again.model_id == identity
    assert torch.equal(prior(tokens(2, prior)), again(tokens(2, prior)))
