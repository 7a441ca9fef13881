"""Nested bits: samples that keep different numbers of bits, compared with a loop over samples in fp64."""

import pytest
import torch

from bsq_ray import config
from bsq_ray.models.quantizers import KeptBits, build_quantizer
from bsq_ray.models.quantizers.binary import BinaryQuantizer

KEEP = (4, 8, 12)
KEPT_B = torch.tensor([4, 12, 8, 12, 4, 12])
ENTROPIES = {
    "analytical": config.EntropyConfig(inverse_temperature=2.0, codebook_weight=0.7),
    "group": config.EntropyConfig(estimate="group", group_size=4, inverse_temperature=2.0, codebook_weight=0.7),
}


def nested(estimate="analytical", kind="bsq"):
    make = config.BSQConfig if kind == "bsq" else config.LFQConfig
    return build_quantizer(make(kind=kind, bits=12, keep=KEEP, entropy=ENTROPIES[estimate], commitment_weight=0.1))


def random_vectors(dtype=torch.float64):
    return torch.randn(6, 5, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))


def kept_bits(kept_B=KEPT_B, dtype=torch.float64, share_L=None):
    share_L = (kept_B[:, None] > torch.arange(12)).to(dtype).mean(0) if share_L is None else share_L
    return KeptBits(kept_B, share_L)


def code_probabilities(logits_NL, group_size):
    """Probabilities of all codes of each group of bits, by enumeration."""
    result = []
    for group_Ng in torch.sigmoid(logits_NL).split(group_size, 1):
        joint_NK = torch.ones(len(group_Ng), 1, dtype=group_Ng.dtype)
        for p_N1 in group_Ng.split(1, 1):
            joint_NK = torch.cat([joint_NK * (1 - p_N1), joint_NK * p_N1], 1)
        result.append(joint_NK)
    return result


def explicit_loop(quantizer, v_BNC, kept_B):
    """Codes, their straight-through surrogate, and the penalty, sample by sample and bit group by bit group."""
    entropy_config = quantizer.entropy_config
    size = entropy_config.group_size if entropy_config.estimate == "group" else 1
    probabilities = [[] for _ in range(12 // size)]
    codes, surrogates, entropies, commitments = [], [], [], []
    for v_NC, k in zip(v_BNC, kept_B.tolist(), strict=True):
        u_Nk = v_NC[:, :k]
        scale = 1.0
        if quantizer.is_spherical:
            u_Nk, scale = u_Nk / u_Nk.norm(dim=-1, keepdim=True), k**-0.5
        codes_Nk = torch.where(u_Nk >= 0, scale, -scale)
        zeros = torch.zeros(5, 12 - k, dtype=v_NC.dtype)
        codes.append(torch.cat([codes_Nk, zeros], 1))
        surrogates.append(torch.cat([u_Nk * scale, zeros], 1))
        commitments.append((codes_Nk.detach() - u_Nk).square().sum(-1).mean())
        logits_Nk = 4 * scale * entropy_config.inverse_temperature * u_Nk
        p = torch.sigmoid(logits_Nk)
        entropies.append((torch.special.entr(p) + torch.special.entr(1 - p)).sum(-1).mean())
        for group, joint_NK in enumerate(code_probabilities(logits_Nk, size)):
            probabilities[group].append(joint_NK)
    codebook = sum(
        len(parts) / len(kept_B) * torch.special.entr(torch.cat(parts).mean(0)).sum()
        for parts in probabilities
        if parts
    )
    penalty = torch.stack(entropies).mean() - entropy_config.codebook_weight * codebook
    penalty = penalty / entropy_config.inverse_temperature + 0.1 * torch.stack(commitments).mean()
    return torch.stack(codes), torch.stack(surrogates), penalty


@pytest.mark.parametrize("kind", ["bsq", "lfq"])
@pytest.mark.parametrize("estimate", ENTROPIES)
def test_nested_quantizer_equals_loop_over_samples(estimate, kind):
    """Codes, penalty and gradient are those of a quantizer with as many bits for each sample."""
    quantizer = nested(estimate, kind)
    quantizer.is_spherical = kind == "bsq"
    weight_BNC = torch.rand(6, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v_BNC, expected_BNC = random_vectors().requires_grad_(), random_vectors().requires_grad_()
    result = quantizer.quantize_nested(v_BNC, kept_bits(), None)
    ((result.codes_BNC * weight_BNC).sum() + result.loss).backward()
    codes_BNC, surrogate_BNC, penalty = explicit_loop(quantizer, expected_BNC, KEPT_B)
    ((surrogate_BNC * weight_BNC).sum() + penalty).backward()
    torch.testing.assert_close(result.codes_BNC, codes_BNC)
    torch.testing.assert_close(result.loss, penalty)
    torch.testing.assert_close(v_BNC.grad, expected_BNC.grad)
    assert torch.equal(result.bits_BNL, v_BNC >= 0)


@pytest.mark.parametrize("estimate", ENTROPIES)
def test_nested_penalty_gradient_matches_differences(estimate):
    quantizer = nested(estimate)
    v_BNC = random_vectors()[:, :2].contiguous().requires_grad_()
    # Without the commitment loss, whose target is constant in the backward pass only.
    quantizer.commitment_weight = 0.0
    assert torch.autograd.gradcheck(lambda v: quantizer.quantize_nested(v, kept_bits(), None).loss, v_BNC)


@pytest.mark.parametrize("estimate", ENTROPIES)
def test_nested_parts_give_gradient_of_whole_batch(estimate):
    """Parts have the mean loss and gradient of the batch, also a part in which no sample keeps the last bits."""
    quantizer, order_B = nested(estimate), torch.tensor([0, 4, 1, 3, 2, 5])
    whole_BNC, kept_B = random_vectors(torch.float32)[order_B].requires_grad_(), KEPT_B[order_B]
    whole = kept_bits(kept_B, torch.float32)
    expected = quantizer(whole_BNC, None, whole).loss
    expected.backward()
    parts = [part.detach().requires_grad_() for part in whole_BNC.split(2)]
    kept = [kept_bits(part_B, share_L=whole.share_L) for part_B in kept_B.split(2)]
    assert kept[0].num_kept_B.max() < 12
    mean = torch.stack([quantizer.batch_statistics(*part) for part in zip(parts, kept, strict=True)]).mean(0).detach()
    losses = [quantizer(part, mean, part_kept).loss for part, part_kept in zip(parts, kept, strict=True)]
    mean_loss = sum(losses) / len(losses)
    mean_loss.backward()
    assert float(mean_loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole_BNC.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("estimate", ENTROPIES)
def test_nested_with_all_bits_equals_ordinary(estimate):
    v_BNC = random_vectors(torch.float32)
    expected, result = (
        nested(estimate)(v_BNC),
        nested(estimate)(v_BNC, None, kept_bits(torch.full((6,), 12), torch.float32)),
    )
    assert torch.equal(result.codes_BNC, expected.codes_BNC)
    torch.testing.assert_close(result.loss, expected.loss)
    assert result.stats.keys() == expected.stats.keys()


def test_nested_codes_equal_those_of_prefixes():
    """`dequantize` returns the codes of training for every number of bits, of unit length."""
    quantizer = build_quantizer(config.BSQConfig(bits=128, keep=(1, 128)))
    v_BNC = torch.randn(128, 3, 128, generator=torch.Generator().manual_seed(2))
    result = quantizer(v_BNC, None, KeptBits(torch.arange(1, 129), torch.linspace(1, 1 / 128, 128)))
    for k in range(1, 129):
        codes_NC = quantizer.dequantize(result.bits_BNL[k - 1 : k, :, :k])[0]
        assert torch.equal(codes_NC, result.codes_BNC[k - 1])
    torch.testing.assert_close(result.codes_BNC.norm(dim=-1), torch.ones(128, 3))


def test_quantizer_without_prefixes_rejects_kept_bits():
    quantizer = build_quantizer(config.FSQConfig(kind="fsq", levels=(8, 8)))
    assert not isinstance(quantizer, BinaryQuantizer)
    with pytest.raises(ValueError, match="FiniteScalarQuantizer has no nested bits"):
        quantizer(torch.zeros(1, 1, 2), None, kept_bits(torch.ones(1, dtype=torch.long)))
