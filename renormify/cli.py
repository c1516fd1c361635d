"""The command line: it parses, calls, renders, and returns an exit code.

0: done and proven. 1: the proof failed, or there was nothing to convert. 2: something given cannot be used,
and one line on stderr says what to do. 130 and 143: interrupted, ended. 141: nobody reads the output.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import enum
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from renormify import __version__
from renormify.errors import InputError, ProofError, RenormifyError, one_line
from renormify.session import (
    console,
    discard_unwritable,
    fail,
    open_standard_streams,
    quiet_warnings,
    session_of,
)

__all__ = ["app", "main"]

# typer has brought its own copy of click since 0.26; this is the base of its usage errors with and without.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Stat(str, enum.Enum):
    """Which statistic is averaged."""

    sigma = "sigma"
    var = "var"


class Leftover(str, enum.Enum):
    """What becomes of a norm that does not fold."""

    auto = "auto"
    bn = "bn"
    affine = "affine"
    conv = "conv"


class _TerminatedError(BaseException):
    """SIGTERM came. Like an interrupt it passes through a user's factory, where a SystemExit is an error."""


class _Group(TyperGroup):
    """Turns every error into one line and an exit code, also where the app is called without :func:`main`."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        open_standard_streams()
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
            sys.stdout.flush()
        except _UsageError as error:
            code = fail(f"{error.format_message()} (see renormify --help)", 2)  # type: ignore[attr-defined]
        except RenormifyError as error:
            code = fail(str(error), error.exit_code)
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

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would return the code without a word
            return fail("interrupted; nothing was written", 130)


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
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="renormify")


def _terminate(*_: object) -> None:
    # Asked to end, clean up as after an interrupt.
    raise _TerminatedError


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
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="Compare on normal, large and zero inputs too, at each optimisation level of onnxruntime, and "
        "layer by layer.",
    ),
]
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
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        show_default=False,
        help="Convert only sites whose name matches, as 'layer4.*'; may be given several times.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", show_default=False, help="Leave out sites whose name matches."
    ),
]
IncludeFrozen = Annotated[bool, typer.Option("--include-frozen", help="Convert frozen BatchNorm too.")]


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
    include: Include = None,
    exclude: Exclude = None,
    include_frozen: IncludeFrozen = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show the sites that a conversion would convert or skip, and what a checkpoint says of itself."""
    with session_of(as_json, html, full=True) as session:
        request = session.request(checkpoint, weights, model)
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
    input_shape: Shape = None,
    r_max: RMax = 3.0,
    d_max: DMax = 5.0,
    momentum: Momentum = "0.01",
    stat: StatOption = Stat.sigma,
    include: Include = None,
    exclude: Exclude = None,
    include_frozen: IncludeFrozen = False,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint, prove that evaluation is unchanged to the bit, and write it."""
    with session_of(as_json, html, full=verbose, force=force) as session:
        request = session.request(checkpoint, weights, model, _shapes(input_shape), output=output)
        from renormify import commands

        settings = commands.Settings(r_max, d_max, _momentum(momentum), stat.value, include_frozen)
        selection = commands.Selection(tuple(include or ()), tuple(exclude or ()))
        document = commands.convert_checkpoint(request, output, settings, selection, force=force)
        session.finish(document)


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
    thorough: Thorough = False,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX with the norms folded away, and keep the file only if it agrees with the model."""
    with session_of(as_json, html, full=verbose, force=force) as session:
        sizes = _batch_sizes(batch_sizes)
        request = session.request(checkpoint, weights, model, _shapes(input_shape), output=output)
        from renormify import commands

        document = commands.export_checkpoint(
            request, output, batch_sizes=sizes, fold=fold, opset=opset, thorough=thorough, force=force
        )
        session.finish(document)


@app.command(
    epilog="Examples:\n\n"
    "renormify fold model.onnx -o folded.onnx\n\n"
    "renormify fold model.onnx --leftover affine --input-shape 1,3,640,640 -o folded.onnx --json"
)
def fold(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", show_default=False)],
    output: Output,
    leftover: Annotated[
        Leftover,
        typer.Option(
            "--leftover",
            help="What becomes of a norm that does not fold: left (bn), Mul and Add (affine), "
            "a depthwise Conv (conv), or what runs fastest (auto).",
        ),
    ] = Leftover.auto,
    input_shape: Shape = None,
    batch_sizes: BatchSizes = "1,2,7",
    prove: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the folded file with the file as it was.")
    ] = True,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Fold the norms of any ONNX file into their neighbours, and keep it only if it computes the same."""
    with session_of(as_json, html, full=verbose, force=force) as session:
        sizes = _batch_sizes(batch_sizes)
        progress = session.request(None, None, None, output=output, reads=file).progress
        from renormify import commands

        document = commands.fold_file(
            file,
            output,
            leftover=leftover.value,
            shapes=_shapes(input_shape),
            batch_sizes=sizes,
            verify=prove,
            force=force,
            progress=progress,
        )
        session.finish(document)


@app.command(
    epilog="Examples:\n\n"
    "renormify verify model.onnx renorm.safetensors\n\n"
    "renormify verify model.onnx net.pth --model timm:resnet18 --batch-sizes 1,8 --thorough\n\n"
    "renormify verify model.onnx renorm.safetensors --runtime onnxruntime --runtime openvino --data images"
)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", show_default=False)],
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    input_shape: Shape = None,
    batch_sizes: BatchSizes = "1,2,7",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            show_default=False,
            help="onnxruntime (the default), onnxruntime-basic, onnxruntime-off or openvino; "
            "may be given several times.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER|FILE.npz",
            show_default=False,
            help="Compare on these images, or this array (N, ...), rather than on random numbers.",
        ),
    ] = None,
    thorough: Thorough = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every comparison.")] = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Compare an ONNX file with the model that it was made from."""
    with session_of(as_json, html, full=verbose) as session:
        sizes = _batch_sizes(batch_sizes)
        request = session.request(checkpoint, weights, model, _shapes(input_shape), reads=file)
        from renormify import commands
        from renormify.samples import Samples

        document = commands.verify_file(
            file,
            request,
            batch_sizes=sizes,
            runtimes=runtime or (),
            samples=None if data is None else Samples(data, batch_size=1, max_batches=max(sizes)),
            thorough=thorough,
        )
        session.finish(document)


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
    as_json: Json = False,
) -> None:
    """Look at the norm layers at your own batch size: which suffer, and what to do."""
    with session_of(as_json, html, full=verbose) as session:
        request = session.request(checkpoint, weights, model, _shapes(input_shape), reads=data)
        from renormify import commands
        from renormify.samples import Samples

        samples = Samples(
            data, batch_size, max_batches, shuffle, _numbers("--mean", mean), _numbers("--std", std)
        )
        session.finish(commands.diagnose_checkpoint(request, samples))


@app.command(epilog="Examples:\n\nrenormify demo\n\nrenormify demo -o /tmp/demo --json")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where all files go.")
    ] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """Convert, prove, fine-tune and deploy a real network, in two minutes."""
    if not as_json:  # what is found is shown as it is found
        with quiet_warnings():
            from renormify import demo as demonstration

            demonstration.run(output, console())
        return
    with session_of(as_json, None) as session:
        from rich.console import Console

        from renormify import demo as demonstration

        try:
            session.finish(demonstration.run(output, Console(quiet=True)))
        except ProofError as error:
            if error.document is None:
                raise
            session.finish(error.document)


def _shapes(texts: list[str] | None) -> tuple[tuple[int, ...], ...] | None:
    return tuple(map(_shape, texts)) if texts else None


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


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r}: expected numbers, as 0.5,0.5,0.5") from None


def _momentum(text: str) -> float | Literal["keep"]:
    if text == "keep":
        return "keep"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--momentum {text!r}: expected a number, as 0.01, or keep") from None
