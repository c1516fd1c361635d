"""Many checkpoints at once: each in a process of its own, so that none can stop the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from renormify import __version__
from renormify.errors import InputError, RenormifyError

__all__ = ["Outcome", "convert_folder"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pt2")
_INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        input: the checkpoint, relative to the folder.
        output: where it went, or would have gone.
        status: ``"converted"``, ``"unproven"``, ``"done before"`` or ``"failed"``.
        reason: why it failed or is unproven.
        converted: how many sites were converted.
        seconds: how long it took, start of its process included.
    """

    input: str
    output: str
    status: str
    reason: str | None = None
    converted: int | None = None
    seconds: float = 0.0

    def line(self) -> str:
        """The outcome, for people."""
        sites = "" if self.converted is None else f", {self.converted} sites in {self.seconds:.1f} s"
        if self.status == "failed":
            return f"failed       {self.input}: {self.reason}"
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.status:<12} {self.input} -> {self.output}{sites}{why}"


def convert_folder(
    folder: Path,
    output: Path,
    options: Sequence[str],
    settings: Mapping[str, Any],
    *,
    jobs: int,
    force: bool,
    tell: Callable[[Outcome, int, int], None],
) -> dict[str, Any]:
    """Converts every checkpoint below a folder into another folder, under the same names.

    What is there already, with these settings and no older than its source, is left as it is: a run that was
    interrupted goes on where it was.

    Args:
        folder: with checkpoints in it, at any depth; shards and distributed checkpoints count as one each.
        output: made where it is missing.
        options: of the ``convert`` command, for every file.
        settings: those of the options, as a converted file records them.
        jobs: how many are converted at a time.
        force: convert also what was converted before.
        tell: is given each outcome as it comes, with how many are done of how many.

    Returns:
        The document; ``passed`` tells whether all are converted.

    Raises:
        InputError: there is no checkpoint in the folder, or the output folder is the same or cannot be made.
    """
    if _same(folder, output):
        raise InputError(f"{output} is the folder of the checkpoints itself; give another for what comes out")
    pairs = _pairs(folder, output)
    if not pairs:
        raise InputError(f"{folder} has no checkpoint in it (looked for {', '.join(_SUFFIXES)} and folders)")
    try:
        for _, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror or error}") from error
    outcomes: dict[Path, Outcome] = {}
    with _Workers(jobs) as workers:
        waiting: dict[Future[Outcome], Path] = {}
        for source, target in pairs:
            work = _Work(source, target, folder, options, settings, force, workers)
            waiting[workers.pool.submit(work)] = source
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                source = waiting.pop(future)
                outcomes[source] = future.result()
                tell(outcomes[source], len(outcomes), len(pairs))
    ordered = [outcomes[source] for source, _ in pairs]
    counts = Counter(outcome.status for outcome in ordered)
    failed = counts["failed"]
    return {
        "command": "convert",
        "renormify": __version__,
        "folder": folder,
        "into": output,
        "files": [dataclasses.asdict(outcome) for outcome in ordered],
        "counts": dict(counts),
        "passed": failed == 0,
        "reason": f"{failed} of {len(ordered)} files failed, the others are done" if failed else None,
    }


class _Workers(contextlib.AbstractContextManager["_Workers"]):
    """Threads that each wait for a process; when they are left, no process goes on."""

    def __init__(self, jobs: int) -> None:
        self.pool = ThreadPoolExecutor(jobs)
        self.processes: set[subprocess.Popen[str]] = set()
        self.ended = False
        cores = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = {"OMP_NUM_THREADS": str(cores)} | os.environ

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(self.processes):
            process.terminate()
        self.pool.shutdown()

    def run(self, command: list[str]) -> tuple[int, str, str]:
        """Runs a command to its end."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.environment,
        )
        self.processes.add(process)
        if self.ended:  # between the start of the process and now
            process.terminate()
        try:
            output, errors = process.communicate()
        finally:
            self.processes.discard(process)
        return process.returncode, output, errors


@dataclasses.dataclass(frozen=True)
class _Work:
    source: Path
    target: Path
    folder: Path
    options: Sequence[str]
    settings: Mapping[str, Any]
    force: bool
    workers: _Workers

    def __call__(self) -> Outcome:
        started = time.monotonic()
        name = str(self.source.relative_to(self.folder))
        if not self.force and self.target.exists():
            reason = _why_not_done(self.source, self.target, self.settings)
            status = "failed" if reason else "done before"
            return Outcome(name, str(self.target), status, reason)
        command = [sys.executable, "-m", "renormify", "convert", *self.options, "--json"]
        force = ["--force"] if self.force else []
        code, output, errors = self.workers.run(
            [*command, *force, "-o", str(self.target), "--", str(self.source)]
        )
        seconds = time.monotonic() - started
        if code != 0:
            lines = [line for line in errors.splitlines() if line.strip()]
            reason = (
                lines[-1].removeprefix("renormify: error: ") if lines else f"its process ended with {code}"
            )
            return Outcome(name, str(self.target), "failed", reason, seconds=seconds)
        document = json.loads(output)
        unproven = document.get("unproven")
        converted = len(document["report"]["converted"])
        status = "unproven" if unproven else "converted"
        return Outcome(name, str(self.target), status, unproven, converted, seconds)


def _pairs(folder: Path, output: Path) -> list[tuple[Path, Path]]:
    """Each checkpoint and where it goes."""
    sources = sorted(_checkpoints(folder, output))
    stems = Counter(map(_stem, sources))
    pairs = []
    for source in sources:
        stem = _stem(source)
        if stems[stem] > 1:  # a.pt and a.pth, or a file and its shards: all names in full
            stem = source
        relative = stem.relative_to(folder)
        pairs.append((source, output / relative.parent / f"{relative.name}.safetensors"))
    return pairs


def _stem(source: Path) -> Path:
    if source.name.endswith(_INDEX):
        return source.with_name(source.name.removesuffix(_INDEX).removesuffix(".safetensors"))
    return source if source.is_dir() else source.with_suffix("")


def _checkpoints(folder: Path, output: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(folder):
        here = Path(place)
        if ".metadata" in names and here != folder:
            inner.clear()
            yield here
            continue
        inner[:] = [name for name in inner if not name.startswith(".") and not _same(here / name, output)]
        shards: set[str] = set()
        for name in names:
            if name.endswith(_INDEX):
                shards |= _listed(here / name)
                yield here / name
        for name in names:
            if name.endswith(_SUFFIXES) and not name.startswith(".") and name not in shards:
                yield here / name


def _same(first: Path, second: Path) -> bool:
    return second.exists() and first.samefile(second)


def _listed(index: Path) -> set[str]:
    try:
        return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()  # it is converted as it is, and its conversion says what is wrong


def _why_not_done(source: Path, target: Path, settings: Mapping[str, Any]) -> str | None:
    """Why a file that is there is not the outcome of this conversion, or None where it is."""
    from renormify.reading import load_checkpoint

    try:
        recorded = load_checkpoint(target).metadata.get("settings")
    except RenormifyError:
        recorded = None
    if recorded != dict(settings):
        what = "with other settings" if recorded else "and is not from renormify"
        return f"{target} exists already, {what}; --force replaces it"
    files = [source] if source.is_file() else [file for file in source.iterdir() if file.is_file()]
    if max(file.stat().st_mtime for file in files) > target.stat().st_mtime:
        return f"{target} exists already and is older than its source; --force converts it again"
    return None
