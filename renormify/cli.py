"""The command line: it parses, calls, renders, and returns an exit code.

0: done and proven. 1: the proof failed, or there was nothing to convert. 2: something given cannot be used,
and one line on stderr says what to do. 130 and 143: interrupted, ended. 141: nobody reads the output.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from renormify import __version__
from renormify.cli_onnx import onnx_commands
from renormify.errors import InputError, ProofError, RenormifyError, one_line
from renormify.options import (
    CHECKPOINT_SUFFIXES,
    Checkpoint,
    DMax,
    Exclude,
    Force,
    Html,
    Include,
    IncludeFrozen,
    Json,
    Key,
    Kwargs,
    Model,
    Momentum,
    Output,
    Peer,
    Prefix,
    Quiet,
    RMax,
    Shape,
    Stat,
    StatOption,
    TrustPickle,
    Verbose,
    Weights,
    kwargs_of,
    momentum_of,
    numbers,
    shapes_of,
)
from renormify.session import (
    Reading,
    discard_unwritable,
    fail,
    fail_as_json,
    folder_session,
    open_standard_streams,
    quiet_warnings,
    session_of,
)
from renormify.terminal import console

__all__ = ["app", "main"]

# typer has brought its own copy of click since 0.26; this is the base of its usage errors with and without.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _TerminatedError(BaseException):
    """SIGTERM came. Like an interrupt it passes through a user's factory, where a SystemExit is an error."""


class _Group(TyperGroup):
    """Turns every error into one line and an exit code, also where the app is called without :func:`main`."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        self._arguments = tuple(sys.argv[1:] if args is None else args)
        open_standard_streams()
        try:
            code = self._run(rest, extra | {"standalone_mode": False})
            sys.stdout.flush()
        except typer.Exit as end:  # nobody reads the document of an error
            code = end.exit_code
        except BrokenPipeError:
            code = 141
        except OSError as error:  # stdout's: those of files have become errors of ours on their way
            code = fail(one_line(error), 2)
        except _TerminatedError:
            code = 143
        discard_unwritable()
        if standalone:
            sys.exit(code or 0)
        return code

    def _run(self, rest: tuple[Any, ...], extra: dict[str, Any]) -> Any:
        try:
            return super().main(list(self._arguments), *rest, **extra)
        except _UsageError as error:
            return self._fail(f"{error.format_message()} (see renormify --help)", 2)  # type: ignore[attr-defined]
        except RenormifyError as error:
            return self._fail(str(error), error.exit_code)

    def _fail(self, message: str, code: int) -> int:
        if "--json" not in self._arguments:
            return fail(message, code)
        command = next((name for name in self._arguments if name in self.commands), None)
        return fail_as_json(message, code, command)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would return the code without a word
            return self._fail("interrupted; nothing was written", 130)


app = typer.Typer(
    cls=_Group,
    help="Turn the BatchNorm of a pretrained PyTorch model into Batch Renormalization, prove that nothing "
    "changed, and deploy to ONNX with a proof of parity.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(onnx_commands)


def main() -> None:
    """The entry point of the ``renormify`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, _terminate)
    app(prog_name="renormify")


def _terminate(*_: object) -> None:
    # Asked to end, clean up as after an interrupt.
    raise _TerminatedError


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
    kwargs: Kwargs = None,
    key: Key = None,
    prefix: Prefix = "",
    trust_pickle: TrustPickle = False,
    include: Include = None,
    exclude: Exclude = None,
    include_frozen: IncludeFrozen = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the sites that a conversion would convert or skip, and what a checkpoint says of itself."""
    with session_of(as_json, html, quiet=quiet, full=True) as session:
        request = session.request(
            checkpoint, weights, model, reading=Reading(kwargs_of(kwargs), key, prefix, trust_pickle)
        )
        from renormify import commands

        settings = commands.Settings(include_frozen=include_frozen)
        selection = commands.Selection(tuple(include or ()), tuple(exclude or ()))
        session.finish(commands.inspect_checkpoint(request, settings, selection))


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
    kwargs: Kwargs = None,
    key: Key = None,
    prefix: Prefix = "",
    trust_pickle: TrustPickle = False,
    input_shape: Shape = None,
    r_max: RMax = 3.0,
    d_max: DMax = 5.0,
    momentum: Momentum = "0.01",
    stat: StatOption = Stat.sigma,
    include: Include = None,
    exclude: Exclude = None,
    include_frozen: IncludeFrozen = False,
    prove: Annotated[
        bool,
        typer.Option(
            "--proof/--no-proof", help="Without it, weights go from file to file unproven, and fast."
        ),
    ] = True,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", metavar="N", min=1, help="Of a folder: files at a time.")
    ] = 1,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint, prove that evaluation is unchanged to the bit, and write it.

    A folder is converted file by file into the folder OUT; what was converted before is not done again.
    """
    source = checkpoint or weights
    if source is not None and source.is_dir() and output.suffix.lower() not in CHECKPOINT_SUFFIXES:
        if html is not None:
            raise InputError("--html is for one file; of a folder give --json, and that to renormify report")
        numbers = ("--r-max", str(r_max), "--d-max", str(d_max), "--momentum", momentum, "--stat", stat.value)
        patterns = [f"--include={text}" for text in include or ()] + [f"--exclude={t}" for t in exclude or ()]
        shapes = [f"--input-shape={text}" for text in input_shape or ()]
        given = {"--model": model, "--kwargs": kwargs, "--key": key, "--prefix": prefix or None}
        texts = [f"{name}={text}" for name, text in given.items() if text is not None]
        flags = {"--trust-pickle": trust_pickle, "--no-proof": not prove, "--include-frozen": include_frozen}
        options = (*numbers, *patterns, *shapes, *texts, *(flag for flag, on in flags.items() if on))
        kwargs_of(kwargs), shapes_of(input_shape)  # said now, not once for each file
        with folder_session(quiet, as_json) as session:
            from renormify import commands, folders

            settings = commands.Settings(r_max, d_max, momentum_of(momentum), stat.value, include_frozen)
            plain = commands.plain_settings(settings)
            run = folders.convert_folder
            session.finish(run(source, output, options, plain, jobs=jobs, force=force, tell=session.tell))
        return
    with session_of(as_json, html, quiet=quiet, full=verbose, force=force) as session:
        request = session.request(
            checkpoint,
            weights,
            model,
            shapes_of(input_shape),
            output=output,
            reading=Reading(kwargs_of(kwargs), key, prefix, trust_pickle),
        )
        from renormify import commands

        settings = commands.Settings(r_max, d_max, momentum_of(momentum), stat.value, include_frozen)
        selection = commands.Selection(tuple(include or ()), tuple(exclude or ()))
        document = commands.convert_checkpoint(request, output, settings, selection, force=force, prove=prove)
        session.finish(document)


@app.command(
    epilog="Examples:\n\n"
    "renormify revert renorm.safetensors -o batchnorm.safetensors\n\n"
    "renormify revert renorm.safetensors --model my.models:build -o net.pt --json"
)
def revert(
    output: Output,
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    kwargs: Kwargs = None,
    input_shape: Shape = None,
    force: Force = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make BatchNorm's checkpoint again of a converted one, and prove that evaluation is unchanged."""
    with session_of(as_json, html, quiet=quiet, force=force) as session:
        shapes, reading = shapes_of(input_shape), Reading(kwargs_of(kwargs))
        request = session.request(checkpoint, weights, model, shapes, output=output, reading=reading)
        from renormify import commands

        session.finish(commands.revert_checkpoint(request, output, force=force))


@app.command(
    epilog="Examples:\n\n"
    "renormify diagnose net.pth --model torchvision:resnet18 --data train-images --batch-size 4\n\n"
    "renormify diagnose net.pth --model my.models:build --data inputs.npz --html report.html"
)
def diagnose(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FOLDER|FILE.npz",
            show_default=False,
            help="Images, also in folders within; or an array (N, ...) as the model takes it.",
        ),
    ],
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Shape = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="The one you will train with.")] = 4,
    max_batches: Annotated[int, typer.Option("--max-batches", help="As many are looked at.")] = 32,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="Draw at random, or in the order of the data.")
    ] = True,
    mean: Annotated[
        str, typer.Option("--mean", metavar="R,G,B", help="Subtracted from images of values from 0 to 1.")
    ] = "0.485,0.456,0.406",
    std: Annotated[
        str, typer.Option("--std", metavar="R,G,B", help="What images are divided by then.")
    ] = "0.229,0.224,0.225",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every layer.")] = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look at the norm layers at your own batch size: which suffer, and what to do."""
    with session_of(as_json, html, full=verbose, quiet=quiet) as session:
        request = session.request(checkpoint, weights, model, shapes_of(input_shape), reads=data)
        from renormify import commands
        from renormify.samples import Samples

        samples = Samples(
            data, batch_size, max_batches, shuffle, numbers("--mean", mean), numbers("--std", std)
        )
        session.finish(commands.diagnose_checkpoint(request, samples))


@app.command(
    name="import",
    epilog="Examples:\n\n"
    "renormify import crossq.zip -o policy.safetensors\n\n"
    "renormify import net.pth --from torchrl --model my.models:build -o net.safetensors",
)
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="A state dict, a .zip of Stable-Baselines3, a .keras or .weights.h5 file.",
        ),
    ],
    output: Output,
    peer: Annotated[
        Peer, typer.Option("--from", help="Whose layers; auto: by the file's content.")
    ] = Peer.auto,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SOURCE",
            show_default=False,
            help="The model that is to load it, which gives each layer's eps and, for Keras, its name.",
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option("--eps", show_default=False, help="Of their layers, if not their package's default."),
    ] = None,
    force: Force = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Import the Batch Renorm layers of another package, so that they evaluate as there."""
    with session_of(as_json, html, force=force, quiet=quiet) as session:
        request = session.request(file, None, model, output=output)
        from renormify import commands

        document = commands.import_file(request, output, peer=peer.value, eps=eps, force=force)
        session.finish(document)


@app.command(epilog="Examples:\n\nrenormify demo\n\nrenormify demo -o /tmp/demo --json")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where all files go.")
    ] = Path("demo-output"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert, prove, fine-tune and deploy a real network, in two minutes."""
    if not (as_json or quiet):  # what is found is shown as it is found
        with quiet_warnings():
            from renormify import demo as demonstration

            demonstration.run(output, console())
        return
    with session_of(as_json, None, quiet=quiet) as session:
        from rich.console import Console

        from renormify import demo as demonstration

        try:
            session.finish(demonstration.run(output, Console(quiet=True)))
        except ProofError as error:
            if error.document is None:
                raise
            session.finish(error.document)


@app.command(epilog="Examples:\n\nrenormify doctor\n\nrenormify doctor --json > doctor.json")
def doctor(quiet: Quiet = False, as_json: Json = False) -> None:
    """Print versions, extras and devices, for a bug report."""
    with session_of(as_json, None, quiet=quiet) as session:
        from renormify import doctor as doctoring

        session.finish(doctoring.examine())


@app.command(epilog="Examples:\n\nrenormify report result.json\n\nrenormify report result.json -o page.html")
def report(
    result: Annotated[
        Path,
        typer.Argument(metavar="RESULT.json", help="What --json printed; - for stdin.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE.html", show_default=False, help="Write an HTML page."),
    ] = None,
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the result of another command again, or write it as an HTML page."""
    with session_of(as_json, output, full=verbose, force=force, quiet=quiet) as session:
        session.report(result)
