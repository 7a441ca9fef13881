"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

# Title, digits, and which value of a column is the better one: min, max, or None if neither is.
Column = tuple[str, int, Callable[[Iterable[float]], float] | None]


def metric_table(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, Column]) -> list[str]:
    """Lines of a table of the columns that any row has, the better value of each in bold.

    Args:
        rows: figures by name, for each row's name.
        columns: by the names of figures, in their order.
    """
    visible = {key: column for key, column in columns.items() if any(key in metrics for metrics in rows.values())}
    lines = ["| | " + " | ".join(title for title, _, _ in visible.values()) + " |", "|---" * (len(visible) + 1) + "|"]
    for name, metrics in rows.items():
        cells = []
        for key, (_, digits, better) in visible.items():
            values = [other[key] for other in rows.values() if key in other]
            text = f"{metrics[key]:.{digits}f}" if key in metrics else "–"
            best = better is not None and key in metrics and len(values) > 1 and metrics[key] == better(values)
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
