"""The training loop takes the steps of the published code, from the same weights and batches.

In fp64 thirty steps agree to rounding. In fp32 two correct programs separate as soon as rounding moves a ReLU or a bit
across zero, so only cases without the perceptual network are compared in fp32.
"""

from math import log

import numpy as np
import pytest
from process_group import spawn_group
from published_steps import GOLDEN, SCALARS, import_weights, load_case, take_steps

FP64, FP32 = ["analytical", "group9", "published"], ["adversarial", "pixels"]
FIRST_STEPS = 6
# Absolute tolerances of scalars and of weights; the expected weights are rounded to fp32.
TOLERANCES = {"fp64": (6e-11, 4e-8), "fp32": (1e-5, 3e-5)}
DDP = ["training.engine.kind=ddp"]
ZERO = {f"zero {stage}": [f"training.engine.zero_stage={stage}"] for stage in range(4)}


def assert_published_steps(name, ranks, shards, tmp_path, *, num_steps=None):
    """Compare scalars, token bits and final weights with those of the published code.

    Args:
        ranks: result of `take_steps` for each rank.
    """
    case, published = load_case(name)
    num_steps = num_steps or case["steps"]
    tolerance, weight_tolerance = TOLERANCES[case["precision"]]
    records = [
        {key: np.mean([record[key] for record in step]) for key in step[0]}
        for step in zip(*(records for records, _, _ in ranks), strict=True)
    ]
    assert len(records) == num_steps
    for published_name, our_name in SCALARS.items():
        values = published.get(f"steps.{published_name}")
        for step, expected in enumerate([] if values is None else values[:num_steps].tolist()):
            assert (our_name in records[step]) == (not np.isnan(expected)), (step, our_name)
            if not np.isnan(expected):
                assert records[step][our_name] == pytest.approx(expected, rel=0, abs=tolerance), (step, our_name)
    for step, record in enumerate(records):
        for our_name in ("per_sample_entropy", "codebook_entropy"):
            # The published code adds 1e-8 in the logarithms of entropies.
            expected = float(published[f"steps.{our_name}"][step])
            assert record[our_name] * log(2) == pytest.approx(expected, rel=2e-6), (step, our_name)
        bits_BNL = np.zeros((case["batch_size"], *ranks[0][1][0].shape[1:]), np.uint8)
        for rank, (_, bits, _) in enumerate(ranks):
            bits_BNL[rank :: len(ranks)] = bits[step]
        assert np.array_equal(np.packbits(bits_BNL), published["steps.bits"][step].numpy()), f"bits of step {step}"
    if num_steps == case["steps"]:
        for module, weights in import_weights(case, published, tmp_path / "final").items():
            for key, expected in weights.items():
                expected_weights = expected.double().numpy()
                # In units of the tolerance, plus half a unit of the last place of the expected fp32 values.
                allowed = weight_tolerance + 2**-24 * np.abs(expected_weights)
                difference = np.abs(ranks[0][2][module][key] - expected_weights) / allowed
                if key.endswith("attention.qkv.bias"):
                    # A bias of all keys cancels in the softmax; its gradient is rounding.
                    queries, _, values = np.split(difference, 3)
                    difference = np.concatenate([queries, values])
                assert difference.max() <= 1, key


def test_golden_files_cover_every_case():
    assert {path.stem for path in GOLDEN.glob("trajectory-*.safetensors")} == {
        f"trajectory-{name}" for name in (*FP64, *FP32, "inputs")
    }


@pytest.mark.parametrize("name", FP32)
def test_fp32_steps_match_published_code(name, photo_shards, tmp_path):
    result = take_steps(0, 1, name, photo_shards, tmp_path, DDP)
    assert_published_steps(name, [result], photo_shards, tmp_path)


@pytest.mark.parametrize("name", FP64)
def test_first_fp64_steps_match_published_code(name, photo_shards, tmp_path):
    result = take_steps(0, 1, name, photo_shards, tmp_path, DDP, FIRST_STEPS)
    assert_published_steps(name, [result], photo_shards, tmp_path, num_steps=FIRST_STEPS)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", FP64)
def test_fp64_steps_match_published_code(name, photo_shards, tmp_path):
    """Thirty steps with the perceptual loss: losses to 6e-11, weights to 4e-8, every token bit."""
    result = take_steps(0, 1, name, photo_shards, tmp_path, DDP)
    assert_published_steps(name, [result], photo_shards, tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("engine", ZERO)
@pytest.mark.parametrize("name", FP32)
def test_deepspeed_steps_match_published_code(name, engine, photo_shards, tmp_path):
    """DeepSpeed computes in fp32 at most, so its engines are compared in the fp32 cases."""
    [result] = spawn_group(1, take_steps, name, photo_shards, str(tmp_path), ZERO[engine])
    assert_published_steps(name, [result], photo_shards, tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [*FP64, *FP32])
def test_two_workers_take_published_steps(name, photo_shards, tmp_path):
    """Two workers with half of each batch take the steps that the published code takes on one GPU."""
    results = spawn_group(2, take_steps, name, photo_shards, str(tmp_path), DDP)
    assert_published_steps(name, results, photo_shards, tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [*FP64, *FP32])
def test_accumulated_steps_match_published_code(name, photo_shards, tmp_path):
    """Two micro batches of four images give the steps of the whole batch."""
    result = take_steps(0, 1, name, photo_shards, tmp_path, [*DDP, "training.micro_batch_size=4"])
    assert_published_steps(name, [result], photo_shards, tmp_path)
