"""Plans: arithmetic, published results, advice, and invalid arguments."""

import pytest

from bsq_ray.config import load_config, preset_names
from bsq_ray.config.batch_split import can_split_batch
from bsq_ray.planning import format_plan, make_plan
from bsq_ray.planning.communication import communication_bytes
from bsq_ray.planning.gpus import GPUS
from bsq_ray.planning.planner import reconstruction_rate


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("gpu", GPUS)
def test_make_plan_supports_every_preset_and_gpu(name, gpu):
    run = load_config(name)
    plan = make_plan(run, gpu, max(size for size in range(1, 17) if can_split_batch(run, size)))
    assert plan.step_s > 0
    assert plan.has_enough_memory == (not plan.advice)
    assert f"{plan.days:.2f} days" in format_plan(plan)


def test_reconstruction_rate_matches_the_paper_on_a5000():
    # The efficiency was derived from 45.1 images/s, so this tests the arithmetic, not the prediction.
    assert reconstruction_rate(load_config("imagenet256-bsq18").model, "a5000") == pytest.approx(45.1, rel=0.02)


@pytest.mark.parametrize("gpus", [8, 16])
def test_make_plan_32_images_at_128_px_fit_an_a5000(gpus):
    assert make_plan(
        load_config("imagenet128-bsq18", [f"training.batch_size={32 * gpus}"]), "a5000", gpus
    ).has_enough_memory


def test_make_plan_32_images_at_256_px_advises_accumulation():
    plan = make_plan(load_config("imagenet256-bsq18", ["training.batch_size=512"]), "a5000", 16)
    assert "training.micro_batch_size=16 (accumulates; same global batch)" in plan.advice


def test_make_plan_token_models_fit_the_papers_gpus():
    # Sixteen GPUs with batch 1,024 for the masked language model, eight with batch 64 for the prior.
    assert make_plan(load_config("imagenet128-masked-lm"), "a5000", 16).has_enough_memory
    assert make_plan(load_config("imagenet128-prior"), "a5000", 8).has_enough_memory


def test_make_plan_papers_training_needs_three_days_at_peak():
    """The paper's five days on sixteen A5000 would need more than half of their peak throughput."""
    # 1M steps of images at 128 px and 500K steps of clips, at the theoretical peak.
    image = load_config("imagenet128-bsq18")
    video = load_config("imagenet128-bsq18", ["model.frames=16", "training.batch_size=32", "training.steps=500000"])
    operations = sum(make_plan(run, "a5000", 16).step_flops * run.training.steps for run in (image, video))
    days_at_peak = operations / (16 * 111.1e12) / 86400
    assert 2.7 < days_at_peak < 3.2


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("ucf101-bsq")])
def test_make_plan_papers_clips_fit_eight_24_gb_gpus(name):
    plan = make_plan(load_config(name), "a5000", 8)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.sample.unit) == (4, 1, "clips")
    assert plan.has_enough_memory
    assert "24 GiB: fits" in format_plan(plan)
    # Without gradient checkpointing almost no memory would be left.
    plain = make_plan(load_config(name, ["model.gradient_checkpointing=false"]), "a5000", 8)
    assert plain.memory.total > 1.4 * plan.memory.total


def test_make_plan_advice_makes_the_run_fit():
    cramped = load_config("imagenet256-bsq18", ["training.batch_size=1024"])
    plan = make_plan(cramped, "a5000", 16)
    assert not plan.has_enough_memory
    assert len(plan.advice) == 2
    for change in plan.advice:
        overrides = [word for word in change.split(" (")[0].split() if "=" in word]
        assert make_plan(
            load_config("imagenet256-bsq18", ["training.batch_size=1024", *overrides]), "a5000", 16
        ).has_enough_memory


def test_make_plan_advises_only_micro_batches_that_take_the_same_steps():
    """A micro batch that would change the discriminator's groups is not advised as the same global batch."""
    overrides = ["training.batch_size=512", "loss.adversarial.stddev_group_size=32"]
    plan = make_plan(load_config("imagenet256-bsq18", overrides), "a5000", 16)
    assert not [advice for advice in plan.advice if "micro_batch_size" in advice]


def test_make_plan_accumulation_adds_an_encoder_pass():
    """Statistics of the whole batch cost half a forward pass of the tokenizer per sample."""
    whole, parts = (
        make_plan(load_config("imagenet128-bsq18", overrides), "a5000", 8)
        for overrides in ([], ["training.micro_batch_size=8"])
    )
    assert 1.02 < parts.step_flops / whole.step_flops < 1.2


def test_make_plan_model_too_large_advises_larger_gpu():
    huge = load_config("imagenet256-bsq18", ["model.encoder.width=6144", "model.encoder.layers=48"])
    [advice] = make_plan(huge, "l4", 16).advice
    assert "a micro batch of one sample does not fit" in advice


def test_plan_counts_the_matrices_that_muon_shares():
    """Data parallelism with Muon also gathers the updates of its matrices in bf16."""
    with_muon = load_config("imagenet128-bsq18-muon")
    adamw = ["training.optimizer.kind=adamw"]
    plans = [make_plan(run, "h100", 16) for run in (with_muon, load_config("imagenet128-bsq18-muon", adamw))]
    num_elements = sum(24 * width**2 // 2 * 12 for width in (768, 768))
    assert plans[0].communication_bytes - plans[1].communication_bytes == 15 / 16 * 2 * num_elements


@pytest.mark.parametrize(
    ("engine", "sent_bytes"),
    [
        (["kind=ddp"], 2 * 4),
        (["kind=ddp", "communication_data_type=bf16"], 2 * 2),
        (["zero_stage=1"], 4 + 4),
        (["zero_stage=1", "communication_data_type=bf16"], 2 + 4),
        (["zero_stage=2"], 4 + 4),
        (["zero_stage=3"], 3 * (4 + 4 + 4)),
        (["zero_stage=3", "communication_data_type=bf16"], 3 * (4 + 4 + 2)),
    ],
)
def test_communication_bytes_match_ring_formulas(engine, sent_bytes):
    """Bytes per parameter of three micro batches: gradients in their data type, and weights in fp32."""
    config = load_config("demo-gan", [f"training.engine.{override}" for override in engine]).training.engine
    assert communication_bytes(1000, config, 1, 3) == 0
    assert communication_bytes(1000, config, 4, 3) == sent_bytes * 3 / 4 * 1000


def test_make_plan_names_gpus_at_which_network_is_limit():
    """The smallest number of GPUs is named for which a plan communicates longer than it computes."""
    run = load_config("imagenet256-bsq18", ["training.batch_size=1024"])
    bound = make_plan(run, "h100", 8, network_gbit=200).network_bound_gpus
    assert bound is not None
    for num_gpus in (bound // 2, bound):
        plan = make_plan(run, "h100", num_gpus, network_gbit=200)
        assert (plan.communication_s > plan.compute_s) == (num_gpus == bound)
        assert f"from {bound} GPUs on" in format_plan(plan)
    alone = make_plan(load_config("imagenet256-bsq18", ["training.batch_size=1"]), "h100", 1)
    assert alone.network_bound_gpus is None
    assert "at no valid number of GPUs" in format_plan(alone)


def test_make_plan_single_node_ignores_network_bandwidth():
    """A run on one node does not depend on the network bandwidth between nodes."""
    run = load_config("imagenet128-bsq18")
    slow = {gpus: make_plan(run, "a5000", gpus, network_gbit=1).communication_s for gpus in (1, 8, 16)}
    assert slow[1] == 0
    assert slow[16] > 100 * slow[8]


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "options", "message"),
    [
        ("a9000", 16, {}, "unknown GPU 'a9000'; choose one of a5000"),
        ("a5000", 0, {}, "must be 1 or more"),
        ("a5000", 7, {}, "cannot be shared evenly by 7 workers"),
        ("a5000", 16, {"network_gbit": 0.0}, "must be positive"),
        ("a5000", 16, {"efficiency": 1.5}, "must be in"),
    ],
)
def test_make_plan_invalid_arguments_raise(gpu, num_gpus, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(load_config("imagenet128-bsq18"), gpu, num_gpus, **options)
