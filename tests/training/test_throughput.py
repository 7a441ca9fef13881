"""Step timer: the speed of a run excludes evaluations, its length includes them."""

from functools import partial

import pytest
from small_runs import RecordingReporter, local_worker, small_spec

from bsq_ray.training import trainer
from bsq_ray.training.eval_loop import EvalLoop
from bsq_ray.training.monitoring.throughput import StepTimer

STEP, WAIT, EVALUATION = 1.0, 0.25, 100.0


def test_step_timer_excludes_evaluations_from_speed(photo_shards, tmp_path, monkeypatch):
    """With four steps of 1 s and an evaluation of 100 s after each but the last, the speed is one step per second."""
    time, batches = [0.0], trainer.training_batches

    def taking(seconds, function):
        def longer(*arguments, **settings):
            time[0] += seconds
            return function(*arguments, **settings)

        return longer

    def slow_batches(*arguments, **settings):
        for batch in batches(*arguments, **settings):
            time[0] += WAIT
            yield batch

    monkeypatch.setattr(trainer, "StepTimer", partial(StepTimer, now=lambda: time[0]))
    monkeypatch.setattr(trainer.Trainer, "train_step", taking(STEP - WAIT, trainer.Trainer.train_step))
    monkeypatch.setattr(EvalLoop, "evaluate", taking(EVALUATION, EvalLoop.evaluate))
    monkeypatch.setattr(trainer, "training_batches", slow_batches)
    listener = RecordingReporter()
    result = trainer.run_training(small_spec(photo_shards, tmp_path, ["training.eval_every=1"]), local_worker(listener))
    assert result.duration_s == 4 * STEP + 3 * EVALUATION
    assert [record["seconds"] for record in listener.training_records] == [
        n * STEP + (n - 1) * EVALUATION for n in (1, 2, 3, 4)
    ]
    assert result.images_per_second == pytest.approx(16 / STEP)
    assert [record["images_per_second"] for record in listener.training_records] == [pytest.approx(16 / STEP)] * 4
    assert result.data_wait_fraction == pytest.approx(WAIT / STEP)
