"""Properties common to all quantizers, and properties of each."""

from math import log2, sqrt

import pytest
import torch
import torch.nn.functional as F

from bsq_ray import config
from bsq_ray.models.quantizers import build_quantizer

CONFIGS = {
    "bsq": config.BSQConfig(bits=18),
    "bsq grouped": config.BSQConfig(bits=18, entropy=config.EntropyConfig(estimate="group", group_size=9)),
    "lfq": config.LFQConfig(bits=10),
    "fsq": config.FSQConfig(kind="fsq", levels=(8, 5, 5, 3, 2)),
    "vq": config.VQConfig(kind="vq", codebook_size=64, code_dim=6),
    "vq plain": config.VQConfig(kind="vq", codebook_size=64, code_dim=6, l2_normalize=False),
}


def random_vectors(channels, tokens=64, seed=0):
    return torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, ids=str)
def quantizer(request):
    torch.manual_seed(0)
    return build_quantizer(CONFIGS[request.param])


def test_dequantize_returns_the_forward_codes(quantizer):
    result = quantizer(random_vectors(quantizer.channels))
    assert result.bits_BNL.dtype == torch.bool
    assert result.bits_BNL.shape == (2, 64, quantizer.bits)
    assert torch.equal(quantizer.dequantize(result.bits_BNL), result.codes_BNC)


def test_quantizer_gradient_flows_and_bf16_input_uses_fp32(quantizer):
    """The gradient reaches the input vector, and a bf16 input is quantized in fp32."""
    v_BNC = random_vectors(quantizer.channels).requires_grad_()
    result = quantizer(v_BNC)
    (result.codes_BNC.square().sum() + result.codes_BNC.sum() + result.loss).backward()
    assert v_BNC.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        half = quantizer(v_BNC.detach().bfloat16())
    assert half.codes_BNC.dtype == half.loss.dtype == torch.float32
    assert torch.equal(half.bits_BNL, quantizer(v_BNC.detach().bfloat16().float()).bits_BNL)


@pytest.mark.parametrize("bits", [1, 2, 18, 36, 63, 128])
def test_bsq_any_number_of_bits_gives_unit_codes(bits):
    quantizer = build_quantizer(config.BSQConfig(bits=bits))
    result = quantizer(random_vectors(bits))
    assert torch.allclose(result.codes_BNC.norm(dim=-1), torch.ones(2, 64))
    assert torch.equal(quantizer.dequantize(result.bits_BNL), result.codes_BNC)


def test_bsq_sign_of_zero_is_positive():
    result = build_quantizer(config.BSQConfig(bits=4))(torch.tensor([[[0.0, -1.0, 1.0, -0.0]]]))
    assert result.bits_BNL.tolist() == [[[True, False, True, True]]]


@pytest.mark.parametrize("name", ["bsq", "bsq grouped", "vq"])
@pytest.mark.parametrize("length", [0.0, 1e-20])
def test_vector_without_direction_has_no_gradient(name, length):
    """A null vector gets no gradient instead of one of 1e11, and does not change that of other vectors."""
    torch.manual_seed(0)
    quantizer = build_quantizer(CONFIGS[name])
    v_BNC = random_vectors(quantizer.channels, tokens=4)
    v_BNC[0, 0] = length * v_BNC[0, 0]
    v_BNC.requires_grad_()
    result = quantizer(v_BNC)
    (result.codes_BNC.sum() + result.loss).backward()
    assert v_BNC.grad[0, 0].abs().max() == 0
    assert 0 < v_BNC.grad.abs().max() < 1e2


def test_parts_with_batch_statistics_give_gradient_of_whole_batch(quantizer):
    """Parts that know the statistics of the batch have the mean loss and the gradient of the whole batch."""
    whole_BNC = random_vectors(quantizer.channels).requires_grad_()
    expected = quantizer(whole_BNC).loss
    if expected.requires_grad:
        expected.backward()
    parts = [part.detach().requires_grad_() for part in whole_BNC.split(16, dim=1)]
    statistics = [quantizer.batch_statistics(part) for part in parts]
    mean = None if statistics[0] is None else torch.stack(statistics).mean(0).detach()
    losses = [quantizer(part, mean).loss for part in parts]
    assert float(sum(losses) / len(parts)) == pytest.approx(float(expected), rel=1e-5)
    if expected.requires_grad:
        (sum(losses) / len(parts)).backward()
        torch.testing.assert_close(torch.cat([part.grad for part in parts], 1), whole_BNC.grad, rtol=1e-4, atol=1e-7)


def test_bsq_gradient_matches_straight_through_formula():
    """1/sqrt(L) with respect to u, then the Jacobian of v / |v|."""
    v = random_vectors(6, tokens=1)[:1].requires_grad_()
    weight = random_vectors(6, tokens=1, seed=1)[:1]
    (build_quantizer(config.BSQConfig(bits=6))(v).codes_BNC * weight).sum().backward()
    u, norm = F.normalize(v.detach(), dim=-1), v.detach().norm()
    expected = (weight - u * (u * weight).sum()) / norm / sqrt(6)
    torch.testing.assert_close(v.grad, expected)


def test_bsq_quantization_error_is_within_paper_bound():
    u = F.normalize(random_vectors(18, tokens=2000), dim=-1)
    error = (build_quantizer(config.BSQConfig(bits=18))(u).codes_BNC - u).norm(dim=-1)
    assert error.mean() == pytest.approx(0.613, abs=0.005)
    assert error.max() < sqrt(2 - 2 / sqrt(18))


def test_bsq_and_lfq_share_bits_but_only_bsq_normalizes():
    """BSQ and LFQ choose the same bits; LFQ codes have entries of ±1 instead of unit norm."""
    v = random_vectors(10)
    bsq, lfq = build_quantizer(config.BSQConfig(bits=10))(v), build_quantizer(config.LFQConfig(bits=10))(v)
    assert torch.equal(bsq.bits_BNL, lfq.bits_BNL)
    assert torch.equal(lfq.codes_BNC.abs(), torch.ones_like(v))


def penalty(v, **entropy):
    return build_quantizer(config.BSQConfig(bits=v.shape[-1], entropy=config.EntropyConfig(**entropy)))(v).loss


def test_entropy_penalty_diverse_batch_is_lower():
    spread = F.normalize(torch.sign(random_vectors(12, tokens=500)), dim=-1)
    collapsed = spread[:1, :1].expand_as(spread)
    for sharp in (1.0, 100.0):
        assert penalty(spread, inverse_temperature=sharp) < penalty(collapsed, inverse_temperature=sharp) - 1e-3


def test_entropy_penalty_confident_tokens_are_lower():
    confident = F.normalize(torch.sign(random_vectors(12, tokens=500)), dim=-1)
    wavering = F.normalize(random_vectors(12, tokens=500), dim=-1)
    options = dict(codebook_weight=0.0, inverse_temperature=10.0)
    assert penalty(confident, **options) < penalty(wavering, **options)


def test_entropy_penalty_random_vectors_match_formula():
    """At inverse temperature 1 the penalty of random unit vectors is about -(2/L)(1 - |E u|²), -0.11 nats at L = 18."""
    assert penalty(random_vectors(18, tokens=5000)).item() == pytest.approx(-0.1093, abs=0.002)


def test_entropy_penalty_every_option_has_an_effect():
    v = random_vectors(18) + 0.3
    default = penalty(v)
    changes = [
        dict(inverse_temperature=2.0),
        dict(per_sample_weight=0.0),
        dict(codebook_weight=0.5),
        dict(weight=2.0),
        dict(estimate="group", group_size=9, inverse_temperature=20.0),
    ]
    values = [penalty(v, **change) for change in changes]
    assert all(abs(value - default) > 1e-4 for value in values)
    assert penalty(v, weight=2.0) == pytest.approx(2 * default.item())
    with_commit = build_quantizer(config.BSQConfig(bits=18, commitment_weight=0.25))(v)
    assert with_commit.loss > default
    assert with_commit.stats["commit"] > 0


def test_quantizer_stats_entropies_are_in_bits():
    stats = build_quantizer(config.BSQConfig(bits=18))(random_vectors(18)).stats
    assert 0 <= stats["per_sample_entropy"] <= 18
    assert 0 <= stats["codebook_entropy"] <= 18


def test_grouped_entropy_of_18_bits_fits_in_memory():
    """2^18 codes for 2,048 tokens: the average is a matrix product of halves, not 0.5 G probabilities."""
    section = config.BSQConfig(
        bits=18, entropy=config.EntropyConfig(estimate="group", group_size=18, inverse_temperature=20.0)
    )
    result = build_quantizer(section)(random_vectors(18, tokens=1024))
    assert 8 < result.stats["codebook_entropy"] < log2(2**18)


def test_fsq_uses_exactly_its_levels():
    quantizer = build_quantizer(config.FSQConfig(kind="fsq", levels=(8, 5, 2)))
    codes = quantizer(10 * random_vectors(3, tokens=4000)).codes_BNC
    for channel, levels in enumerate((8, 5, 2)):
        assert len(codes[..., channel].unique()) == levels
    assert quantizer.bits == 3 + 3 + 1


def test_fsq_dequantize_clamps_to_last_level():
    quantizer = build_quantizer(config.FSQConfig(kind="fsq", levels=(5,)))
    all_patterns = torch.tensor([[[bool(i >> j & 1) for j in range(3)] for i in range(8)]])
    assert quantizer.dequantize(all_patterns).flatten().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_vq_selects_nearest_codebook_row(l2_normalize, monkeypatch):
    monkeypatch.setattr("bsq_ray.models.quantizers.vq._MAX_DISTANCES", 64 * 10)
    quantizer = build_quantizer(config.VQConfig(kind="vq", codebook_size=64, code_dim=6, l2_normalize=l2_normalize))
    torch.nn.init.normal_(quantizer.codebook)
    v = random_vectors(6)
    rows = F.normalize(quantizer.codebook, dim=-1) if l2_normalize else quantizer.codebook
    target = F.normalize(v, dim=-1) if l2_normalize else v
    expected = rows[torch.cdist(target, rows).argmin(-1)]
    torch.testing.assert_close(quantizer(v).codes_BNC, expected)


def test_vq_losses_train_vector_and_codebook_separately():
    """The commitment loss moves the vector, and the codebook loss moves the codebook row."""
    v = random_vectors(6).requires_grad_()
    quantizer = build_quantizer(config.VQConfig(kind="vq", codebook_size=16, code_dim=6, commitment_weight=0.0))
    quantizer(v).loss.backward()
    assert v.grad.abs().max() == 0
    assert quantizer.codebook.grad.abs().sum() > 0
    build_quantizer(config.VQConfig(kind="vq", codebook_size=16, code_dim=6, commitment_weight=1.0))(v).loss.backward()
    assert v.grad.abs().sum() > 0


def test_bsq_matches_vector_quantize_pytorch():
    """The spherical option of vector-quantize-pytorch's LFQ quantizes to the same points."""
    vector_quantize = pytest.importorskip("vector_quantize_pytorch")
    public = vector_quantize.LFQ(codebook_size=2**12, dim=12, spherical=True, force_quantization_f32=True)
    v = random_vectors(12)
    expected, _, _ = public.eval()(v)
    torch.testing.assert_close(build_quantizer(config.BSQConfig(bits=12))(v).codes_BNC, expected)
