"""Does the runs that are not done yet, and writes tables and pictures of all.

Stopped at any moment, it goes on where it was. Run ``make paper``; ``make paper REPEAT=1`` to see for
yourself, with the settings that the committed results chose and every other run anew; ``make paper QUICK=1``
for a look in five minutes. The results of the latter two are kept apart.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, each of which does one run

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from paper.data import FOLDER, missing
from paper.phases import Phase, phases
from paper.pictures import draw
from paper.records import Records, machine
from paper.settings import FULL, QUICK
from paper.tables import fill, repeated, sections
from paper.training import perform

HERE = Path(__file__).resolve().parent
PARTS = ("main", "ablation", "finetuning", "defaults")


def main() -> int:
    options = _options()
    console = Console()
    if options.data_missing and not options.tables:
        console.print(options.data_missing, style="red", markup=False, soft_wrap=True)
        return 2
    signal.signal(signal.SIGTERM, _end)
    study = QUICK if options.quick else FULL
    options.output.mkdir(parents=True, exist_ok=True)
    records = Records(options.output / "results.jsonl")
    committed = Records(HERE / "results.jsonl") if options.repeat else None
    if committed is not None:
        records.results |= committed.choosing()
    if not options.tables:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            for part in options.only:
                for phase in phases(study, part, records.results):
                    _do(phase, records, pool, options.data, console)
    found = sections(study, records, options.output / "bench.json")
    if committed is not None:
        found["repeated"] = repeated(study, committed.results, records.results)
    for name, table in found.items():
        console.print(f"\n{name}", style="bold")
        console.print(table, markup=False, soft_wrap=True)
    draw(study, records.results, options.output)
    readme = options.output / "README.md"
    readme.write_text(fill(readme.read_text() if readme.exists() else "", found))
    console.print(f"\nTables, pictures and results are in {options.output}", soft_wrap=True)
    return 0


def _end(*_: object) -> NoReturn:
    """Asked once to end, it does so; asked again, it is not kept from tidying up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _do(
    phase: Phase,
    records: Records,
    pool: ProcessPoolExecutor,
    data: Path,
    console: Console,
) -> None:
    due = phase.due(records.results)
    where = machine()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(phase.title, total=len(due))
        task = functools.partial(perform, folder=data, afterwards=phase.afterwards)
        futures = {pool.submit(task, run): run for run in due}
        try:
            for future in as_completed(futures):
                records.add(futures[future], future.result(), where)
                progress.advance(bar)
        except BaseException:  # an interrupt: what is being run is begun anew next time
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="short runs of some arms, in five minutes")
    extent.add_argument(
        "--repeat", action="store_true", help="with the committed choice of settings, all other runs anew"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of the study; default: all")
    parser.add_argument("--tables", action="store_true", help="no runs: tables and pictures of what is there")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, help="where results are kept; default: beside this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a core each")
    options = parser.parse_args()
    options.only = options.only or list(PARTS)
    apart = "paper-quick" if options.quick else "paper-repeat" if options.repeat else None
    options.output = options.output or (Path(apart) if apart else HERE)
    if options.repeat and options.output.resolve() == HERE:
        parser.error("--repeat needs a folder of its own, since the committed results are not to be touched")
    options.data_missing = missing(options.data)
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; what is done is kept, and the same command goes on")
