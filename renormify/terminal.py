"""What a person at a terminal sees while a command works: progress with rate and time left, and lines.

Nothing of it is shown in a pipe, to ``--quiet`` or beside ``--json``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from renormify.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task

    from renormify.writers import Progress

__all__ = ["console", "file_lines", "progress_bar", "silent"]


def console() -> Console:
    """A terminal on stdout, in which names are text and never markup."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise typer.Exit(141)

    # In a pipe there is no width to keep to, and a broken line is hard to search.
    return Plain(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


@contextlib.contextmanager
def progress_bar(hidden: bool) -> Iterator[Progress]:
    """Shows on stderr what is being done: of bytes the rate and the time left, of all else the time taken."""
    if hidden or not sys.stderr.isatty():
        yield silent
        return
    from rich import progress
    from rich.console import Console
    from rich.markup import escape

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        _only(progress.TimeElapsedColumn(), measured=False),
        _only(progress.BarColumn()),
        _only(progress.DownloadColumn(binary_units=True)),
        _only(progress.TransferSpeedColumn()),
        _only(progress.TimeRemainingColumn(compact=True)),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("Starting", total=None)
        current = ""

        def show(text: str, done: int = 0, total: int = 0) -> None:
            nonlocal current
            if text != current:
                current = text
                shown.reset(task, total=total or None, description=escape(printable(text)))
            shown.update(task, completed=done, total=total or None)

        yield show


@contextlib.contextmanager
def file_lines(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Prints a line for each file that is done; at a terminal with a bar below: rate and time left."""
    # The bar is on stdout, as the lines are, so that one makes room for the other.
    if hidden:
        yield lambda text, done, total: None
        return
    terminal = console()
    if not sys.stdout.isatty():
        yield lambda text, done, total: terminal.print(printable(text), soft_wrap=True)
        return
    from rich import progress

    columns = (
        progress.SpinnerColumn(),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("files"),
        _rate_of_files(),
    )
    with progress.Progress(*columns, console=terminal, transient=True) as shown:
        task = shown.add_task("", total=None)

        def show(text: str, done: int, total: int) -> None:
            terminal.print(printable(text), soft_wrap=True)
            shown.update(task, completed=done, total=total)

        yield show


def silent(text: str, done: int = 0, total: int = 0) -> None:
    """Shows no progress."""


def _only(column: ProgressColumn, *, measured: bool = True) -> ProgressColumn:
    """A column that is there for work whose measure is known, or for other work, alone."""
    from rich.progress import ProgressColumn

    class Column(ProgressColumn):
        def render(self, task: Task) -> object:  # type: ignore[override]
            return column.render(task) if bool(task.total) is measured else ""

    return Column()


def _rate_of_files() -> ProgressColumn:
    from rich.progress import ProgressColumn

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            # Over the whole run: rich goes by the last few steps, and files that are done side by side come
            # at once, after which its time left is none.
            if not (task.total and task.completed and task.elapsed):
                return ""
            left = round(task.elapsed / task.completed * (task.total - task.completed))
            return f"{60 * task.completed / task.elapsed:.1f}/min, {left // 60}:{left % 60:02} left"

    return Rate()
