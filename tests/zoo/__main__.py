"""Runs the sweep, or a part of it, and writes the table; what is done is not done again."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, each of which has one model

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from zoo.catalogue import names
from zoo.ledger import HERE, Ledger, fingerprint, shortfall, totals, whole
from zoo.table import PARTS, markdown
from zoo.workers import GIB, sweep

TIMEOUTS = {"meta": 120.0, "numbers": 900.0}


def main() -> int:
    options = _options()
    console = Console()
    every = names()
    chosen = [name for name in every if re.search(options.only, name)][: options.limit]
    ledgers = {part: Ledger(HERE / "results" / f"{part}.jsonl", fingerprint()) for part in PARTS}
    for part in options.part:
        _run(part, chosen, ledgers[part], options, console)
    found = {
        part: [ledger.records[name] for name in chosen if name in ledger.records]
        for part, ledger in ledgers.items()
    }
    for part in options.part:
        console.print(_summary(part, found[part]))
    if len(chosen) == len(every):
        (HERE / "RESULTS.md").write_text(markdown(found, len(every)))
    good = all(whole(r) for part in options.part for r in found[part] if r["outcome"] != "none")
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="one part; default: both")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="models whose library:name it is found in"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="no more than the first N of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="models at a time")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for one model")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="for one model; default: what is free, shared"
    )
    parser.add_argument("--fresh", action="store_true", help="do again what is done already")
    options = parser.parse_args()
    options.part = options.part or list(PARTS)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    options.memory = options.memory or 0.9 * free / options.jobs
    return options


def _run(part: str, chosen: list[str], ledger: Ledger, options: argparse.Namespace, console: Console) -> None:
    due = [name for name in chosen if options.fresh or name not in ledger.records]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(part, total=len(due))
        timeout = options.timeout or TIMEOUTS[part]
        for record in sweep(part, due, options.jobs, timeout, options.memory):
            ledger.add(record)
            progress.advance(bar)
            if record["outcome"] in ("fail", "unfit"):
                progress.console.print(f"{record['model']}: {'; '.join(shortfall(record))}", markup=False)


def _summary(part: str, records: list[dict[str, Any]]) -> Table:
    columns = ("models", "whole", "fail", "unfit", "sites", "converted", "seconds")
    table = Table("library", *columns, title=PARTS[part])
    for library, count in totals(records).items():
        table.add_row(library, *(f"{count[column]:.0f}" for column in columns))
    return table


if __name__ == "__main__":
    sys.exit(main())
