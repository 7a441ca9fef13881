"""Entropies of soft binary quantization, compared with the explicit distribution over all 2^L codes."""

import itertools
from math import log

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bsq_ray.models.quantizers.entropy import bit_statistics, grouped_codebook_entropy
from bsq_ray.models.quantizers.entropy import bitwise_codebook_entropy as entropy_of_means


def per_sample_entropy(logits_NL):
    return bit_statistics(logits_NL)[0]


def bitwise_codebook_entropy(logits_NL, across_workers=False):
    return entropy_of_means(bit_statistics(logits_NL)[1], across_workers)


def explicit_distribution(logits_NL):
    """softmax over all codes of the sum of signed half logits: the definition, in O(N·2^L)."""
    length = logits_NL.shape[1]
    codes_KL = torch.tensor(list(itertools.product([-0.5, 0.5], repeat=length)), dtype=logits_NL.dtype)
    return torch.softmax(logits_NL @ codes_KL.T, dim=-1)


def entropy(p):
    return torch.special.entr(p).sum(-1)


@pytest.fixture
def logits_NL():
    return 2 * torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_per_sample_entropy_matches_explicit(logits_NL):
    torch.testing.assert_close(per_sample_entropy(logits_NL), entropy(explicit_distribution(logits_NL)).mean())


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_grouped_entropy_matches_explicit_average(logits_NL, group_size):
    """The grouped entropy is that of each group's explicit batch-averaged distribution."""
    groups = logits_NL.split(group_size, dim=1)
    expected = sum(entropy(explicit_distribution(group).mean(0)) for group in groups)
    torch.testing.assert_close(grouped_codebook_entropy(logits_NL, group_size), expected)


def test_grouped_entropy_of_single_bits_is_bitwise(logits_NL):
    torch.testing.assert_close(grouped_codebook_entropy(logits_NL, 1), bitwise_codebook_entropy(logits_NL))


def test_bitwise_entropy_is_upper_bound(logits_NL):
    correlated_NL = logits_NL[:, :1].expand(-1, 8) * 3
    assert bitwise_codebook_entropy(correlated_NL) > 1.5 * grouped_codebook_entropy(correlated_NL, 8)
    assert bitwise_codebook_entropy(logits_NL) >= grouped_codebook_entropy(logits_NL, 8)


def test_entropy_extreme_logits_stay_finite():
    logits_NL = torch.tensor([[1e4, -1e4, 0.0, 80.0]], requires_grad=True)
    total = per_sample_entropy(logits_NL) + bitwise_codebook_entropy(logits_NL)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits_NL.grad).all()
    assert per_sample_entropy(logits_NL.detach()).item() == pytest.approx(log(2), abs=1e-4)


def test_entropy_gradients_match_finite_differences(logits_NL):
    logits_NL = logits_NL[:4].requires_grad_()
    assert torch.autograd.gradcheck(per_sample_entropy, logits_NL)
    assert torch.autograd.gradcheck(bitwise_codebook_entropy, logits_NL)
    assert torch.autograd.gradcheck(lambda x: grouped_codebook_entropy(x, 4), logits_NL)


def grouped_by_four(logits_NL, across_workers):
    return grouped_codebook_entropy(logits_NL, 4, across_workers)


@pytest.mark.parametrize("estimate", [bitwise_codebook_entropy, grouped_by_four])
def test_entropy_across_workers_matches_joined_batch(logits_NL, estimate, tmp_path):
    """Two workers get the value and the averaged gradient of the joined batch."""
    joined_NL = logits_NL.clone().requires_grad_()
    value = estimate(joined_NL, False)
    value.backward()
    results = run_two_workers(_worker_entropy, tmp_path, logits_NL, estimate)
    for rank, (worker_value, gradient) in enumerate(results):
        torch.testing.assert_close(worker_value, value.detach())
        # Each worker's gradient is later divided by the number of workers.
        torch.testing.assert_close(gradient / 2, joined_NL.grad[rank * 25 : (rank + 1) * 25])


def _worker_entropy(rank, folder, logits_NL, estimate):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    local_NL = logits_NL[rank * 25 : (rank + 1) * 25].clone().requires_grad_()
    if rank == 0:
        with torch.no_grad():  # would wait for the other worker for ever if it took part
            assert estimate(local_NL, True) == estimate(local_NL, False)
    value = estimate(local_NL, True)
    value.backward()
    torch.save((value.detach(), local_NL.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_two_workers(worker, folder, *args):
    mp.spawn(worker, args=(str(folder), *args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
