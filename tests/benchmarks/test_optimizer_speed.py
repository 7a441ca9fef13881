"""Cost of Muon: training steps with AdamW and with Muon in turns, and the time of the optimizers alone.

The paper's model takes no training steps here, which would last minutes: its optimizers step on random gradients, and
the cost of the whole step is estimated from the matrix products, for one worker.
"""

import functools
import statistics
import time

import pytest
import torch
from training_steps import TrainingSteps

from bsq_ray import Tokenizer
from bsq_ray.config import load_config
from bsq_ray.planning.requirements import sample_requirements
from bsq_ray.training.optimizers.build import build_optimizers, muon_matrices

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]
CPU = torch.device("cpu")
NUM_STEPS, NUM_WARMUP = 20, 3
KINDS = ("adamw", "muon")
DEMOS = ("demo", "masked-lm-demo", "prior-demo")
PAPER = "imagenet128-bsq18"
NS_STEPS = 5


def load_preset(name, kind):
    overrides = ["training.engine.kind=ddp", "training.engine.precision=bf16", f"training.optimizer.kind={kind}"]
    return load_config(name, [*overrides, f"training.optimizer.muon.ns_steps={NS_STEPS}"])


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", DEMOS)
def test_muon_step_speed(name, record):
    """Medians of steps in turns."""
    torch.manual_seed(0)
    training = {kind: TrainingSteps(load_preset(name, kind), CPU) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for number in range(NUM_WARMUP + NUM_STEPS):
        for kind in KINDS:
            duration = seconds(functools.partial(training[kind].step, number))
            if number >= NUM_WARMUP:
                times[kind].append(duration)
    adamw, muon = (statistics.median(times[kind]) for kind in KINDS)
    products = muon_flops(training["muon"].main) / step_flops(load_preset(name, "muon"))
    record("muon-cost-cpu", name, adamw_ms=1000 * adamw, muon_ms=1000 * muon, cost=muon / adamw - 1, products=products)


def test_muon_optimizer_speed_at_paper_size(record):
    """Optimizer steps of the paper's model on random gradients."""
    run = load_preset(PAPER, "muon")
    torch.manual_seed(0)
    tokenizer = Tokenizer(run.model)
    for parameter in tokenizer.parameters():
        parameter.grad = torch.randn_like(parameter)
    durations = {}
    for kind in KINDS:
        optimizers = build_optimizers(tokenizer, load_preset(PAPER, kind).training.optimizer, use_bf16=True).values()
        durations[kind] = min(seconds(lambda opts=optimizers: [each.step() for each in opts]) for _ in range(3))
    record(
        "muon-cost-cpu",
        PAPER,
        adamw_optimizer_ms=1000 * durations["adamw"],
        muon_optimizer_ms=1000 * durations["muon"],
        products=muon_flops(tokenizer) / step_flops(run),
    )


def muon_flops(module):
    """Return the operations of all iterations: per M x N matrix (M <= N) 2 M² (2 N + M) each."""
    shapes = [sorted(value.shape) for value in muon_matrices(module, convolutions=False).values()]
    return sum(NS_STEPS * 2 * rows**2 * (2 * columns + rows) for rows, columns in shapes)


def step_flops(run):
    return sum(sample_requirements(run).flops.values()) * run.training.batch_size
