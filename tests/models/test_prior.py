"""The prior: causal, exact, and the same token by token as in one pass."""

import math

import pytest
import torch

from bsq_ray import Prior, config
from bsq_ray.models.prior import binary_tree_nodes, code_length


def small_config(**changes):
    keys = {"grid": [1, 2, 3], "bits": 6, "sub_bits": 3, "width": 32, "layers": 2, "heads": 4, "dropout": 0}
    return config.PriorModelConfig.model_validate(keys | changes)


def small_prior(**changes):
    torch.manual_seed(0)
    return Prior(small_config(**changes)).eval()


def random_tokens(batch, prior, seed=0):
    model_config = prior.config
    shape = (batch, model_config.num_tokens, model_config.num_sub_tokens)
    return torch.randint(0, 2**model_config.sub_bits, shape, generator=torch.Generator().manual_seed(seed))


def test_prior_parameter_count_matches_paper():
    with torch.device("meta"):
        prior = Prior(config.load_config("imagenet128-prior").model)
    assert sum(p.numel() for p in prior.blocks.parameters()) == 24 * (12 * 768**2 + 13 * 768)


def test_binary_tree_nodes_least_significant_bit_first():
    nodes, bits = binary_tree_nodes(torch.tensor([0b110]), 3)
    assert bits.tolist() == [[0, 1, 1]]
    assert nodes.tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("sub_bits", [1, 3, 6])
def test_prior_probabilities_sum_to_one(sub_bits):
    prior = small_prior(sub_bits=sub_bits)
    values = torch.arange(2**sub_bits)
    context = random_tokens(1, prior)[:, :1, :0].expand(len(values), -1, -1)
    h_BND = torch.randn(1, 1, 32).expand(len(values), -1, -1)
    logits_BNSK = prior.node_logits(h_BND, context)[:, :, None]
    nats = code_length(logits_BNSK, values[:, None, None], sub_bits)
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)


def test_prior_is_causal():
    prior = small_prior()
    base = random_tokens(1, prior)
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
def test_incremental_decoder_matches_parallel_pass(grid):
    """Check images, and clips of 1,024 tokens."""
    prior = small_prior(grid=grid)
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(20)
        sub_tokens_BNS = random_tokens(2, prior)
        logits_BNSK = prior(sub_tokens_BNS)
        assert logits_BNSK.std() > 0.5
        decoder = prior.start_decoding(2)
        for n in range(prior.config.num_tokens):
            h_B1D = decoder.next_features()
            for s in range(2):
                step = prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])[:, 0]
                assert (step - logits_BNSK[:, n, s]).abs().max() < 1e-4
            decoder.push(sub_tokens_BNS[:, n])


@pytest.mark.parametrize("sub_bits", [1, 3])
def test_plane_prior_is_causal_in_order_of_planes(sub_bits):
    """A sub-token depends on exactly those before it: earlier planes of all tokens, then earlier tokens."""
    prior = small_prior(order="plane", sub_bits=sub_bits)
    base, (num_tokens, num_planes) = random_tokens(1, prior), (6, 6 // sub_bits)
    logits = prior(base)
    for plane, n in [(0, 0), (0, 5), (1, 2), (num_planes - 1, 4)]:
        changed = base.clone()
        changed[0, n, plane] ^= 1
        differs_NS = (prior(changed) != logits).any(-1)[0]
        order_NS = torch.arange(num_planes) * num_tokens + torch.arange(num_tokens)[:, None]
        assert torch.equal(differs_NS, order_NS > plane * num_tokens + n)


@pytest.mark.parametrize("sub_bits", [1, 2, 6])
def test_plane_decoder_matches_parallel_pass(sub_bits):
    prior = small_prior(order="plane", sub_bits=sub_bits)
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(20)
        sub_tokens_BNS = random_tokens(2, prior)
        logits_BNSK = prior(sub_tokens_BNS)
        assert logits_BNSK.std() > 0.5
        decoder = prior.start_plane_decoding(2)
        for s in range(6 // sub_bits):
            for n in range(6):
                earlier_B1s = sub_tokens_BNS[:, n : n + 1, :s]
                step = prior.node_logits(decoder.next_features(earlier_B1s), earlier_B1s)[:, 0]
                assert (step - logits_BNSK[:, n, s]).abs().max() < 1e-4
                decoder.push(sub_tokens_BNS[:, n, s])


def test_plane_prior_of_first_planes_matches_all():
    prior = small_prior(order="plane")
    sub_tokens_BNS = random_tokens(2, prior)
    torch.testing.assert_close(prior(sub_tokens_BNS[..., :1]), prior(sub_tokens_BNS)[:, :, :1], rtol=0, atol=1e-5)


def test_plane_prior_learns_from_later_tokens_of_earlier_plane():
    """The second plane repeats the first one of the next token, which only this order has seen."""
    prior = small_prior(order="plane").train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for seed in range(200):
        sub_tokens_BNS = random_tokens(32, prior, seed)
        sub_tokens_BNS[..., 1] = sub_tokens_BNS[..., 0].roll(-1, 1)
        nats_BNS = code_length(prior(sub_tokens_BNS), sub_tokens_BNS, 3)
        optimizer.zero_grad()
        nats_BNS.sum((1, 2)).mean().backward()
        optimizer.step()
    bits_S = nats_BNS.mean((0, 1)) / math.log(2)
    assert bits_S[0].item() == pytest.approx(3, abs=0.3)
    assert bits_S[1].item() < 0.5


def test_prior_prefix_matches_full_sequence():
    """Such as those of a clip's first frames."""
    prior = small_prior(grid=(3, 2, 2))
    sub_tokens_BNS = random_tokens(2, prior)
    whole = prior(sub_tokens_BNS)
    torch.testing.assert_close(prior(sub_tokens_BNS[:, :8]), whole[:, :8], rtol=0, atol=1e-5)


def test_prior_learns_repeated_tokens():
    """Tokens that repeat the one before, but for the first: only that one costs anything."""
    prior = small_prior().train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for seed in range(150):
        sub_tokens_BNS = random_tokens(32, prior, seed)[:, :1].expand(-1, 6, -1)
        loss = code_length(prior(sub_tokens_BNS), sub_tokens_BNS, 3).sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() / math.log(2) == pytest.approx(6, abs=1.0)


def test_prior_save_and_load_roundtrip(tmp_path):
    prior = small_prior()
    model_id = prior.save_pretrained(str(tmp_path / "model"))
    loaded = Prior.from_pretrained(str(tmp_path / "model"))
    assert loaded.model_id == model_id
    assert torch.equal(prior(random_tokens(2, prior)), loaded(random_tokens(2, prior)))
