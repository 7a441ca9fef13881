"""Bit noise: which bits flip, and what flipped bits do to codes, losses and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer_stage import build, losses, run_phases

from bsq_ray import config
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.stream import evaluation_batches
from bsq_ray.data.transforms import to_float
from bsq_ray.models.quantizers import flip_signs
from bsq_ray.models.tokenizer import Tokens
from bsq_ray.training.stages.bit_noise import BitNoise, sample_flips

CPU = torch.device("cpu")
SHAPE = (64, 18)
NOISE = ["training.bit_noise.images=1", "training.bit_noise.rate=0.3", "loss.adversarial.weight=0"]


@pytest.fixture(scope="module")
def batch(photo_shards):
    return next(evaluation_batches(ImageSource(read_manifest(photo_shards), config.DataConfig(), 32), 8))


def test_bit_noise_has_configured_share_and_mean_rate():
    """A third of the samples has flips; their probabilities are uniform between 0 and the highest one."""
    rates = np.array([sample_flips(0, 3, position, SHAPE, 1 / 3, 0.2).mean() for position in range(3000)])
    noisy = rates[rates > 0]
    assert len(noisy) / len(rates) == pytest.approx(1 / 3, abs=0.03)
    assert noisy.mean() == pytest.approx(0.1, abs=0.005)
    assert np.quantile(noisy, [0.25, 0.75]) == pytest.approx([0.05, 0.15], abs=0.012)
    assert noisy.max() < 0.25


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_bit_noise_of_parts_is_that_of_the_batch(seed, step, batch_per_part, num_parts):
    """Micro batches have the flips of their positions in the batch."""
    noise = BitNoise(config.BitNoiseConfig(images=0.7, rate=0.5), seed)
    [whole] = noise.sample([(batch_per_part * num_parts, 4, 5)], step, 0.3, CPU)
    parts = noise.sample([(batch_per_part, 4, 5)] * num_parts, step, 0.3, CPU)
    for index, part in enumerate(parts):
        assert torch.equal(part, whole[index::num_parts])


def test_bit_noise_changes_with_step_position_and_seed():
    masks = {
        sample_flips(seed, step, position, SHAPE, 1.0, 0.5).tobytes()
        for seed in (0, 1)
        for step in (0, 1)
        for position in (0, 1)
    }
    assert len(masks) == 8


def test_bit_noise_falls_linearly_and_ends():
    """By the progress of the run, so also in runs with a time limit and any number of steps."""
    noise = BitNoise(config.BitNoiseConfig(images=1, rate=0.4, until=0.5), 0)
    assert [noise.max_rate(progress) for progress in (0, 0.25, 0.375)] == pytest.approx([0.4, 0.2, 0.1])
    assert noise.sample([(2, 4, 5)], 99, 0.49, CPU) != [None]
    assert noise.sample([(2, 4, 5)], 99, 0.5, CPU) == [None]


def test_flip_signs_negates_codes_and_keeps_gradient():
    codes = torch.randn(2, 3, 4, requires_grad=True)
    flipped = torch.rand(2, 3, 4) < 0.5
    result, factor = flip_signs(codes, flipped), torch.randn(2, 3, 4)
    assert torch.equal(result, codes.detach() * (1 - 2 * flipped.float()))
    [gradient] = torch.autograd.grad((result * factor).sum(), codes)
    assert torch.equal(gradient, factor)


def test_flipped_bits_reach_the_decoder_alone(batch):
    """The images are those of the tokens with flipped bits; bits and quantizer penalty are those without noise."""
    stage, engines = build(*NOISE)
    tokenizer, real = stage.modules["generator"], to_float(batch.values_B)
    [context] = stage.prepare_step([batch], engines, 0)
    assert context.flipped_BNL.shape == (8, 16, 18)
    assert context.flipped_BNL.any()
    output, clean = tokenizer(real, None, None, context.flipped_BNL), tokenizer(real)
    assert torch.equal(output.quantized.bits_BNL, clean.quantized.bits_BNL)
    assert torch.equal(output.quantized.loss, clean.quantized.loss)
    tokens = Tokens(clean.quantized.bits_BNL ^ context.flipped_BNL, (1, 4, 4))
    torch.testing.assert_close(output.images.clamp(-1, 1), tokenizer.decode(tokens), rtol=0, atol=1e-6)
    assert not torch.equal(output.images, clean.images)


def test_bit_noise_without_flips_is_bit_identical(batch):
    """At rate 0, and after the last noisy step, a step is that of a run without noise."""
    expected = losses(batch, "loss.adversarial.weight=0")[1]["generator"]
    for overrides, progress in (("training.bit_noise.rate=0", 0), ("training.bit_noise.until=0.5", 0.5)):
        stage, engines = build(*NOISE, overrides)
        stage.progress = progress
        assert stage.prepare_step([batch], engines, 0) == [None]
        total, _ = run_phases(stage, engines, batch, 0)["generator"]
        assert torch.equal(total, expected[0])
    # Nor does an empty mask change anything.
    tokenizer, real = stage.modules["generator"], to_float(batch.values_B)
    empty = torch.zeros(8, 16, 18, dtype=torch.bool)
    assert torch.equal(tokenizer(real, None, None, empty).images, tokenizer(real).images)
