"""One command's run: its progress and warnings on stderr, its result on stdout, its verdict as exit code.

While a command works, nothing but it may come onto stdout, whatever a user's factory or an exporter prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import typer

from renormify import __version__
from renormify.errors import InputError, RenormifyWarning, one_line, printable
from renormify.terminal import console, file_lines, progress_bar, silent

if TYPE_CHECKING:
    from renormify.folders import Outcome
    from renormify.subjects import Request
    from renormify.writers import Progress

__all__ = [
    "Reading",
    "Session",
    "discard_unwritable",
    "fail",
    "fail_as_json",
    "folder_session",
    "open_standard_streams",
    "quiet_warnings",
    "session_of",
]


class Reading(NamedTuple):
    """How a checkpoint is read and its model built; see :class:`renormify.subjects.Request`."""

    kwargs: dict[str, Any] | None = None
    key: str | None = None
    prefix: str = ""
    trust_pickle: bool = False


class Session:
    """One command's run: where its progress, its document and its verdict go."""

    def __init__(
        self, as_json: bool, html: Path | None, full: bool, force: bool, quiet: bool, progress: Progress
    ) -> None:
        self._quiet = quiet
        self._as_json = as_json
        self._html = html
        self._full = full
        self._force = force
        self._progress = progress
        self._finished: dict[str, Any] | None = None
        self._reported = False  # what failed then is no failure now

    def request(
        self,
        checkpoint: Path | None,
        weights: Path | None,
        model: str | None,
        shapes: tuple[tuple[int, ...], ...] | None = None,
        *,
        output: Path | None = None,
        reads: Path | None = None,
        reading: Reading = Reading(),  # noqa: B008 - it cannot change
    ) -> Request:
        """What the arguments ask for, checked as far as that goes before anything heavy is imported.

        ``output`` and ``reads`` are the other files of the command: the page must be none of them.
        """
        if checkpoint is not None and weights is not None and checkpoint != weights:
            raise InputError(
                f"CHECKPOINT and --weights are the same thing, but differ: {checkpoint}, {weights}"
            )
        file = checkpoint or weights
        if self._html is not None:
            self._check_page(output, [path for path in (file, reads) if path is not None])
        from renormify.subjects import Request

        return Request(file, model, shapes, self._progress, *reading)

    def finish(self, document: dict[str, Any]) -> None:
        """Takes the result, to be rendered when the work is over."""
        if self._html is not None:
            from renormify import reporting
            from renormify.outputs import staged

            parts = reporting.sections(document, full=True)
            page = reporting.html_page(parts, title=f"renormify {document['command']}")
            with staged(self._html, force=self._force) as target:
                target.write_text(page, encoding="utf-8", errors="backslashreplace")
        self._finished = document

    def report(self, path: Path) -> None:
        """Takes a result that was printed before, to be rendered again.

        Raises:
            InputError: it is none.
        """
        if self._html is not None:
            self._check_page(None, [path])
        try:
            text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {one_line(error)}") from error
        from renormify import reporting

        document = reporting.parse(text, str(path))
        self._reported = True
        self.finish(document)

    def _check_page(self, output: Path | None, inputs: list[Path]) -> None:
        from renormify import reporting
        from renormify.outputs import check_output

        assert self._html is not None
        if output is not None and self._html.resolve() == output.resolve():
            raise InputError(f"--html {self._html} is the output itself; give another name")
        check_output(self._html, force=self._force, inputs=inputs)
        reporting.html_page(())  # says now, not after the work, that jinja2 is missing

    def render(self) -> None:
        """Prints the result.

        Raises:
            typer.Exit: with code 1 where the proof failed, or the document's own.
        """
        from renormify import reporting

        if self._finished is None:
            return
        document = self._finished
        if self._quiet and not self._as_json:
            pass
        elif self._as_json:
            _print(reporting.to_json(document))
        else:
            terminal = console()
            reporting.print_sections(terminal, reporting.sections(document, full=self._full))
            for path in (None if self._reported else document.get("output"), self._html):
                if path is not None:
                    terminal.print(printable(f"Wrote {path}"), soft_wrap=True)
        if not document["passed"] and not self._reported:
            consequence = "; nothing was written" if "output" in document else ""
            raise typer.Exit(fail(f"{document['reason']}{consequence}", document.get("exit_code", 1)))


@contextlib.contextmanager
def session_of(
    as_json: bool, html: Path | None, *, full: bool = False, force: bool = False, quiet: bool = False
) -> Iterator[Session]:
    """The session of a command; it is rendered when the block is left without an error."""
    with contextlib.ExitStack() as stack:
        # Whatever a user's factory or an exporter prints must not mix with the document.
        stack.enter_context(_stdout_to_stderr())
        stack.enter_context(quiet_warnings())
        progress = stack.enter_context(progress_bar(as_json or quiet))
        session = Session(as_json, html, full, force, quiet, progress)
        yield session
    session.render()


class FolderSession(Session):
    """The run of a command on many files, each told of as it is done."""

    def __init__(self, quiet: bool, as_json: bool, show: Callable[[str, int, int], None]) -> None:
        super().__init__(as_json, None, False, False, quiet, silent)
        self._show = show

    def tell(self, outcome: Outcome, done: int, total: int) -> None:
        """Prints one line for a file."""
        self._show(outcome.line(), done, total)


@contextlib.contextmanager
def folder_session(quiet: bool, as_json: bool) -> Iterator[FolderSession]:
    """The session of a command on many files; it is rendered when the block is left without an error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_warnings())
        show = stack.enter_context(file_lines(quiet or as_json))
        session = FolderSession(quiet, as_json, show)
        yield session
    session.render()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    # Of the process too, and not of Python alone: a user's factory may start other programs.
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def open_standard_streams() -> None:
    """Gives the process the standard streams that it was started without."""
    # Where one is closed, the next file that is opened would take its place, and get what is printed.
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for the rest of the process
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name may have characters that the encoding of stdout has not; stderr does so by itself.
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_unwritable() -> None:
    """Lets go of what stdout does not take, which Python would try once more at its end and complain of."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def quiet_warnings() -> Iterator[None]:
    """Shows our own warnings, each on one line, and those that the user asked for."""
    with warnings.catch_warnings():
        if not sys.warnoptions:  # with -W or PYTHONWARNINGS the user sees what he asked for
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", RenormifyWarning)
        warnings.showwarning = _show_warning  # catch_warnings() puts the old one back
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"renormify: warning: {_on_one_line(str(message))}", file=sys.stderr)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads it any more, which is no failure of the proof
        raise typer.Exit(141) from None


def fail(message: str, code: int) -> int:
    """Prints the one line of an error, and returns the exit code."""
    with contextlib.suppress(OSError):  # a stderr that takes nothing must not change the code
        print(f"renormify: error: {_on_one_line(message)}", file=sys.stderr, flush=True)
    return code


def fail_as_json(message: str, code: int, command: str | None) -> int:
    """The same, with a document on stdout for whoever asked for one."""
    from renormify import reporting

    document = {"command": command, "renormify": __version__, "passed": False, "reason": message}
    _print(reporting.to_json(document | {"exit_code": code}))
    return fail(message, code)


def _on_one_line(message: str) -> str:
    return printable(" ".join(message.split()))
