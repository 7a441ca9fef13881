"""How a trial says that it failed, which decides whether it is tried again."""

import queue

import pytest

from bsq_ray import storage
from bsq_ray.training.nonfinite import NonFiniteLossError
from bsq_ray.training.ray_trainer import ResourceBudget
from bsq_ray.tuning.trial import SweepTrainable, TrialContext, TrialOutcome


def event_after_error(error):
    """What a trial hands to Tune when its training raises `error`."""

    class FailingTrainable(SweepTrainable):
        def _train(self):
            raise error

    trial = FailingTrainable.__new__(FailingTrainable)
    trial._told = queue.Queue()
    trial._run()
    return trial._told.get()


@pytest.mark.parametrize(
    ("error", "ending"), [(ValueError("bits -1"), "invalid"), (NonFiniteLossError("step 3"), "diverged")]
)
def test_trainable_permanent_error_is_an_outcome(error, state):
    """An invalid configuration and a diverged loss end the trial without a retry."""
    assert event_after_error(error) == TrialOutcome(state, str(error), {})


@pytest.mark.parametrize(
    "error", [storage.StorageUnavailableError("cannot read s3://a: 503"), OSError("503"), RuntimeError("lost")]
)
def test_trainable_transient_error_is_raised_for_retry(error):
    """A transient error is raised, so that Tune retries the trial."""
    failure = event_after_error(error)
    assert isinstance(failure, Exception)
    assert not isinstance(failure, ValueError)
    assert str(failure) == str(error)


def test_trainable_missing_config_is_reported(tmp_path):
    """A missing configuration is reported as an error and does not end the process."""
    context = TrialContext(str(tmp_path), "", "", 1, "cpu", ResourceBudget(), None, None)
    trial = SweepTrainable.__new__(SweepTrainable)
    trial.setup({"number": 0}, context)
    failure = trial._told.get(timeout=60)
    assert "trials/000/config.yaml" in str(failure)
