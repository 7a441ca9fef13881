"""A nonfinite loss or gradient between two log steps: raised one step later, with weights of before."""

import json
from dataclasses import replace

import pytest
import torch
from process_group import spawn_group
from small_runs import RecordingReporter, small_spec, train_runs
from test_engine import ENGINES
from test_resume import comparable_values

from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.trainer import Trainer
from bsq_ray.training.worker_context import WorkerContext

BAD_STEP = 3
LATE = ["training.steps=6", "training.log_every=6", "training.checkpoint_every=2"]


def copied_weights(trainer):
    copies = {}
    for name, engine in trainer.engines.items():
        with engine.gathered_parameters():
            copies[name] = {key: value.clone() for key, value in engine.module.state_dict().items()}
    return copies


def break_step(trainer, rank, change):
    """Let `change` alter the generator's output of the bad step; return the numbers and the weights of the steps."""
    stage, steps, weights = trainer.stage, [], {}
    prepare_step, loss = stage.prepare_step, stage.loss

    def prepare(batches, engines, step):
        steps.append(step + 1)
        weights[step + 1] = copied_weights(trainer)
        return prepare_step(batches, engines, step)

    def broken_loss(phase, batch, engines, context, step):
        output = loss(phase, batch, engines, context, step)
        return change(output) if (phase, step + 1) == ("generator", BAD_STEP) and rank == 1 else output

    stage.prepare_step, stage.loss = prepare, broken_loss
    return steps, weights


def infinite_term(output):
    """Make a term infinite, which leaves all gradients finite."""
    infinity = torch.tensor(torch.inf)
    return replace(output, loss=output.loss + infinity, scalars=output.scalars | {"reconstruction": infinity})


def nonfinite_gradient(output):
    """Keep the loss, and make its gradient infinite: that of the square root at 0."""
    return replace(output, loss=output.loss + (0 * output.loss).square().sqrt())


# By name: engine, and what breaks.
CASES = {
    "ddp": ("ddp", infinite_term),
    "zero 1": ("zero 1", infinite_term),
    "gradient": ("ddp", nonfinite_gradient),
}


def train_broken(rank, world_size, shards, out):
    """Train with a broken step on rank 1, then resume a run, and train it undisturbed.

    Returns:
        By case (error, steps, are the weights unchanged); losses of the resumed and of the undisturbed run.
    """
    results = {}
    for name, (engine, change) in CASES.items():
        spec = small_spec(shards, f"{out}/{name}", [*ENGINES[engine], *LATE])
        trainer = Trainer(spec, WorkerContext(rank, world_size, torch.device("cpu"), "local", RecordingReporter()))
        steps, weights = break_step(trainer, rank, change)
        with pytest.raises(NonFiniteLossError) as raised:
            trainer.train()
        after = copied_weights(trainer)
        are_unchanged = all(
            torch.equal(value, after[module][key])
            for module, state in weights[BAD_STEP].items()
            for key, value in state.items()
        )
        results[name] = str(raised.value), steps, are_unchanged
    runs = {name: [*ENGINES["ddp"], "training.steps=6"] for name in ("ddp", "undisturbed")}
    return results, train_runs(rank, world_size, shards, out, runs)


@pytest.fixture(scope="module")
def broken_runs(photo_shards, tmp_path_factory):
    """(folder, results of `train_broken` by rank)."""
    out = tmp_path_factory.mktemp("broken")
    return out, spawn_group(2, train_broken, photo_shards, str(out))


@pytest.mark.parametrize(
    ("case", "cause", "num_samples"),
    [
        # The samples of the worker with the infinite loss.
        ("ddp", "loss (reconstruction)", 8),
        ("zero 1", "loss (reconstruction)", 8),
        ("gradient", "gradient of the generator", 16),
    ],
)
def test_late_nonfinite_names_step_cause_and_samples(broken_runs, case, cause, num_samples):
    """Both workers raise after one more step, and no gradient since the bad one reaches the weights."""
    out, results = broken_runs
    for error, steps, are_unchanged in (by_case[case] for by_case, _ in results):
        assert error.startswith(f"step 3: the {cause} is not finite; the batch was ")
        assert (steps, are_unchanged) == ([1, 2, 3, 4], True)
    assert len(json.loads((out / case / "nonfinite.json").read_text())["keys"]) == num_samples


def test_run_resumed_after_nonfinite_loss_misses_no_sample(broken_runs):
    """Resumed from the checkpoint before, the run takes the steps of one that never failed."""
    _, [(_, losses), _] = broken_runs
    assert [record["step"] for record in losses["ddp"]] == [3, 4, 5, 6]
    assert [comparable_values(record) for record in losses["ddp"]] == [
        comparable_values(record) for record in losses["undisturbed"][2:]
    ]
