"""The study: what is tried next, what is remembered, and what becomes of it; without Ray."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sweeps import small_sweep

from bsq_ray.config import load_config
from bsq_ray.tuning.results import markdown, write_results
from bsq_ray.tuning.study import Record, Study, read_records
from bsq_ray.tuning.sweep_plots import pareto_front

TWO = {"model.quantizer.bits": {"values": [6, 10]}, "loss.quantizer_weight": {"values": [0.1, 1.0]}}
RANGES = {
    "loss.quantizer_weight": {"loguniform": [1e-3, 10.0]},
    "training.optimizer.weight_decay": {"uniform": [0.0, 1.0]},
    "model.encoder.layers": {"integers": [1, 4]},
}


def random_sweep(folder, searcher, trials=12, space=RANGES, **changes):
    return small_sweep(folder, space=space, searcher=searcher, budget={"trials": trials, "steps": 10}, **changes)


def finish(study, record, value):
    study.end(record, "finished", figures={"psnr": value})


def draw(study, value=lambda record: 10.0):
    """Runs what is left, with psnr from `value`; the drawn parameters."""
    drawn = []
    while (record := study.next()) is not None:
        drawn.append(record.parameters)
        finish(study, record, value(record))
    return drawn


def test_a_grid_tries_every_combination_in_order(tmp_path):
    study = Study(small_sweep(tmp_path, space=TWO), str(tmp_path / "out"))
    assert study.left == 4
    assert [tuple(parameters.values()) for parameters in draw(study)] == [(6, 0.1), (6, 1.0), (10, 0.1), (10, 1.0)]
    assert study.left == 0


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_drawn_values_lie_in_their_ranges_and_repeat_with_the_seed(tmp_path, searcher):
    def value(record):
        return -abs(math.log10(record.parameters["loss.quantizer_weight"]))

    def drawn(folder, seed):
        return draw(Study(random_sweep(tmp_path, searcher, seed=seed), str(tmp_path / folder)), value)

    first = drawn("a", 0)
    assert first == drawn("b", 0) != drawn("c", 1)
    assert len({str(parameters) for parameters in first}) == 12
    for parameters in first:
        assert 1e-3 <= parameters["loss.quantizer_weight"] <= 10
        assert 0 <= parameters["training.optimizer.weight_decay"] <= 1
        assert parameters["model.encoder.layers"] in (1, 2, 3, 4)


def test_tpe_learns_where_the_good_values_are(tmp_path):
    def bowl(record):
        return -((math.log10(record.parameters["loss.quantizer_weight"]) + 2) ** 2)

    space = {"loss.quantizer_weight": {"loguniform": [1e-3, 10.0]}}
    study = Study(random_sweep(tmp_path, "tpe", 40, space), str(tmp_path / "out"))
    drawn = [math.log10(parameters["loss.quantizer_weight"]) for parameters in draw(study, bowl)]
    early, late = drawn[:10], drawn[-10:]
    assert sum(abs(value + 2) for value in late) < 0.5 * sum(abs(value + 2) for value in early)


@pytest.mark.parametrize("searcher", ["grid", "random", "tpe"])
def test_a_study_that_is_read_again_goes_on_as_if_it_had_not_stopped(tmp_path, searcher):
    space = TWO if searcher == "grid" else RANGES
    budget = {"steps": 10} if searcher == "grid" else {"steps": 10, "trials": 4}
    sweep = small_sweep(tmp_path, space=space, searcher=searcher, budget=budget)

    def value(record):
        return float(sum(map(float, record.parameters.values())))

    whole = draw(Study(sweep, str(tmp_path / "whole")), value)
    parts = []
    for _ in range(4):
        study = Study(sweep, str(tmp_path / "parts"))
        record = study.next()
        parts.append(record.parameters)
        finish(study, record, value(record))
    assert parts == whole
    assert Study(sweep, str(tmp_path / "parts")).next() is None


def test_what_a_trial_reported_before_the_sweep_stopped_counts_when_it_goes_on(tmp_path):
    """TPE ranks trials that were stopped early by their last report; so few trials are drawn at random that it acts."""
    sweep = random_sweep(tmp_path, "tpe", 16)

    def drawn(folder, interrupted):
        study, all_drawn = Study(sweep, str(tmp_path / folder)), []
        while (record := study.next()) is not None:
            all_drawn.append(record.parameters)
            study.report(record, 5, {"psnr": -abs(record.parameters["training.optimizer.weight_decay"] - 0.3)})
            if interrupted:
                study = Study(sweep, str(tmp_path / folder))
                record = study.next()
            study.end(record, "stopped")
        return all_drawn

    assert drawn("parts", True) == drawn("whole", False)


def test_what_was_running_or_failed_is_run_again_and_nothing_else(tmp_path):
    sweep = small_sweep(tmp_path, space={"model.quantizer.bits": {"values": [6, 7, 8, 9, 10, 33]}})
    study = Study(sweep, str(tmp_path / "out"))
    records = [study.next() for _ in range(5)]
    finish(study, records[0], 20.0)
    study.report(records[1], 5, {"psnr": 12.0})
    study.end(records[1], "stopped")
    study.end(records[2], "failed", "the disk was full")
    study.end(records[3], "diverged", "the loss is not finite")
    again = Study(sweep, str(tmp_path / "out"))
    assert again.left == 3
    assert [record.number for record in again.ended] == [0, 1, 3]
    assert [(record.number, record.attempts) for record in iter(again.next, None)] == [(2, 2), (4, 2), (5, 1)]


def test_a_combination_that_cannot_be_is_recorded_with_its_reason_and_passed_over(tmp_path):
    study = Study(small_sweep(tmp_path, space={"model.image_size": {"values": [33, 32]}}), str(tmp_path / "out"))
    assert study.next().number == 1
    bad = read_records(str(tmp_path / "out"))[0]
    assert bad.state == "invalid"
    assert "image_size 33 is not a multiple of patch_size 8" in bad.reason


def test_a_finished_trial_without_its_metric_has_failed(tmp_path):
    study = Study(small_sweep(tmp_path), str(tmp_path / "out"))
    first, second = study.next(), study.next()
    study.end(first, "finished", figures={"lpips": 0.3})
    study.end(second, "finished", figures={"psnr": math.nan})
    assert [(record.state, record.reason) for record in study.records] == [("failed", "it gave no psnr")] * 2
    assert study.best() is None


def test_a_damaged_record_is_named_and_its_folder_can_be_removed(tmp_path):
    sweep, out = small_sweep(tmp_path), tmp_path / "out"
    draw(Study(sweep, str(out)))
    record = out / "trials/000/trial.json"
    record.write_text(record.read_text()[:40])
    with pytest.raises(ValueError, match="trials/000/trial.json is damaged"):
        Study(sweep, str(out))
    record.unlink()
    assert Study(sweep, str(out)).next().number == 0


def test_the_best_follows_the_direction_of_the_first_metric(tmp_path):
    for direction, best in (("min", 0), ("max", 1)):
        sweep = small_sweep(tmp_path, metrics={"psnr": direction, "lpips": "min"})
        study = Study(sweep, str(tmp_path / direction))
        for psnr in (10.0, 20.0):
            study.end(study.next(), "finished", figures={"psnr": psnr, "lpips": 0.5})
        assert study.best().number == best


def test_the_best_preset_keeps_sections_of_the_base_that_the_sweep_did_not_name(tmp_path):
    """A quantiser of another kind starts its section afresh; one of the same kind keeps what the preset says."""
    choices = {
        "bsq": {"model.quantizer": {"kind": "bsq", "bits": 9}},
        "vq": {"model.quantizer": {"kind": "vq", "codebook_size": 512}, "loss.quantizer_weight": 1.0},
    }
    sweep = small_sweep(tmp_path, space={"quantizer": {"choices": choices}})
    study = Study(sweep, str(tmp_path / "out"))
    for psnr in (10.0, 20.0):
        finish(study, study.next(), psnr)
    write_results(study)
    best = load_config(str(tmp_path / "out/best.yaml"))
    assert (best.model.quantizer.kind, best.model.quantizer.bits, best.loss.quantizer_weight) == ("vq", 9, 1.0)
    kept = load_config(str(tmp_path / "out/trials/000/preset.yaml"))
    assert kept.model.quantizer.entropy == load_config("demo").model.quantizer.entropy


def test_importance_finds_the_parameter_that_matters(tmp_path):
    study = Study(random_sweep(tmp_path, "random", 24), str(tmp_path / "out"))
    draw(study, lambda record: math.log10(record.parameters["loss.quantizer_weight"]))
    shares = study.importances()
    assert shares["loss.quantizer_weight"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_importance_is_not_claimed_from_too_few_or_equal_trials(tmp_path):
    few = Study(small_sweep(tmp_path), str(tmp_path / "few"))
    draw(few)
    assert few.importances() == {}
    equal = Study(random_sweep(tmp_path, "random", 8), str(tmp_path / "equal"))
    draw(equal)
    assert equal.importances() == {}


def test_the_table_marks_the_best_and_shows_what_is_missing(tmp_path):
    study = Study(small_sweep(tmp_path), str(tmp_path / "out"))
    finish(study, study.next(), 21.5)
    study.end(study.next(), "failed", "the disk was full")
    lines = markdown(study).splitlines()
    assert lines[0] == "| trial | state | model.quantizer.bits | psnr |"
    assert lines[2:] == ["| **0** | **finished** | **6** | **21.5** |", "| 1 | failed | 10 | – |"]
    write_results(study)
    assert "- trial 1 is failed: the disk was full" in (tmp_path / "out/README.md").read_text()


numbers = st.integers(0, 8).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.sampled_from([min, max]))
def test_the_pareto_front_holds_exactly_what_no_other_point_beats(points, better):
    def beats(a, b):
        return a != b and a[0] <= b[0] and better(a[1], b[1]) == a[1]

    front = pareto_front(points, better)
    expected = {point for point in points if not any(beats(other, point) for other in points)}
    assert {points[place] for place in front} == expected
    assert len(front) == len(expected)
    assert [points[place][0] for place in front] == sorted(points[place][0] for place in front)


def test_a_record_survives_its_file(tmp_path):
    study = Study(small_sweep(tmp_path), str(tmp_path / "out"))
    record = study.next()
    study.report(record, 5, {"psnr": 11.0})
    study.retry(record, "the trial's process was lost")
    study.report(record, 5, {"psnr": 12.0})
    study.report(record, 10, {"psnr": 13.0})
    finish(study, record, 14.0)
    [read] = read_records(str(tmp_path / "out"))
    assert read == record
    assert read == Record(
        number=0,
        parameters={"model.quantizer.bits": 6},
        state="finished",
        figures={"psnr": 14.0},
        reports=[(5, {"psnr": 12.0}), (10, {"psnr": 13.0})],
        attempts=2,
        again=["the trial's process was lost"],
    )
