"""Learning rate and ramps as functions of the run's progress alone."""

from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray import config
from bsq_ray.training.schedule import learning_rate, ramp, schedule_factor

PAPER = config.Schedule()


def test_the_peak_rate_of_the_paper_is_one_in_ten_thousand_at_batch_256():
    optimizer = config.Optimizer()
    assert learning_rate(optimizer, 256) == pytest.approx(1.024e-4)
    assert learning_rate(optimizer, 32) == pytest.approx(1.024e-4 / 8)


def factor(schedule, step, steps):
    return schedule_factor(schedule, step, steps, step / steps)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (2500, 0.55), (5000, 1.0), (502_500, 0.5), (1_000_000, 0.0)])
def test_the_paper_warms_up_over_5000_steps_then_falls_as_half_a_cosine(step, expected):
    assert factor(PAPER, step, 1_000_000) == pytest.approx(expected)


def test_the_published_code_ends_at_half_the_rate():
    released = config.Schedule(final=0.5)
    assert factor(released, 1_000_000, 1_000_000) == pytest.approx(0.5)
    assert factor(released, 502_500, 1_000_000) == pytest.approx(0.75)


def test_under_a_time_limit_the_cosine_follows_the_clock():
    schedule = config.Schedule(warmup_steps=0)
    assert schedule_factor(schedule, 10, 1000, 0.5) == pytest.approx(0.5 * (1 + cos(pi / 2)))
    assert schedule_factor(schedule, 10, 1000, 1.0) == pytest.approx(0)


@given(
    warmup=st.integers(0, 50),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    steps=st.integers(1, 100),
    place=st.floats(0, 1),
)
def test_the_factor_stays_between_its_ends_and_one(warmup, start, final, steps, place):
    schedule = config.Schedule(warmup_steps=warmup, warmup_from=start, final=final)
    value = factor(schedule, int(place * steps), steps)
    assert min(start, final) - 1e-9 <= value <= 1 + 1e-9


def test_a_run_shorter_than_its_warmup_still_ends_at_the_peak():
    schedule = config.Schedule(warmup_steps=100, warmup_from=0)
    assert factor(schedule, 9, 10) == pytest.approx(0.9)


def test_the_entropy_ramp_of_the_published_code_falls_from_three_to_one_over_2000_steps():
    assert [ramp(step, 2000, 3.0) for step in (0, 1000, 2000, 9999)] == [3, 2, 1, 1]
    assert ramp(0, 0, 3.0) == 1
