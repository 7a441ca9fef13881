"""How a trial says that it failed, which decides whether it is tried again."""

import queue

import pytest

from bsq_ray import storage
from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.ray_trainer import ResourceBudget
from bsq_ray.tuning.trial import Ending, Task, Trial


def told(error):
    """What a trial hands to Tune when its training raises `error`."""

    class Failing(Trial):
        def _train(self):
            raise error

    trial = Failing.__new__(Failing)
    trial._told = queue.Queue()
    trial._run()
    return trial._told.get()


@pytest.mark.parametrize(
    ("error", "ending"), [(ValueError("bits -1"), "invalid"), (NonFiniteLossError("step 3"), "diverged")]
)
def test_what_another_attempt_would_not_change_is_an_ending(error, ending):
    assert told(error) == Ending(ending, str(error), {})


@pytest.mark.parametrize(
    "error", [storage.StorageUnavailableError("cannot read s3://a: 503"), OSError("503"), RuntimeError("lost")]
)
def test_what_may_pass_is_raised_so_that_the_trial_is_begun_again(error):
    failure = told(error)
    assert isinstance(failure, Exception)
    assert not isinstance(failure, ValueError)
    assert str(failure) == str(error)


def test_a_configuration_that_cannot_be_read_is_told_and_does_not_end_the_process(tmp_path):
    task = Task(str(tmp_path), "", "", 1, "cpu", ResourceBudget(), None, None)
    trial = Trial.__new__(Trial)
    trial.setup({"number": 0}, task)
    failure = trial._told.get(timeout=60)
    assert "trials/000/config.yaml" in str(failure)
