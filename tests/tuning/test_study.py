"""The study: what is tried next, what is remembered, and what becomes of it; without Ray."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sweeps import small_sweep

from bsq_ray.config import load_config
from bsq_ray.tuning.results import markdown_table, write_results
from bsq_ray.tuning.study import Study, TrialRecord, read_records
from bsq_ray.tuning.sweep_plots import pareto_front

TWO_BY_TWO_GRID = {"model.quantizer.bits": {"values": [6, 10]}, "loss.quantizer_weight": {"values": [0.1, 1.0]}}
RANGES = {
    "loss.quantizer_weight": {"loguniform": [1e-3, 10.0]},
    "training.optimizer.weight_decay": {"uniform": [0.0, 1.0]},
    "model.encoder.layers": {"integers": [1, 4]},
}


def random_sweep(folder, searcher, num_samples=12, space=RANGES, **changes):
    return small_sweep(folder, space=space, searcher=searcher, budget={"trials": num_samples, "steps": 10}, **changes)


def finish_trial(study, record, value):
    study.end(record, "finished", figures={"psnr": value})


def run_all(study, value=lambda record: 10.0):
    """Runs what is left, with psnr from `value`; the drawn parameters."""
    sampled_params = []
    while (record := study.next()) is not None:
        sampled_params.append(record.parameters)
        finish_trial(study, record, value(record))
    return sampled_params


def test_study_grid_tries_every_combination_in_order(tmp_path):
    """A grid tries every combination in order."""
    study = Study(small_sweep(tmp_path, space=TWO_BY_TWO_GRID), str(tmp_path / "out"))
    assert study.left == 4
    assert [tuple(parameters.values()) for parameters in run_all(study)] == [(6, 0.1), (6, 1.0), (10, 0.1), (10, 1.0)]
    assert study.left == 0


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_study_sampled_values_in_range_and_seeded(tmp_path, searcher):
    """Sampled values lie in their ranges and repeat with the seed."""

    def value(record):
        return -abs(math.log10(record.parameters["loss.quantizer_weight"]))

    def sample_params(folder, seed):
        return run_all(Study(random_sweep(tmp_path, searcher, seed=seed), str(tmp_path / folder)), value)

    first = sample_params("a", 0)
    assert first == sample_params("b", 0) != sample_params("c", 1)
    assert len({str(parameters) for parameters in first}) == 12
    for parameters in first:
        assert 1e-3 <= parameters["loss.quantizer_weight"] <= 10
        assert 0 <= parameters["training.optimizer.weight_decay"] <= 1
        assert parameters["model.encoder.layers"] in (1, 2, 3, 4)


def test_study_tpe_converges_to_good_values(tmp_path):
    """TPE samples later values closer to the optimum than early ones."""

    def quadratic(record):
        return -((math.log10(record.parameters["loss.quantizer_weight"]) + 2) ** 2)

    space = {"loss.quantizer_weight": {"loguniform": [1e-3, 10.0]}}
    study = Study(random_sweep(tmp_path, "tpe", 40, space), str(tmp_path / "out"))
    sample_params = [math.log10(parameters["loss.quantizer_weight"]) for parameters in run_all(study, quadratic)]
    early, late = sample_params[:10], sample_params[-10:]
    assert sum(abs(value + 2) for value in late) < 0.5 * sum(abs(value + 2) for value in early)


@pytest.mark.parametrize("searcher", ["grid", "random", "tpe"])
def test_study_reloaded_continues_identically(tmp_path, searcher):
    """A study that is reloaded after every trial samples the same values as an uninterrupted one."""
    space = TWO_BY_TWO_GRID if searcher == "grid" else RANGES
    budget = {"steps": 10} if searcher == "grid" else {"steps": 10, "trials": 4}
    sweep = small_sweep(tmp_path, space=space, searcher=searcher, budget=budget)

    def value(record):
        return float(sum(map(float, record.parameters.values())))

    uninterrupted_params = run_all(Study(sweep, str(tmp_path / "whole")), value)
    reloaded_params = []
    for _ in range(4):
        study = Study(sweep, str(tmp_path / "parts"))
        record = study.next()
        reloaded_params.append(record.parameters)
        finish_trial(study, record, value(record))
    assert reloaded_params == uninterrupted_params
    assert Study(sweep, str(tmp_path / "parts")).next() is None


def test_study_resumed_counts_earlier_reports(tmp_path):
    """TPE ranks trials that were stopped early by their last report; so few trials are drawn at random that it acts."""
    sweep = random_sweep(tmp_path, "tpe", 16)

    def sample_params(folder, interrupted):
        study, all_drawn = Study(sweep, str(tmp_path / folder)), []
        while (record := study.next()) is not None:
            all_drawn.append(record.parameters)
            study.report(record, 5, {"psnr": -abs(record.parameters["training.optimizer.weight_decay"] - 0.3)})
            if interrupted:
                study = Study(sweep, str(tmp_path / folder))
                record = study.next()
            study.end(record, "stopped")
        return all_drawn

    assert sample_params("parts", True) == sample_params("whole", False)


def test_study_resumed_retries_running_and_failed_only(tmp_path):
    """A resumed study runs only running, failed and new trials again."""
    sweep = small_sweep(tmp_path, space={"model.quantizer.bits": {"values": [6, 7, 8, 9, 10, 33]}})
    study = Study(sweep, str(tmp_path / "out"))
    records = [study.next() for _ in range(5)]
    finish_trial(study, records[0], 20.0)
    study.report(records[1], 5, {"psnr": 12.0})
    study.end(records[1], "stopped")
    study.end(records[2], "failed", "the disk was full")
    study.end(records[3], "diverged", "the loss is not finite")
    resumed_study = Study(sweep, str(tmp_path / "out"))
    assert resumed_study.left == 3
    assert [record.number for record in resumed_study.ended] == [0, 1, 3]
    assert [(record.number, record.attempts) for record in iter(resumed_study.next, None)] == [(2, 2), (4, 2), (5, 1)]


def test_study_invalid_combination_is_recorded_and_skipped(tmp_path):
    """An invalid combination is recorded with its reason and skipped."""
    study = Study(small_sweep(tmp_path, space={"model.image_size": {"values": [33, 32]}}), str(tmp_path / "out"))
    assert study.next().number == 1
    invalid_record = read_records(str(tmp_path / "out"))[0]
    assert invalid_record.state == "invalid"
    assert "image_size 33 is not a multiple of patch_size 8" in invalid_record.reason


def test_study_finished_without_metric_is_failed(tmp_path):
    """A finished trial without a finite value of the metric counts as failed."""
    study = Study(small_sweep(tmp_path), str(tmp_path / "out"))
    first, second = study.next(), study.next()
    study.end(first, "finished", figures={"lpips": 0.3})
    study.end(second, "finished", figures={"psnr": math.nan})
    assert [(record.state, record.reason) for record in study.records] == [("failed", "it gave no psnr")] * 2
    assert study.best() is None


def test_study_damaged_record_raises_until_removed(tmp_path):
    """A damaged trial record raises an error that names the file, and removing it runs the trial again."""
    sweep, out = small_sweep(tmp_path), tmp_path / "out"
    run_all(Study(sweep, str(out)))
    record = out / "trials/000/trial.json"
    record.write_text(record.read_text()[:40])
    with pytest.raises(ValueError, match="trials/000/trial.json is damaged"):
        Study(sweep, str(out))
    record.unlink()
    assert Study(sweep, str(out)).next().number == 0


def test_study_best_follows_mode_of_first_metric(tmp_path):
    """The best trial is chosen by the mode of the first metric."""
    for mode, best in (("min", 0), ("max", 1)):
        sweep = small_sweep(tmp_path, metrics={"psnr": mode, "lpips": "min"})
        study = Study(sweep, str(tmp_path / mode))
        for psnr in (10.0, 20.0):
            study.end(study.next(), "finished", figures={"psnr": psnr, "lpips": 0.5})
        assert study.best().number == best


def test_best_preset_keeps_unchanged_base_sections(tmp_path):
    """A quantiser of another kind starts its section afresh; one of the same kind keeps what the preset says."""
    choices = {
        "bsq": {"model.quantizer": {"kind": "bsq", "bits": 9}},
        "vq": {"model.quantizer": {"kind": "vq", "codebook_size": 512}, "loss.quantizer_weight": 1.0},
    }
    sweep = small_sweep(tmp_path, space={"quantizer": {"choices": choices}})
    study = Study(sweep, str(tmp_path / "out"))
    for psnr in (10.0, 20.0):
        finish_trial(study, study.next(), psnr)
    write_results(study)
    best = load_config(str(tmp_path / "out/best.yaml"))
    assert (best.model.quantizer.kind, best.model.quantizer.bits, best.loss.quantizer_weight) == ("vq", 9, 1.0)
    trial_config = load_config(str(tmp_path / "out/trials/000/preset.yaml"))
    assert trial_config.model.quantizer.entropy == load_config("demo").model.quantizer.entropy


def test_importances_finds_the_relevant_parameter(tmp_path):
    """The parameter that determines the metric has most of the importance."""
    study = Study(random_sweep(tmp_path, "random", 24), str(tmp_path / "out"))
    run_all(study, lambda record: math.log10(record.parameters["loss.quantizer_weight"]))
    importances = study.importances()
    assert importances["loss.quantizer_weight"] > 0.8
    assert sum(importances.values()) == pytest.approx(1)


def test_importances_too_few_or_equal_trials_is_empty(tmp_path):
    """Too few trials, or trials with equal metrics, give no importances."""
    few = Study(small_sweep(tmp_path), str(tmp_path / "few"))
    run_all(few)
    assert few.importances() == {}
    equal = Study(random_sweep(tmp_path, "random", 8), str(tmp_path / "equal"))
    run_all(equal)
    assert equal.importances() == {}


def test_markdown_table_marks_best_and_missing_values(tmp_path):
    """The table marks the best trial and shows a dash for missing values."""
    study = Study(small_sweep(tmp_path), str(tmp_path / "out"))
    finish_trial(study, study.next(), 21.5)
    study.end(study.next(), "failed", "the disk was full")
    lines = markdown_table(study).splitlines()
    assert lines[0] == "| trial | state | model.quantizer.bits | psnr |"
    assert lines[2:] == ["| **0** | **finished** | **6** | **21.5** |", "| 1 | failed | 10 | – |"]
    write_results(study)
    assert "- trial 1 is failed: the disk was full" in (tmp_path / "out/README.md").read_text()


numbers = st.integers(0, 8).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.sampled_from([min, max]))
def test_pareto_front_contains_only_nondominated_points(points, better):
    """The Pareto front contains exactly the points that no other point dominates."""

    def beats(a, b):
        return a != b and a[0] <= b[0] and better(a[1], b[1]) == a[1]

    front = pareto_front(points, better)
    expected = {point for point in points if not any(beats(other, point) for other in points)}
    assert {points[index] for index in front} == expected
    assert len(front) == len(expected)
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_trial_record_json_roundtrip(tmp_path):
    """A trial record is equal after it is written and read."""
    study = Study(small_sweep(tmp_path), str(tmp_path / "out"))
    record = study.next()
    study.report(record, 5, {"psnr": 11.0})
    study.retry(record, "the trial's process was lost")
    study.report(record, 5, {"psnr": 12.0})
    study.report(record, 10, {"psnr": 13.0})
    finish_trial(study, record, 14.0)
    [read_record] = read_records(str(tmp_path / "out"))
    assert read_record == record
    assert read_record == TrialRecord(
        number=0,
        parameters={"model.quantizer.bits": 6},
        state="finished",
        figures={"psnr": 14.0},
        reports=[(5, {"psnr": 12.0}), (10, {"psnr": 13.0})],
        attempts=2,
        again=["the trial's process was lost"],
    )
