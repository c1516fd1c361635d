"""The form that every result takes in a report: a section with a table of text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LONG", "WORST", "Section", "name_of", "number_of", "rows_of", "text_of"]

#: More rows than a screen holds are summarised, unless everything was asked for.
LONG = 24
#: So many are shown then.
WORST = 12


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        title: its heading.
        summary: what it says, in one line.
        passed: its verdict, or None where there is none to give.
        headers: of its table's columns.
        rows: of its table; without any there is no table.
        notes: further lines.
        pictures: SVG elements, which the HTML page alone shows.
    """

    title: str
    summary: str
    passed: bool | None = None
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


def rows_of(records: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The cells of a table, a row for each record."""
    return tuple(tuple(text_of(record.get(key)) for key in keys) for record in records)


def text_of(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    if isinstance(value, (Mapping, list)):
        return json.dumps(value)
    return number_of(value) if isinstance(value, float) else str(value)


def number_of(value: Any) -> str:
    """A number to four digits; a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def name_of(name: str) -> str:
    """A layer's name, where the model itself may be one."""
    return name or "(the model itself)"
