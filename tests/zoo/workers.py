"""One process for each model, so that no crash, hang or hunger of one stops the rest."""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

import renormify
from zoo.behaviour import COPIED, examine_behaviour
from zoo.catalogue import subject
from zoo.census import census
from zoo.structure import examine_structure, first_line
from zoo.verdicts import Verdict

GIB = 1 << 30
EXAMINERS = {"meta": examine_structure, "numbers": examine_behaviour}
Record = dict[str, Any]


@dataclass
class _Running:
    name: str
    process: Any
    deadline: float


def sweep(part: str, names: Sequence[str], jobs: int, timeout: float, memory: float) -> Iterator[Record]:
    """Examines the models, ``jobs`` at a time, and yields a record of each as it comes.

    The processes are forked from one that has imported the libraries and done nothing else.

    Args:
        part: ``"meta"`` or ``"numbers"``.
        names: ``library:model``.
        jobs: how many at a time.
        timeout: seconds for each.
        memory: GiB that each may allocate.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pending, running = deque(names), {}
    try:
        while pending or running:
            while pending and len(running) < jobs:
                name = pending.popleft()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, part, name, memory), daemon=True)
                process.start()
                theirs.close()
                running[ours] = _Running(name, process, time.monotonic() + timeout)
            nearest = min(task.deadline for task in running.values())
            ready = wait(list(running), timeout=max(0.0, nearest - time.monotonic()))
            overdue = [
                c for c, task in running.items() if c not in ready and time.monotonic() > task.deadline
            ]
            for connection in [*ready, *overdue]:
                task = running.pop(connection)
                yield _finish(connection, task, timeout, late=connection in overdue)
    finally:
        for task in running.values():
            task.process.kill()


def _finish(connection: Any, task: _Running, timeout: float, late: bool) -> Record:
    if late:
        task.process.kill()
        task.process.join()
        return {"model": task.name, "outcome": "unfit", "unfit": f"took more than {timeout:g} s"}
    try:
        record: Record = connection.recv()
    except EOFError:
        task.process.join()
        return {
            "model": task.name,
            "outcome": "fail",
            "failures": [f"crash: exit code {task.process.exitcode}"],
        }
    task.process.join()
    return record


def _work(connection: Connection, part: str, name: str, memory: float) -> None:
    """What a process does; its output goes nowhere, its record to the parent."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * GIB),) * 2)
    start = time.perf_counter()
    try:
        verdict = _too_large(name, memory) if part == "numbers" else None
        verdict = EXAMINERS[part](subject(name), renormify) if verdict is None else verdict
    except Exception as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            said = f"judge: {type(error).__name__}: {first_line(error)}"
            facts = {"traceback": traceback.format_exc()}
            connection.send({"model": name, "outcome": "fail", "failures": [said], "facts": facts})
            return
        verdict = Verdict(unfit=f"needs more than {memory:g} GiB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    connection.send(record_of(name, verdict) | {
        "seconds": round(time.perf_counter() - start, 2), "peak_gib": round(peak, 2)
    })  # fmt: skip


def _too_large(name: str, memory: float) -> Verdict | None:
    """The verdict on a model that needs no numbers: without norm layers, or too large for its state alone.

    What a sweep holds: weights, gradients, the state to return to, and for a copy both of a second model.
    """
    with torch.device("meta"):
        model = subject(name).build()
    sites = len(census(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    need = parameters * 4 * (5 if parameters <= COPIED else 3) / GIB
    if sites and need <= memory:
        return None
    unfit = f"{parameters / 1e6:.0f} M parameters need {need:.1f} GiB, of {memory:.1f}" if sites else ""
    return Verdict(sites=sites, unfit=unfit, facts={"parameters": parameters})


def record_of(name: str, verdict: Verdict) -> Record:
    """A line of the results."""
    outcome = "fail" if verdict.failures else "unfit" if verdict.unfit else "pass"
    if outcome == "pass" and not verdict.sites:
        outcome = "none"
    return {"model": name, "outcome": outcome, **vars(verdict)}
