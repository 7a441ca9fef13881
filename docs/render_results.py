"""Render the measurements in docs/results/*.json into the Markdown pages (format: docs/results/README.md).

python docs/render_results.py            update README.md and docs/**/*.md
python docs/render_results.py --check    change nothing; exit 1 and name the pages that are out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_REGION = re.compile(r"(<!-- results:([a-z0-9-]+)((?: [a-z]+(?:=\S+)?)*) -->)(.*?)(<!-- /results -->)", re.S)
_MARKER = re.compile(r"<!-- (?:results:[a-z]|/results)")
_OPTIONS = {"columns", "rows", "bare", "value"}


@dataclass(frozen=True)
class Table:
    """A benchmark's columns and rows, reduced to the selected ones."""

    columns: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def cell(self, row: dict[str, Any], column: dict[str, Any]) -> str:
        """Format a value; a missing one becomes a dash."""
        value = row.get(column["key"])
        if value is None:
            return "–"
        if isinstance(value, str):
            return value
        return format(value, column.get("format", ",d" if isinstance(value, int) else "g"))

    def markdown(self) -> str:
        """Return the table; the best value of a column with `best` is bold."""
        lines = [[column["title"] for column in self.columns], ["---"] * len(self.columns)]
        for row in self.rows:
            lines.append([self._emphasized(row, column) for column in self.columns])
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def _emphasized(self, row: dict[str, Any], column: dict[str, Any]) -> str:
        text = self.cell(row, column)
        choose = {"max": max, "min": min}.get(column.get("best", ""))
        values = [other.get(column["key"]) for other in self.rows]
        numbers = [value for value in values if isinstance(value, int | float)]
        is_best = choose is not None and len(numbers) > 1 and row.get(column["key"]) == choose(numbers)
        return f"**{text}**" if is_best else text


def select(items: list[dict[str, Any]], key: str, selector: str | None, what: str) -> list[dict[str, Any]]:
    """Return the items whose `key` is in the comma-separated list, in its order; all items without a list.

    Raises:
        ValueError: an item of the list does not exist.
    """
    if selector is None:
        return items
    by_key = {item[key]: item for item in items}
    missing = [name for name in selector.split(",") if name not in by_key]
    if missing:
        raise ValueError(f"no {what} {', '.join(missing)}; choose from {', '.join(by_key)}")
    return [by_key[name] for name in selector.split(",")]


def caption(benchmark: dict[str, Any]) -> str:
    """Return the provenance of a table: command, date, commit, machine, versions."""
    machine = benchmark["machine"]
    gpu, cores, cpu = machine.get("gpu"), machine.get("cores"), machine.get("cpu")
    hardware = f"{machine.get('num_gpus', 1)} x {gpu}" if gpu else f"{cores} cores of an {cpu}, no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in benchmark["versions"].items())
    measured = f"{benchmark['date']}, commit `{benchmark['commit']}`"
    return f"*{benchmark['title']}: `{benchmark['command']}`; {measured}; {hardware}; {versions}.*"


def render(benchmark: dict[str, Any], options: dict[str, str]) -> str:
    """Return the text between two markers.

    Raises:
        ValueError: an option, a column or a row does not exist, or `value` selects more than one cell.
    """
    if unknown := options.keys() - _OPTIONS:
        raise ValueError(f"no option {', '.join(unknown)}; choose from {', '.join(sorted(_OPTIONS))}")
    columns = select(benchmark["columns"], "key", options.get("columns"), "column")
    rows = select(benchmark["rows"], "id", options.get("rows"), "row")
    table = Table(columns, rows)
    if "value" in options and (len(rows), len(columns)) != (1, 1):
        raise ValueError("value needs exactly one row and one column")
    if "value" in options:
        return table.cell(rows[0], columns[0])
    parts = [table.markdown()]
    if "bare" not in options:
        notes = "\n".join(f"- {note}" for note in benchmark["notes"])
        parts += [caption(benchmark), notes] if notes else [caption(benchmark)]
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def render_page(text: str, results: Path) -> str:
    """Return a page with the text between all pairs of markers replaced.

    Raises:
        ValueError: a marker is malformed or unpaired, or names what does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        opening, name, words, _, closing = match.groups()
        path = results / f"{name}.json"
        if not path.exists():
            raise ValueError(f"results:{name}: {path.name} does not exist")
        options = {option: value for option, _, value in (word.partition("=") for word in words.split())}
        try:
            return opening + render(json.loads(path.read_text(encoding="utf-8")), options) + closing
        except ValueError as error:
            raise ValueError(f"results:{name}: {error}") from error

    if len(_MARKER.findall(text)) != 2 * len(_REGION.findall(text)):
        raise ValueError("a results marker is malformed or has no counterpart")
    return _REGION.sub(replace, text)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Update or check all pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    problems = []
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(root)
        try:
            rendered = render_page(text, root / "docs" / "results")
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if rendered != text and check:
            problems.append(f"{name}: out of date; run python docs/render_results.py")
        elif rendered != text:
            page.write_text(rendered, encoding="utf-8")
            print(f"updated {name}")
    print("".join(f"{problem}\n" for problem in problems), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
