"""Code usage."""

import pytest
import torch

from bsq_ray.models.quantizers.usage import CodeUsage


def test_code_usage_uniform_codes_give_full_usage():
    usage = CodeUsage(4)
    usage.update(torch.tensor([[[bool(i >> j & 1) for j in range(4)] for i in range(16)]]))
    metrics = usage.compute()
    assert metrics["code_usage"] == 1
    assert metrics["code_perplexity"] == pytest.approx(16)
    assert metrics["bit_entropy"] == pytest.approx(1)
    assert metrics["tokens"] == 16


def test_code_usage_single_code_has_no_entropy():
    """A single code uses one of 2^18 codes, and constant bits have zero entropy."""
    usage = CodeUsage(18)
    usage.update(torch.zeros(2, 8, 18, dtype=torch.bool))
    metrics = usage.compute()
    assert metrics["code_usage"] == 1 / 2**18
    assert metrics["code_perplexity"] == 1
    assert metrics["bit_entropy_min"] == 0


def test_code_usage_36_bits_uses_sub_tokens():
    usage = CodeUsage(36)
    usage.update(torch.rand(4, 64, 36) < 0.5)
    assert usage.sub_bits == 18
    assert 0 < usage.compute()["code_usage"] <= 256 / 2**18
    assert len(usage.bit_entropies()) == 36


def test_code_usage_batches_accumulate():
    bits = torch.rand(6, 10, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    whole, incremental = CodeUsage(12), CodeUsage(12)
    whole.update(bits)
    incremental.update(bits[:2])
    incremental.update(bits[2:])
    assert incremental.compute() == whole.compute()
    assert incremental.bit_entropies() == whole.bit_entropies()


def test_code_usage_counts_of_workers_add_up():
    """The summed counts of two workers are the counts of all tokens."""
    bits = torch.rand(6, 10, 36, generator=torch.Generator().manual_seed(0)) < 0.3
    whole, left, right = CodeUsage(36), CodeUsage(36), CodeUsage(36)
    whole.update(bits)
    left.update(bits[:2])
    right.update(bits[2:])
    left.set_counts(left.counts() + right.counts())
    assert left.compute() == whole.compute()
    assert left.bit_entropies() == whole.bit_entropies()
