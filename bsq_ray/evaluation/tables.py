"""Format results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

# Title, number of decimals, and the function that selects the best value: min, max, or None to highlight no value.
Column = tuple[str, int, Callable[[Iterable[float]], float] | None]


def metric_table(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, Column]) -> list[str]:
    """Return the lines of a Markdown table with the best value of each column in bold.

    Columns without values are omitted.

    Args:
        rows: for each row name, its metrics by name.
        columns: for each metric name, its column; the order is that of the table.
    """
    visible = {key: column for key, column in columns.items() if any(key in metrics for metrics in rows.values())}
    lines = ["| | " + " | ".join(title for title, _, _ in visible.values()) + " |", "|---" * (len(visible) + 1) + "|"]
    for name, metrics in rows.items():
        cells = []
        for key, (_, decimals, select_best) in visible.items():
            values = [row[key] for row in rows.values() if key in row]
            text = f"{metrics[key]:.{decimals}f}" if key in metrics else "–"
            can_compare = key in metrics and len(values) > 1
            is_best = can_compare and select_best is not None and metrics[key] == select_best(values)
            cells.append(f"**{text}**" if is_best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
