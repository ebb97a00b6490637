"""Tables and lists in Markdown, for the evidence of a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose rows have as many cells as ``header``."""
    lines = [_row(header), "|" + "---|" * len(header)]
    for row in rows:
        assert len(row) == len(header), row
        lines.append(_row(row))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """``text`` without what Markdown would take for emphasis or the end of a table's cell."""
    return text.replace("*", "\\*").replace("|", "\\|")


def listed(items: Sequence[object]) -> str:
    """``a, b and c``."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def bullets(*items: str) -> str:
    """A list with a line for each of ``items``."""
    return "\n".join(f"- {item}" for item in items)
