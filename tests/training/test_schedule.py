"""Learning rate and ramps as functions of the run's progress alone."""

from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray import config
from bsq_ray.training.schedule import learning_rate, ramp, schedule_factor

PAPER = config.ScheduleConfig()


def test_learning_rate_default_matches_paper():
    """The peak learning rate is about 1e-4 at batch 256 and scales linearly with the batch."""
    optimizer = config.OptimizerConfig()
    assert learning_rate(optimizer, 256) == pytest.approx(1.024e-4)
    assert learning_rate(optimizer, 32) == pytest.approx(1.024e-4 / 8)


def factor(schedule, step, steps):
    return schedule_factor(schedule, step, steps, step / steps)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (2500, 0.55), (5000, 1.0), (502_500, 0.5), (1_000_000, 0.0)])
def test_schedule_default_is_warmup_then_cosine(step, expected):
    """The default schedule warms up over 5,000 steps and then follows half a cosine."""
    assert factor(PAPER, step, 1_000_000) == pytest.approx(expected)


def test_schedule_final_factor_half_ends_at_half():
    """With the published code's final factor of 0.5 the schedule ends at half the peak rate."""
    released = config.ScheduleConfig(final=0.5)
    assert factor(released, 1_000_000, 1_000_000) == pytest.approx(0.5)
    assert factor(released, 502_500, 1_000_000) == pytest.approx(0.75)


def test_schedule_time_limit_follows_progress():
    """Under a time limit the cosine follows the elapsed share of the time."""
    schedule = config.ScheduleConfig(warmup_steps=0)
    assert schedule_factor(schedule, 10, 1000, 0.5) == pytest.approx(0.5 * (1 + cos(pi / 2)))
    assert schedule_factor(schedule, 10, 1000, 1.0) == pytest.approx(0)


@given(
    warmup=st.integers(0, 50),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    steps=st.integers(1, 100),
    place=st.floats(0, 1),
)
def test_schedule_factor_stays_in_range(warmup, start, final, steps, place):
    """The factor stays between the smaller of its ends and 1."""
    schedule = config.ScheduleConfig(warmup_steps=warmup, warmup_from=start, final=final)
    value = factor(schedule, int(place * steps), steps)
    assert min(start, final) - 1e-9 <= value <= 1 + 1e-9


def test_schedule_short_run_warms_up_to_peak():
    """A run shorter than its warm-up still approaches the peak rate."""
    schedule = config.ScheduleConfig(warmup_steps=100, warmup_from=0)
    assert factor(schedule, 9, 10) == pytest.approx(0.9)


def test_ramp_published_falls_from_3_to_1():
    """The published entropy ramp falls linearly from 3 to 1 over 2,000 steps."""
    assert [ramp(step, 2000, 3.0) for step in (0, 1000, 2000, 9999)] == [3, 2, 1, 1]
    assert ramp(0, 0, 3.0) == 1
