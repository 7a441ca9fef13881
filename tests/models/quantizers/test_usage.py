"""Code usage."""

import pytest
import torch

from bsq_ray.models.quantizers.usage import CodeUsage


def test_all_codes_seen_equally_often_use_everything():
    usage = CodeUsage(4)
    usage.update(torch.tensor([[[bool(i >> j & 1) for j in range(4)] for i in range(16)]]))
    figures = usage.compute()
    assert figures["code_usage"] == 1
    assert figures["code_perplexity"] == pytest.approx(16)
    assert figures["bit_entropy"] == pytest.approx(1)
    assert figures["tokens"] == 16


def test_one_code_uses_one_of_many_and_a_constant_bit_has_no_entropy():
    usage = CodeUsage(18)
    usage.update(torch.zeros(2, 8, 18, dtype=torch.bool))
    figures = usage.compute()
    assert figures["code_usage"] == 1 / 2**18
    assert figures["code_perplexity"] == 1
    assert figures["bit_entropy_min"] == 0


def test_thirty_six_bits_are_measured_by_sub_tokens():
    usage = CodeUsage(36)
    usage.update(torch.rand(4, 64, 36) < 0.5)
    assert usage.sub_bits == 18
    assert 0 < usage.compute()["code_usage"] <= 256 / 2**18
    assert len(usage.bit_entropies()) == 36


def test_batches_add_up_to_the_whole():
    bits = torch.rand(6, 10, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    whole, gathered = CodeUsage(12), CodeUsage(12)
    whole.update(bits)
    gathered.update(bits[:2])
    gathered.update(bits[2:])
    assert gathered.compute() == whole.compute()
    assert gathered.bit_entropies() == whole.bit_entropies()
