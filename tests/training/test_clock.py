"""The speed of a run is that of its steps; its length has the evaluations along the way in it."""

from functools import partial

import pytest
from small_runs import Listener, in_this_process, small_job

from bsq_ray.training import trainer
from bsq_ray.training.monitoring.throughput import Clock

STEP, WAIT, EVALUATION = 1.0, 0.25, 100.0


def test_evaluations_count_for_the_length_of_a_run_and_not_for_its_speed(photo_shards, tmp_path, monkeypatch):
    """Four steps of a second each, a quarter of it waiting, and an evaluation of 100 s after each but the last."""
    time, batches = [0.0], trainer.training_batches

    def lasting(seconds, function):
        def longer(*arguments, **settings):
            time[0] += seconds
            return function(*arguments, **settings)

        return longer

    def slow(*arguments, **settings):
        for batch in batches(*arguments, **settings):
            time[0] += WAIT
            yield batch

    monkeypatch.setattr(trainer, "Clock", partial(Clock, now=lambda: time[0]))
    monkeypatch.setattr(trainer._Run, "_optimise", lasting(STEP - WAIT, trainer._Run._optimise))
    monkeypatch.setattr(trainer._Run, "_evaluate", lasting(EVALUATION, trainer._Run._evaluate))
    monkeypatch.setattr(trainer, "training_batches", slow)
    listener = Listener()
    result = trainer.run(small_job(photo_shards, tmp_path, ["training.evaluate_every=1"]), in_this_process(listener))
    assert result.seconds == 4 * STEP + 3 * EVALUATION
    assert [record["seconds"] for record in listener.training] == [
        n * STEP + (n - 1) * EVALUATION for n in (1, 2, 3, 4)
    ]
    assert result.images_per_second == pytest.approx(16 / STEP)
    assert [record["images_per_second"] for record in listener.training] == [pytest.approx(16 / STEP)] * 4
    assert result.data_wait == pytest.approx(WAIT / STEP)
