"""A sweep's YAML: what is shipped loads, and what is wrong is said in one sentence."""

from pathlib import Path

import pytest
import yaml
from small_sweeps import small_sweep

from bsq_ray.config import load_config
from bsq_ray.tuning.study import Study
from bsq_ray.tuning.sweep_config import SweepConfig, load_sweep

LPIPS = {"metrics": {"lpips": "min"}}
SHIPPED_SWEEPS = sorted((Path(__file__).parents[2] / "jobs" / "sweeps").glob("*.yaml"))


def space_of(key, **parameter):
    return {"space": {key: parameter}}


@pytest.mark.parametrize("file", SHIPPED_SWEEPS, ids=lambda file: file.stem)
def test_load_sweep_shipped_sweeps_give_valid_configs(file, tmp_path):
    """Each shipped sweep loads, and every combination of its space is a valid configuration."""
    sweep = load_sweep(str(file))
    study = Study(sweep, str(tmp_path))
    for number in range(min(sweep.trials, 12)):
        record = study.next()
        assert record.number == number, study.records
        run_config = load_config(study.preset_url(record))
        if sweep.name == "quantizers":
            assert run_config.model.quantizer.bits == 14
            assert run_config.model.quantizer.kind == record.parameters["quantizer"]
    assert not [record for record in study.records if record.state == "invalid"]


def test_shipped_sweeps_match_documentation():
    """The shipped sweeps are exactly those that the documentation names."""
    assert [file.stem for file in SHIPPED_SWEEPS] == ["codebook-dimension", "demo", "loss-weights", "quantizers"]
    bits = load_sweep(str(SHIPPED_SWEEPS[0])).space["model.quantizer.bits"].values
    assert bits == [10, 14, 18, 24, 36]


def test_shipped_sweeps_explain_every_key():
    """The loss-weights sweep lists every key, and each key has a comment."""
    file = next(file for file in SHIPPED_SWEEPS if file.stem == "loss-weights")
    keys = yaml.safe_load(file.read_text())
    assert set(keys) == set(SweepConfig.model_fields)
    for section in ("scheduler", "budget"):
        assert set(keys[section]) == set(SweepConfig.model_fields[section].annotation.model_fields)
    for shipped in SHIPPED_SWEEPS:
        uncommented_lines = [line for line in shipped.read_text().splitlines() if ":" in line and "#" not in line]
        # Keys of the space and of the preset explain themselves.
        assert all(line.startswith("  ") or line in ("space:", "metrics:", "budget:") for line in uncommented_lines), (
            uncommented_lines
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty; name at least one key"),
        (space_of("model.quantizer.bit", values=[6]), r"key model.quantizer.bit; did you mean model.quantizer.bits\?"),
        (space_of("model.quantiser", values=[{"kind": "bsq"}]), "unknown key model.quantiser.kind; did you mean"),
        (space_of("x", choices={"a": {"loss.perceptual": 1}}), "unknown key loss.perceptual; did you mean"),
        ({"set": {"training.step": 5}}, r"set: unknown key training.step; did you mean training.steps\?"),
        (space_of("model.quantizer.bits", valeus=[6]), r"unknown key .*valeus; did you mean .*values\?"),
        (space_of("model.quantizer.bits"), "give one of values, choices, integers, uniform, loguniform"),
        (space_of("model.quantizer.bits", values=[]), "values is empty"),
        (space_of("model.quantizer.bits", values=[6, 6]), "names one twice"),
        (space_of("model.quantizer.bits", integers=[6, 2]), r"integers \[6, 2\] is not a range"),
        (space_of("loss.perceptual_weight", loguniform=[0, 1]), "must be above 0"),
        (space_of("loss.perceptual_weight", uniform=[0, 1]), "a grid needs values, choices or integers"),
        ({"searcher": "bayes"}, "searcher: 'bayes' is not valid; valid values are grid, random, tpe"),
        ({"searcher": "tpee"}, r"did you mean tpe\?"),
        ({"searcher": "random"}, "budget.trials is missing"),
        ({"budget": {"trials": 3}}, "budget.trials is not for a grid"),
        ({"budget": {"steps": 3, "minutes": 1}}, "budget has steps and minutes"),
        ({"budget": {"resources": {"GPU": 0}}}, "budget.resources .* is nothing"),
        ({"budget": {"step": 3}}, r"unknown key budget.step; did you mean budget.steps\?"),
        ({"metrics": {}}, "metrics is empty"),
        ({"metrics": {"lpip": "min"}}, r"no evaluation of a tokenizer gives lpip; did you mean lpips\?"),
        ({"metrics": {"lpips": "low"}}, "metrics.lpips: 'low' is not valid; valid values are min, max"),
        ({**LPIPS, "scheduler": {"kind": "asha"}}, "lpips is not measured along the way.* psnr or perceptual"),
        ({**LPIPS, "scheduler": {"kind": "asha", "metric": "psnr"}}, "scheduler.direction is missing"),
        ({"preset": "dmo"}, r"no preset is called 'dmo'; did you mean demo\?"),
        (
            {"stage": "prior", "metrics": {"bits_per_token": "min"}},
            "stage prior is not that of preset demo, which is t",
        ),
        ({"stage": "prior"}, "no evaluation of a prior gives psnr"),
    ],
)
def test_load_sweep_invalid_key_or_value_raises(tmp_path, changes, message):
    """A mistake in a sweep raises a one-line error that names the file, the key and a suggestion."""
    with pytest.raises(ValueError, match=message) as error_info:
        small_sweep(tmp_path, **changes)
    text = str(error_info.value)
    assert "small.yaml" in text or "preset" in changes
    assert "\n" not in text


def test_load_sweep_missing_or_invalid_file_raises(tmp_path):
    """A missing file and a file that is not a mapping raise an error."""
    with pytest.raises(ValueError, match="it does not exist"):
        load_sweep(str(tmp_path / "none.yaml"))
    (tmp_path / "text.yaml").write_text("only words")
    with pytest.raises(ValueError, match="expected keys and values"):
        load_sweep(str(tmp_path / "text.yaml"))


def test_load_sweep_resolves_preset_relative_to_file(tmp_path, monkeypatch):
    """A preset path is relative to the sweep file, whatever the working directory is."""
    (tmp_path / "mine.yaml").write_text("base: demo\nname: mine\n")
    small_sweep(tmp_path, preset="mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_sweep("small.yaml").preset == str(tmp_path / "mine.yaml")
