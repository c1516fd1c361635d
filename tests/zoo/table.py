"""RESULTS.md: the totals, and every model below 100 % with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.ledger import totals, versions, whole

Record = dict[str, Any]
PARTS = {
    "meta": "On the meta device: every site accounted for, nothing else touched",
    "numbers": "With numbers: evaluation bit for bit, a training step by the paper's rule, and back",
}


def markdown(records: dict[str, list[Record]], models: int) -> str:
    """The whole page, of the records of each part; ``models`` is how many there should be in each."""
    got = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# The zoo",
        "",
        "Every model of torchvision and timm with BatchNorm, as `make zoo` found it. How it is judged is in",
        f"tests/zoo/structure.py and tests/zoo/behaviour.py. {got}.",
    ]
    for part, title in PARTS.items():
        if records.get(part):
            lines += ["", f"## {title}", "", *_totals(records[part]), ""]
            if due := models - len(records[part]):
                lines += [f"{due} models have not been examined yet, some without BatchNorm.", ""]
            lines += _below(records[part])
    return "\n".join(lines) + "\n"


def _totals(records: Iterable[Record]) -> list[str]:
    lines = [
        "| library | models | at 100 % | failed | not judged | sites | converted |",
        "|---|---|---|---|---|---|---|",
    ]
    for library, n in sorted(totals(records).items()):
        numbers = (n["models"], n["whole"], n["fail"], n["unfit"], n["sites"], n["converted"])
        lines.append(f"| {library} | " + " | ".join(map(str, numbers)) + " |")
    return lines


def _below(records: Iterable[Record]) -> list[str]:
    """Those below 100 %, grouped by reason, and those with a remark."""
    judged = sorted((r for r in records if r["outcome"] != "none"), key=lambda record: record["model"])
    reasons = [(label, text) for r in judged if not whole(r) for label, text in _reasons(r)]
    remarks = [(r["model"], note) for r in judged for note in r.get("notes", ())]
    lines = ["Below 100 %:", ""] if reasons else ["None is below 100 %."]
    lines += _grouped(reasons)
    return (
        [*lines, "", "Remarks, not of the conversion's making:", "", *_grouped(remarks)] if remarks else lines
    )


def _reasons(record: Record) -> list[tuple[str, str]]:
    """What the model is to be listed under, and how."""
    name, sites = record["model"], record.get("sites", 0)
    plain = [(name, text) for text in (*record.get("failures", ()), record.get("unfit", "")) if text]
    skipped = record.get("skipped", {}).items()
    return plain + [(f"{name} {count}/{sites}", f"skipped: {reason}") for reason, count in skipped]


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for model, reason in pairs:
        groups.setdefault(reason, []).append(model)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        f"- {' '.join(reason.split())} ({len(models)}): {', '.join(models)}" for reason, models in ordered
    ]
