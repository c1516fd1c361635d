"""The command line: it parses, calls, renders, and returns an exit code.

0: done and proven. 1: the proof failed, or there was nothing to convert. 2: something given cannot be used,
and one line on stderr says what to do. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import contextlib
import enum
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from typer.core import TyperGroup

from renormify import __version__
from renormify.errors import InputError, RenormifyError, RenormifyWarning

if TYPE_CHECKING:
    from rich.console import Console

    from renormify.commands import Request

__all__ = ["app", "main"]

# typer has brought its own copy of click since 0.26; this is the base of its usage errors with and without.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Stat(str, enum.Enum):
    """Which statistic is averaged."""

    sigma = "sigma"
    var = "var"


class _Group(TyperGroup):
    """Turns every error into one line and an exit code, also where the app is called without :func:`main`."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
        except _UsageError as error:
            code = _fail(f"{error.format_message()} (see renormify --help)", 2)  # type: ignore[attr-defined]
        except RenormifyError as error:
            code = _fail(str(error), error.exit_code)
        except typer.Abort:
            code = _fail("interrupted; nothing was written", 130)
        if standalone:
            sys.exit(code or 0)
        return code


app = typer.Typer(
    cls=_Group,
    help="Turn the BatchNorm of a pretrained PyTorch model into Batch Renormalization, prove that nothing "
    "changed, and deploy to ONNX with a proof of parity.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the ``renormify`` command."""
    # Asked to end, clean up as after an interrupt.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app(prog_name="renormify")


Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT", show_default=False, help="safetensors, or a state dict of torch.save."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", show_default=False, help="The same as CHECKPOINT."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SOURCE",
        show_default=False,
        help="torchvision:NAME, timm:NAME or package.module:factory. "
        "A checkpoint that renormify wrote names its zoo model itself.",
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="N,C,H,W",
        show_default=False,
        help="Shape of the example input; once for each input. Default: what the checkpoint or the zoo says.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", show_default=False)]
Force = Annotated[
    bool, typer.Option("--force", help="Replace an existing output. An input is never replaced.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", show_default=False, help="Write the report as an HTML page too."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every site.")]
BatchSizes = Annotated[str, typer.Option("--batch-sizes", metavar="N,...", help="Batch sizes to compare at.")]
RMax = Annotated[float, typer.Option("--r-max", help="Limit of the scale correction r.")]
DMax = Annotated[float, typer.Option("--d-max", help="Limit of the shift correction d.")]
Momentum = Annotated[
    str,
    typer.Option(
        "--momentum", metavar="FLOAT|keep", help="Of the running statistics; keep: each layer's own."
    ),
]
StatOption = Annotated[
    Stat, typer.Option("--stat", help="Average sigma (the paper) or the variance (torch).")
]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"renormify {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Holds the options of the command itself; its help is the app's."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command(
    epilog="Examples:\n\n"
    "renormify inspect --model torchvision:resnet18\n\n"
    "renormify inspect net.pth --model my.models:build --json"
)
def inspect(
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show the sites that a conversion would convert or skip, and what a checkpoint says of itself."""
    with _session(as_json, html, full=True) as session:
        request = session.request(checkpoint, weights, model, None)
        from renormify import commands

        session.finish(commands.inspect_checkpoint(request, commands.Settings()))


@app.command(
    epilog="Examples:\n\n"
    "renormify convert net.pth --model torchvision:resnet18 -o renorm.safetensors\n\n"
    "renormify convert net.pth --model my.models:build --input-shape 1,3,64,64 -o out.pt"
)
def convert(
    output: Output,
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Shape = None,
    r_max: RMax = 3.0,
    d_max: DMax = 5.0,
    momentum: Momentum = "0.01",
    stat: StatOption = Stat.sigma,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint, prove that evaluation is unchanged to the bit, and write it."""
    with _session(as_json, html, full=verbose, force=force) as session:
        request = session.request(checkpoint, weights, model, input_shape, output)
        from renormify import commands

        settings = commands.Settings(r_max, d_max, _momentum(momentum), stat.value)
        document = commands.convert_checkpoint(request, output, settings, force=force)
        session.finish(document, wrote=document["output"], failure="the converted model is not the original")


@app.command(
    epilog="Examples:\n\n"
    "renormify export renorm.safetensors -o model.onnx\n\n"
    "renormify export net.pth --model timm:resnet18 --batch-sizes 1,4 -o model.onnx"
)
def export(
    output: Output,
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Shape = None,
    batch_sizes: BatchSizes = "1,2,7",
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold the norms into their neighbours.")
    ] = True,
    opset: Annotated[int | None, typer.Option("--opset", show_default=False, help="The ONNX opset.")] = None,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX with the norms folded away, and keep the file only if it agrees with the model."""
    with _session(as_json, html, full=verbose, force=force) as session:
        sizes = _batch_sizes(batch_sizes)
        request = session.request(checkpoint, weights, model, input_shape, output)
        from renormify import commands

        document = commands.export_checkpoint(
            request, output, batch_sizes=sizes, fold=fold, opset=opset, force=force
        )
        session.finish(document, wrote=document["output"], failure="the ONNX file differs from the model")


@app.command(
    epilog="Examples:\n\n"
    "renormify verify model.onnx renorm.safetensors\n\n"
    "renormify verify model.onnx net.pth --model timm:resnet18 --batch-sizes 1,8"
)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", show_default=False)],
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Shape = None,
    batch_sizes: BatchSizes = "1,2,7",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Compare an ONNX file with the model that it was made from."""
    with _session(as_json, html) as session:
        sizes = _batch_sizes(batch_sizes)
        request = session.request(checkpoint, weights, model, input_shape, file)
        from renormify import commands

        document = commands.verify_file(file, request, batch_sizes=sizes)
        session.finish(document, failure=f"{file} differs from the model")


@app.command(epilog="Examples:\n\nrenormify demo\n\nrenormify demo -o /tmp/demo")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where all files go.")
    ] = Path("demo-output"),
) -> None:
    """Convert, prove, fine-tune and deploy a real network, in two minutes."""
    with _quiet_warnings():
        from renormify import demo as demonstration

        demonstration.run(output, _console())


class _Session:
    """One command's run: where its progress, its document and its verdict go."""

    def __init__(
        self, as_json: bool, html: Path | None, full: bool, force: bool, progress: Callable[[str], None]
    ) -> None:
        self._as_json = as_json
        self._html = html
        self._full = full
        self._force = force
        self._progress = progress
        self._finished: tuple[dict[str, Any], Path | None, str] | None = None

    def request(
        self,
        checkpoint: Path | None,
        weights: Path | None,
        model: str | None,
        shapes: list[str] | None,
        *files: Path,
    ) -> Request:
        """What the arguments ask for, checked as far as that goes before anything heavy is imported.

        ``files`` are the others that the command reads or writes: the page must be none of them.
        """
        if checkpoint is not None and weights is not None and checkpoint != weights:
            raise InputError(
                f"CHECKPOINT and --weights are the same thing, but differ: {checkpoint}, {weights}"
            )
        parsed = tuple(_shape(text) for text in shapes) if shapes else None
        file = checkpoint or weights
        if self._html is not None:
            self._check_page([file, *files] if file else [*files])
        from renormify.commands import Request

        return Request(file, model, parsed, self._progress)

    def finish(self, document: dict[str, Any], *, wrote: Path | None = None, failure: str = "") -> None:
        """Takes the result, to be rendered when the work is over."""
        if self._html is not None:
            from renormify import reporting
            from renormify.outputs import staged

            parts = reporting.sections(document, full=True)
            page = reporting.html_page(parts, title=f"renormify {document['command']}")
            with staged(self._html, force=self._force) as target:
                target.write_text(page, encoding="utf-8")
        self._finished = (document, wrote, failure)

    def _check_page(self, files: list[Path]) -> None:
        from renormify import reporting
        from renormify.outputs import check_output

        assert self._html is not None
        check_output(self._html, force=self._force, inputs=files)
        if any(self._html.absolute() == file.absolute() for file in files):
            raise InputError(f"--html {self._html} is the output itself; give another name")
        reporting.html_page(())  # says now, not after the work, that jinja2 is missing

    def render(self) -> None:
        """Prints the result.

        Raises:
            typer.Exit: with code 1 where the proof failed.
        """
        from renormify import reporting

        if self._finished is None:
            return
        document, wrote, failure = self._finished
        if self._as_json:
            typer.echo(reporting.to_json(document))
        else:
            console = _console()
            reporting.print_sections(console, reporting.sections(document, full=self._full))
            for path in (wrote, self._html):
                if path is not None:
                    console.print(f"Wrote {path}", soft_wrap=True)
        if not document["passed"]:
            raise typer.Exit(_fail(f"{failure}; nothing was written" if "output" in document else failure, 1))


@contextlib.contextmanager
def _session(
    as_json: bool, html: Path | None, *, full: bool = False, force: bool = False
) -> Iterator[_Session]:
    with contextlib.ExitStack() as stack:
        # Whatever a user's factory or an exporter prints must not mix with the document.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(_quiet_warnings())
        session = _Session(as_json, html, full, force, stack.enter_context(_progress(as_json)))
        yield session
    session.render()


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[str], None]]:
    if as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("Starting") as status:
        yield lambda text: status.update(escape(text))


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
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
    print(f"renormify: warning: {_printable(str(message))}", file=sys.stderr)


def _console() -> Console:
    from rich.console import Console

    # In a pipe there is no width to keep to, and a broken line is hard to search.
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input-shape {text!r}: expected positive whole numbers, as 1,3,224,224")
    return shape


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch-sizes {text!r}: expected positive whole numbers, as 1,2,7")
    return sizes


def _momentum(text: str) -> float | Literal["keep"]:
    if text == "keep":
        return "keep"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--momentum {text!r}: expected a number, as 0.01, or keep") from None


def _fail(message: str, code: int) -> int:
    print(f"renormify: error: {_printable(message)}", file=sys.stderr)
    return code


def _printable(message: str) -> str:
    # One line; and a file's name may hold anything, but must not steer the terminal.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
