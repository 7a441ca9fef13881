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
    shown = {key: column for key, column in columns.items() if any(key in figures for figures in rows.values())}
    lines = ["| | " + " | ".join(title for title, _, _ in shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, figures in rows.items():
        cells = []
        for key, (_, digits, better) in shown.items():
            values = [other[key] for other in rows.values() if key in other]
            text = f"{figures[key]:.{digits}f}" if key in figures else "–"
            best = better is not None and key in figures and len(values) > 1 and figures[key] == better(values)
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
