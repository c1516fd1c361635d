"""The results: one JSON line for each model, and what they were got with."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LIBRARIES = ("torch", "torchvision", "timm")
PRESENTATION = ("zoo.ledger", "zoo.table")
HERE = Path(__file__).parent


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def fingerprint() -> str:
    """Of all a result depends on: the libraries, the judge, and what conversion imports of renormify."""
    import renormify

    assert renormify.convert  # imports what it needs
    files = {
        Path(module.__file__)
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in ("renormify", "zoo")
        and name not in PRESENTATION
        and getattr(module, "__file__", None)
    }
    content = b"".join(file.read_bytes() for file in sorted(files))
    return hashlib.sha256(json.dumps(versions()).encode() + content).hexdigest()[:12]


class Ledger:
    """A file of results that a run continues; lines got with anything else do not count.

    Args:
        file: is appended to, one line as each model is done.
        mark: :func:`fingerprint` of this run.
    """

    def __init__(self, file: Path, mark: str) -> None:
        self.file, self.mark = file, mark
        self.records: dict[str, Record] = {}
        text = file.read_text() if file.exists() else ""
        self._gap = "\n" if text and not text.endswith("\n") else ""  # behind a line that was cut off
        for line in text.splitlines():
            record = _parsed(line)
            if record.get("fingerprint") == mark:
                self.records[record["model"]] = record

    def add(self, record: Record) -> None:
        record = {**record, "fingerprint": self.mark}
        self.records[record["model"]] = record
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("a") as stream:
            stream.write(self._gap + json.dumps(record) + "\n")
        self._gap = ""


def _parsed(line: str) -> Record:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the run was stopped while it wrote
        return {}


def whole(record: Record) -> bool:
    """Whether a model is at 100 %: judged, nothing failed, every site converted."""
    return record["outcome"] == "pass" and record["converted"] == record["sites"]


def totals(records: Iterable[Record]) -> dict[str, Counter[str]]:
    """By library: models with norm layers, those at 100 %, failed and unfit, and the sites."""
    result: dict[str, Counter[str]] = {}
    for record in records:
        if record["outcome"] == "none":
            continue
        count = result.setdefault(record["model"].partition(":")[0], Counter())
        count["models"] += 1
        count["whole"] += whole(record)
        count[record["outcome"]] += 1
        count["sites"] += record.get("sites", 0)
        count["converted"] += record.get("converted", 0)
        count["seconds"] += record.get("seconds", 0)
    return result


def shortfall(record: Record) -> list[str]:
    """Why a model is below 100 %."""
    left = [f"{count} skipped: {reason}" for reason, count in record.get("skipped", {}).items()]
    return [text for text in (*record.get("failures", ()), record.get("unfit", ""), *left) if text]
