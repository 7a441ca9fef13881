"""Files of measurements: a run replaces values and provenance and keeps text."""

import datetime
import json
from importlib import metadata

import pytest
from result_files import RESULTS, write_results


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "quantizer-cpu.json").write_text((RESULTS / "quantizer-cpu.json").read_text())
    return tmp_path


def test_write_results_replaces_values_and_keeps_text(folder):
    before = json.loads((folder / "quantizer-cpu.json").read_text())
    kept = write_results("quantizer-cpu", {"bsq-18": {"ms": 1.23456, "mb": 4}}, folder)
    after = json.loads((folder / "quantizer-cpu.json").read_text())
    assert after["rows"][0] == {"id": "bsq-18", "quantizer": "BSQ", "bits": 18, "ms": 1.235, "mb": 4}
    assert after["rows"][1:] == before["rows"][1:]
    assert kept == [row["id"] for row in before["rows"][1:]]
    assert {key: after[key] for key in ("title", "command", "columns", "notes")} == {
        key: before[key] for key in ("title", "command", "columns", "notes")
    }
    assert after["date"] == datetime.date.today().isoformat()
    assert after["versions"]["torch"] == metadata.version("torch").split("+")[0]
    assert after["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("none", {}, "does not exist"),
        ("quantizer-cpu", {"none": {}}, "has no row 'none'"),
        ("quantizer-cpu", {"bsq-18": {"years": 1}}, "has no column years"),
    ],
)
def test_write_results_unknown_name_raises(folder, name, rows, message):
    with pytest.raises(ValueError, match=message):
        write_results(name, rows, folder)
