"""The commands on ONNX files; :mod:`renormify.cli` takes them among its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from renormify.options import (
    BatchSizes,
    Checkpoint,
    Force,
    Html,
    Json,
    Key,
    Kwargs,
    Leftover,
    Model,
    Output,
    Prefix,
    Quiet,
    Shape,
    Thorough,
    TrustPickle,
    Verbose,
    Weights,
    batch_sizes_of,
    kwargs_of,
    shapes_of,
)
from renormify.session import Reading, session_of

__all__ = ["onnx_commands"]

onnx_commands = typer.Typer()


@onnx_commands.command(
    epilog="Examples:\n\n"
    "renormify export renorm.safetensors -o model.onnx\n\n"
    "renormify export net.pth --model timm:resnet18 --batch-sizes 1,4 -o model.onnx"
)
def export(
    output: Output,
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    kwargs: Kwargs = None,
    key: Key = None,
    prefix: Prefix = "",
    trust_pickle: TrustPickle = False,
    input_shape: Shape = None,
    batch_sizes: BatchSizes = "1,2,7",
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Fold the norms into their neighbours.")
    ] = True,
    opset: Annotated[
        int | None, typer.Option("--opset", show_default=False, help="The ONNX opset, 13 or newer.")
    ] = None,
    thorough: Thorough = False,
    force: Force = False,
    verbose: Verbose = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export to ONNX with the norms folded away, and keep the file only if it agrees with the model."""
    with session_of(as_json, html, quiet=quiet, full=verbose, force=force) as session:
        sizes = batch_sizes_of(batch_sizes)
        request = session.request(
            checkpoint,
            weights,
            model,
            shapes_of(input_shape),
            output=output,
            reading=Reading(kwargs_of(kwargs), key, prefix, trust_pickle),
        )
        from renormify import deployment

        document = deployment.export_checkpoint(
            request, output, batch_sizes=sizes, fold=fold, opset=opset, thorough=thorough, force=force
        )
        session.finish(document)


@onnx_commands.command(
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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold the norms of any ONNX file into their neighbours, and keep it only if it computes the same."""
    with session_of(as_json, html, quiet=quiet, full=verbose, force=force) as session:
        sizes = batch_sizes_of(batch_sizes)
        progress = session.request(None, None, None, output=output, reads=file).progress
        from renormify import deployment

        document = deployment.fold_file(
            file,
            output,
            leftover=leftover.value,
            shapes=shapes_of(input_shape),
            batch_sizes=sizes,
            verify=prove,
            force=force,
            progress=progress,
        )
        session.finish(document)


@onnx_commands.command(
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
    kwargs: Kwargs = None,
    key: Key = None,
    prefix: Prefix = "",
    trust_pickle: TrustPickle = False,
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
            help="Compare on these images, or this array (N, ...), rather than on random numbers; on "
            "normal, large and zero inputs it does so in any case.",
        ),
    ] = None,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough", help="Compare at each optimisation level of onnxruntime too, and layer by layer."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every comparison.")] = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare an ONNX file with the model that it was made from."""
    with session_of(as_json, html, full=verbose, quiet=quiet) as session:
        sizes = batch_sizes_of(batch_sizes)
        request = session.request(
            checkpoint,
            weights,
            model,
            shapes_of(input_shape),
            reads=file,
            reading=Reading(kwargs_of(kwargs), key, prefix, trust_pickle),
        )
        from renormify import deployment
        from renormify.samples import Samples

        document = deployment.verify_file(
            file,
            request,
            batch_sizes=sizes,
            runtimes=runtime or (),
            samples=None if data is None else Samples(data, batch_size=1, max_batches=max(sizes)),
            thorough=thorough,
        )
        session.finish(document)
