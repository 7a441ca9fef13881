"""Write measurements into docs/results/*.json (format: docs/results/README.md).

    record("quantizer-cpu", "bsq-18", ms=0.97, mb=3.7) ─▶ row "bsq-18" of docs/results/quantizer-cpu.json

Title, columns, labels of the rows and notes are text: they are edited in the file. A run replaces the measured values,
the date, the commit, the machine and the versions.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
_SIGNIFICANT_DIGITS = 4

Rows = Mapping[str, Mapping[str, Any]]


def write_results(name: str, rows: Rows, folder: Path = RESULTS) -> list[str]:
    """Replace the values of rows, by id, in the file of a benchmark.

    Returns:
        The ids of rows that keep their values because this run did not measure them.

    Raises:
        ValueError: the file does not exist, or has no such row or column.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist; create it with title, command, columns, row ids and notes")
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = {column["key"] for column in result["columns"]}
    by_id = {row["id"]: row for row in result["rows"]}
    for row_id, values in rows.items():
        if row_id not in by_id:
            raise ValueError(f"{path} has no row '{row_id}'; add it with its labels")
        if unknown := values.keys() - columns:
            raise ValueError(f"{path} has no column {', '.join(sorted(unknown))}; add it with its title")
        by_id[row_id].update({key: _rounded(value) for key, value in values.items()})
    result["date"] = datetime.date.today().isoformat()
    result["commit"] = _commit()
    result["machine"] = _machine(with_gpu=bool(result["machine"].get("gpu")))
    # Without the local part of a version, such as "+cpu".
    result["versions"] = {package: metadata.version(package).split("+")[0] for package in result["versions"]}
    path.write_text(_to_json(result), encoding="utf-8")
    return [row_id for row_id in by_id if row_id not in rows]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _machine(*, with_gpu: bool) -> dict[str, Any]:
    if with_gpu:
        return {"gpu": torch.cuda.get_device_name(), "num_gpus": 1}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "gpu": None}


def _to_json(result: Mapping[str, Any]) -> str:
    """Return JSON with one line for each column, row and note."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            lines = ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]" if value else f"  {json.dumps(key)}: []")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
