"""Plans: arithmetic that must hold, the paper's own facts, advice that helps, and what is refused."""

import pytest

from bsq_ray.config import load_config, preset_names
from bsq_ray.planning import plan, render
from bsq_ray.planning.communication import bytes_sent
from bsq_ray.planning.gpus import GPUS
from bsq_ray.planning.planner import reconstruction_rate


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("gpu", GPUS)
def test_every_preset_has_a_plan_for_every_card(name, gpu):
    run = load_config(name)
    made = plan(run, gpu, min(16, run.training.batch_size))
    assert made.step_seconds > 0
    assert made.fits == (not made.advice)
    assert f"{made.days:.2f} days" in render(made)


def test_the_paper_reconstructs_as_fast_on_an_a5000():
    # 45.1 images/s is what the efficiency was taken from, so this guards the arithmetic, not the prediction.
    assert reconstruction_rate(load_config("imagenet256-bsq18").model, "a5000") == pytest.approx(45.1, rel=0.02)


@pytest.mark.parametrize("gpus", [8, 16])
def test_the_papers_32_images_at_128_px_fit_an_a5000(gpus):
    assert plan(load_config("imagenet128-bsq18", [f"training.batch_size={32 * gpus}"]), "a5000", gpus).fits


def test_32_images_at_256_px_are_taken_in_two_halves():
    made = plan(load_config("imagenet256-bsq18", ["training.batch_size=512"]), "a5000", 16)
    assert "training.micro_batch_size=16 (accumulates; same global batch)" in made.advice


def test_the_papers_token_models_fit_as_it_trained_them():
    # Sixteen cards with batch 1,024 for the masked language model, eight with batch 64 for the prior.
    assert plan(load_config("imagenet128-masked-lm"), "a5000", 16).fits
    assert plan(load_config("imagenet128-prior"), "a5000", 8).fits


def test_the_papers_five_days_would_take_most_of_the_peak_of_sixteen_a5000():
    # 1M steps of images at 128 px and 500K of clips: arithmetic alone, at a peak that nothing reaches.
    image = load_config("imagenet128-bsq18")
    video = load_config("imagenet128-bsq18", ["model.frames=16", "training.batch_size=32", "training.steps=500000"])
    operations = sum(plan(run, "a5000", 16).step_flops * run.training.steps for run in (image, video))
    days_at_peak = operations / (16 * 111.1e12) / 86400
    assert 2.7 < days_at_peak < 3.2


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("ucf101-bsq")])
def test_the_papers_clips_fit_on_eight_cards_of_24_gb(name):
    made = plan(load_config(name), "a5000", 8)
    assert (made.micro_batch, made.accumulation, made.sample.unit) == (4, 1, "clips")
    assert made.fits
    assert "24 GiB: fits" in render(made)
    # Without recomputing activations there would be next to nothing left.
    plain = plan(load_config(name, ["model.gradient_checkpointing=false"]), "a5000", 8)
    assert plain.memory.total > 1.4 * made.memory.total


def test_taking_the_advice_makes_it_fit():
    cramped = load_config("imagenet256-bsq18", ["training.batch_size=1024"])
    made = plan(cramped, "a5000", 16)
    assert not made.fits
    assert len(made.advice) == 2
    for change in made.advice:
        overrides = [word for word in change.split(" (")[0].split() if "=" in word]
        assert plan(load_config("imagenet256-bsq18", ["training.batch_size=1024", *overrides]), "a5000", 16).fits


def test_a_model_too_large_for_one_image_gets_no_false_hope():
    huge = load_config("imagenet256-bsq18", ["model.encoder.width=6144", "model.encoder.layers=48"])
    [advice] = plan(huge, "l4", 16).advice
    assert "not even one sample" in advice


def test_a_ring_sends_almost_twice_the_weights():
    run = load_config("imagenet128-bsq18")
    assert bytes_sent(1000, run.training.engine, 1, 1) == 0
    assert bytes_sent(1000, run.training.engine, 4, 1) == 2 * 3 / 4 * 4000
    stage2 = load_config("demo", ["training.engine.zero_stage=2"]).training.engine
    assert bytes_sent(1000, stage2, 4, 3) == 4 * 3 / 4 * 4000
    stage3 = load_config("demo", ["training.engine.zero_stage=3"]).training.engine
    assert bytes_sent(1000, stage3, 4, 2) == 6 * 3 / 4 * 4000


def test_one_server_does_not_wait_for_the_network_between_servers():
    run = load_config("imagenet128-bsq18")
    slow = {gpus: plan(run, "a5000", gpus, network_gbit=1).network_seconds for gpus in (1, 8, 16)}
    assert slow[1] == 0
    assert slow[16] > 100 * slow[8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a9000", 16), "no GPU 'a9000' is known; choose one of a5000"),
        (("a5000", 0), "must be 1 or more"),
        (("a5000", 7), "cannot be shared evenly by 7 workers"),
        (("a5000", 16, 0.0), "must be in"),
        (("a5000", 16, 25.0, 8, 1.5), "must be in"),
    ],
)
def test_wrong_calls_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(load_config("imagenet128-bsq18"), *arguments)
