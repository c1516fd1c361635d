"""What each command does, without the terminal: from arguments to a document that says what came of it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from renormify import __version__, sources
from renormify.checkpoints import (
    Checkpoint,
    check_checkpoint_output,
    fit_keys,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from renormify.diagnosis import diagnose
from renormify.errors import CheckpointError, InputError, NothingToConvertError
from renormify.outputs import check_output, staged
from renormify.proof import example_inputs, prove_unchanged, run
from renormify.rewriting import Conversion, convert
from renormify.samples import Samples
from renormify.selection import Selection
from renormify.settings import Settings
from renormify.sites import find_sites

if TYPE_CHECKING:
    from renormify.onnx import Parity

__all__ = [
    "Request",
    "Selection",
    "Settings",
    "convert_checkpoint",
    "diagnose_checkpoint",
    "export_checkpoint",
    "fold_file",
    "inspect_checkpoint",
    "verify_file",
]

Shapes = tuple[tuple[int, ...], ...]
Progress = Callable[[str], None]


def _silent(text: str) -> None:
    """Shows no progress."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Which model is meant.

    Args:
        checkpoint: the file with its weights, or None for fresh ones.
        source: the model source, or None for the one that the checkpoint names.
        shapes: of its inputs, or None for what the checkpoint or the source say.
        progress: is told each step that may take a while.
    """

    checkpoint: Path | None = None
    source: str | None = None
    shapes: Shapes | None = None
    progress: Progress = _silent

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that this request reads."""
        return () if self.checkpoint is None else (self.checkpoint,)


@dataclasses.dataclass(frozen=True)
class _Subject:
    model: nn.Module
    source: str
    checkpoint: Mapping[str, Tensor] | None  # under the model's own keys
    weights: Path | None
    shapes: Shapes | None

    def args(self) -> tuple[Tensor, ...]:
        if self.shapes is None:
            raise InputError(
                f"{self.source} does not tell its input's shape: give it, as --input-shape 1,3,224,224"
            )
        floating = (p.dtype for p in self.model.parameters() if p.dtype.is_floating_point)
        return example_inputs(self.shapes, dtype=next(floating, torch.float32))

    def document(self, command: str) -> dict[str, Any]:
        return {
            "command": command,
            "renormify": __version__,
            "model": self.source,
            "weights": None if self.weights is None else str(self.weights),
            "input_shape": self.shapes,
        }


class _NotProvenError(Exception):
    """Leaves a staged output without publishing it."""


def convert_checkpoint(
    request: Request,
    output: Path,
    settings: Settings,
    selection: Selection = Selection(),  # noqa: B008
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Converts, proves that nothing changed, and only then writes the checkpoint.

    Returns:
        The document, with the proof; ``passed`` tells whether the file was written. Where every BatchNorm has
        a reason to be skipped it has their report, and in ``reason`` what to say of it.

    Raises:
        RenormifyError: something given cannot be used, or there is no BatchNorm.
    """
    check_checkpoint_output(output, force=force, inputs=request.inputs)
    subject = _load(request)
    args = subject.args()
    request.progress("Converting")
    document = subject.document("convert") | {"settings": _plain(settings)}
    try:
        conversion = _convert(subject.model, settings, selection)
    except NothingToConvertError as error:
        return document | _nothing(error) | {"output": None}
    request.progress("Proving that the outputs are unchanged")
    proof = prove_unchanged(subject.model, conversion.model, args)
    document |= {
        "report": conversion.report.to_dict(),
        "proof": proof.to_dict(),
        "passed": proof.passed,
        "reason": None if proof.passed else f"the converted model is not the original: {proof.reason}",
        "output": output if proof.passed else None,
    }
    if proof.passed:
        request.progress(f"Writing {output}")
        state = _in_the_dtypes_of(subject.checkpoint, conversion.model.state_dict())
        save_checkpoint(output, state, _metadata(document, conversion), force=force, inputs=request.inputs)
    return document


def inspect_checkpoint(
    request: Request,
    settings: Settings,
    selection: Selection = Selection(),  # noqa: B008
) -> dict[str, Any]:
    """Tells which sites a conversion would convert, and what a checkpoint says of itself.

    Where all would be skipped, ``passed`` is false, and ``reason`` says so.

    Raises:
        RenormifyError: something given cannot be used, or there is no BatchNorm.
    """
    checkpoint = _read(request)
    if checkpoint is None and request.source is None:
        raise InputError("nothing to inspect: give a checkpoint, --model SOURCE, or both")
    document: dict[str, Any] = {"command": "inspect", "renormify": __version__, "passed": True}
    if checkpoint is not None:
        document["checkpoint"] = _describe(checkpoint)
    recorded = request.source is None
    source = checkpoint.metadata.get("model") if recorded and checkpoint is not None else request.source
    if not isinstance(source, str) or (recorded and sources.names_code(source)):
        return document  # what the file says is told; code that it names is not run
    subject = _load(request, checkpoint)
    request.progress("Looking for BatchNorm")
    document |= subject.document("inspect")
    document["dtypes"] = _count_dtypes(dict(subject.model.named_parameters()))
    try:
        conversion = _convert(subject.model, settings, selection)
    except NothingToConvertError as error:
        return document | _nothing(error)
    return document | {"report": conversion.report.to_dict()}


def diagnose_checkpoint(request: Request, samples: Samples) -> dict[str, Any]:
    """Looks at the norm layers of a model with a user's data, at his batch size; advice is no failure.

    Raises:
        RenormifyError: something given cannot be used, or there is no norm layer.
    """
    samples.check()
    subject = _load(request)
    if subject.shapes is not None and len(subject.shapes) > 1:
        raise InputError(
            f"{subject.source} takes {len(subject.shapes)} inputs; diagnose(model, batches) does so"
        )
    dtype = next((p.dtype for p in subject.model.parameters() if p.dtype.is_floating_point), torch.float32)
    request.progress(f"Reading {samples.path}")
    batches = samples.batches(None if subject.shapes is None else subject.shapes[0], dtype)
    request.progress("Looking at the norm layers")
    diagnosis = diagnose(subject.model, batches, max_batches=len(batches))
    return subject.document("diagnose") | {
        "data": samples.to_dict(),
        "diagnosis": diagnosis.to_dict(),
        "passed": True,
    }


def export_checkpoint(
    request: Request,
    output: Path,
    *,
    batch_sizes: Sequence[int] = (1, 2, 7),
    fold: bool = True,
    opset: int | None = None,
    thorough: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Exports to ONNX, compares the file with the model as it was loaded, and only then puts it in place.

    Args:
        request: which model.
        output: the file to write.
        batch_sizes: to compare at.
        fold: whether to fold the norms.
        opset: of the file, or None for the exporter's own choice.
        thorough: whether to compare the converted model and the unfolded file with it too, on every kind of
            input and at every optimisation level.
        force: whether to replace a file.

    Returns:
        The document; ``passed`` tells whether the file was written.

    Raises:
        RenormifyError: something given cannot be used, or the model cannot be exported.
    """
    from renormify.onnx import export_onnx, verify_onnx
    from renormify.onnx.verification import THOROUGH

    check_output(output, force=force, inputs=request.inputs)
    subject = _load(request)
    _check_deployable(subject)
    args = subject.args()
    document = subject.document("export")
    try:
        conversion = _convert(subject.model, Settings(), Selection())
        model = conversion.model
        document["report"] = conversion.report.to_dict()
    except NothingToConvertError:  # converted by its own factory already, or without BatchNorm from the start
        model = subject.model
    run(model, args)  # says in one line what an exporter would say in pages
    try:
        with (
            staged(output, force=force, inputs=request.inputs) as target,
            tempfile.TemporaryDirectory() as folder,
        ):
            request.progress("Exporting to ONNX")
            export = export_onnx(model, args, target, fold=fold, opset_version=opset)
            request.progress("Comparing the ONNX file with the model")
            # The judge sees the model as it was loaded, which no conversion has touched.
            options: dict[str, Any] = {}
            if thorough:
                unfolded = Path(folder) / "unfolded.onnx"
                export_onnx(model, args, unfolded, fold=False, opset_version=opset)
                options = THOROUGH | {"variants": {"converted model": model, "unfolded file": unfolded}}
            parity = verify_onnx(subject.model, target, args, batch_sizes=tuple(batch_sizes), **options)
            if not parity.passed:
                raise _NotProvenError
    except _NotProvenError:
        pass
    return document | {
        "export": export.to_dict() | {"path": output},
        "parity": parity.to_dict(),
        "passed": parity.passed,
        "reason": _disparity(output, parity),
        "output": output if parity.passed else None,
    }


def fold_file(
    path: Path,
    output: Path,
    *,
    leftover: str = "auto",
    shapes: Shapes | None = None,
    batch_sizes: Sequence[int] = (1, 2, 7),
    verify: bool = True,
    force: bool = False,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Folds the norms of any ONNX file, compares it with the file as it was, and only then puts it in place.

    Returns:
        The document; ``passed`` tells whether the file was written. A file without a site is not written.

    Raises:
        RenormifyError: something given cannot be used.
    """
    from renormify.onnx import fold_onnx, verify_onnx
    from renormify.onnx.files import external_files
    from renormify.onnx.originals import Original

    _check_onnx(path)
    check_output(output, force=force, inputs=(path,))
    document: dict[str, Any] = {"command": "fold", "renormify": __version__, "onnx": path}
    progress(f"Reading {path}")
    inputs = (path, *external_files(path))
    original = Original(path, shapes, batch_sizes) if verify else None
    parity = None
    try:
        with staged(output, force=force, inputs=inputs) as target:
            progress("Folding")
            fold = fold_onnx(path, target, leftover=leftover)
            files = {"bytes_before": inputs, "bytes_after": target.parent.iterdir()}
            sizes = {key: sum(file.stat().st_size for file in group) for key, group in files.items()}
            if not fold.sites:
                raise _NotProvenError
            if original is not None:
                progress("Comparing the folded file with the file as it was")
                parity = verify_onnx(original, target, original.args, batch_sizes=original.batch_sizes)
                if not parity.passed:
                    raise _NotProvenError
    except _NotProvenError:
        pass
    reason = None if parity is None else _disparity(output, parity)
    if not fold.sites:
        reason = f"{path} has no BatchNormalization and no affine chain to fold"
    opset = next((entry.version for entry in fold.model.opset_import if not entry.domain), None)
    return document | {
        "export": {"path": output, "opset": opset, "fold": fold.to_dict() | sizes},
        "parity": None if parity is None else parity.to_dict(),
        "passed": reason is None,
        "reason": reason,
        "output": output if reason is None else None,
    }


def verify_file(
    path: Path,
    request: Request,
    *,
    batch_sizes: Sequence[int] = (1, 2, 7),
    runtimes: Sequence[str] = (),
    samples: Samples | None = None,
    thorough: bool = False,
) -> dict[str, Any]:
    """Compares an ONNX file with a model.

    Args:
        path: the file.
        request: which model.
        batch_sizes: to compare at.
        runtimes: to run the file with; none given, onnxruntime.
        samples: the user's data, all of which is the example; None for an example drawn at random.
        thorough: whether to compare on every kind of input, at every optimisation level of onnxruntime, and
            layer by layer.

    Raises:
        RenormifyError: something given cannot be used.
    """
    from renormify.onnx import verify_onnx
    from renormify.onnx.verification import THOROUGH

    _check_onnx(path)
    if samples is not None:
        samples.check()
    subject = _load(request)
    document = subject.document("verify") | {"onnx": path}
    if samples is None:
        args = subject.args()
    else:
        floating = (p.dtype for p in subject.model.parameters() if p.dtype.is_floating_point)
        shape = subject.shapes[0] if subject.shapes else None
        args = (torch.cat(samples.batches(shape, next(floating, torch.float32))),)
        document["data"] = samples.to_dict()
    run(subject.model, args)
    request.progress("Comparing the ONNX file with the model")
    options: dict[str, Any] = dict(THOROUGH) if thorough else {}
    if runtimes:
        options["runtimes"] = tuple(runtimes)
    parity = verify_onnx(subject.model, path, args, batch_sizes=tuple(batch_sizes), **options)
    return document | {
        "parity": parity.to_dict(),
        "passed": parity.passed,
        "reason": _disparity(path, parity),
    }


def _check_onnx(path: Path) -> None:
    if not path.is_file():
        near = sources.nearest(path.name, [file.name for file in path.parent.glob("*.onnx")])
        raise CheckpointError(f"no such file: {path}{near}")


def _read(request: Request) -> Checkpoint | None:
    if request.checkpoint is None:
        return None
    request.progress(f"Reading {request.checkpoint}")
    return load_checkpoint(request.checkpoint)


def _load(request: Request, checkpoint: Checkpoint | None = None) -> _Subject:
    checkpoint = checkpoint or _read(request)
    source = _source(request, checkpoint)
    if source is None:
        raise InputError(
            "which model? Give --model torchvision:NAME, timm:NAME or package.module:factory"
            + (f"; {checkpoint.path} does not name its own" if checkpoint is not None else "")
        )
    request.progress(f"Building {source}")
    model = sources.build_model(source)
    fitted = None if checkpoint is None else fit_keys(model, checkpoint)
    if fitted is not None:
        load_weights(model, fitted)
    shapes = request.shapes or _recorded_shapes(checkpoint) or sources.input_shapes(source, model)
    return _Subject(model, source, fitted, request.checkpoint, shapes)


def _source(request: Request, checkpoint: Checkpoint | None) -> str | None:
    if request.source is not None or checkpoint is None:
        return request.source
    recorded = checkpoint.metadata.get("model")
    if not isinstance(recorded, str):
        return None
    if sources.names_code(recorded):
        # A file may come from anyone. What it names is run only when the user says so.
        raise InputError(
            f"{checkpoint.path} names the model {recorded!r}, which is code that a file may not start: "
            f"where you trust it, add --model {recorded}"
        )
    return recorded


def _recorded_shapes(checkpoint: Checkpoint | None) -> Shapes | None:
    recorded = checkpoint.metadata.get("input_shape") if checkpoint is not None else None
    if not isinstance(recorded, list) or not recorded:
        return None
    sound = all(
        isinstance(shape, list) and shape and all(type(length) is int and length > 0 for length in shape)
        for shape in recorded
    )
    return tuple(tuple(shape) for shape in recorded) if sound else None


def _convert(model: nn.Module, settings: Settings, selection: Selection) -> Conversion:
    selection.check(site.name for site in find_sites(model))
    return convert(model, filter_fn=selection, **dataclasses.asdict(settings))


def _check_deployable(subject: _Subject) -> None:
    """Refuses early what onnxruntime would refuse after the whole export."""
    for name, parameter in subject.model.named_parameters():
        if parameter.dtype in (torch.float64, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"the model has {name} in {kind}, and onnxruntime does not run convolutions in {kind}: "
                "build it in float32, from weights in float32 (value.float() for each), and export that"
            )


def _disparity(path: Path, parity: Parity) -> str | None:
    """Why a file is not proven to be the model: what failed first, and out of how many."""
    failed = [record for record in parity.outputs if not record.passed]
    if not failed:
        return None
    first = failed[0]
    return (
        f"{path} is not proven to be the model: {len(failed)} of {len(parity.outputs)} comparisons failed, "
        f"the first {first.name} at batch size {first.batch_size}: {first.reason}"
        + (f"; the first layer that diverges is {parity.first_divergence}" if parity.first_divergence else "")
    )


def _nothing(error: NothingToConvertError) -> dict[str, Any]:
    if error.report is None:
        raise error
    return {"report": error.report.to_dict(), "passed": False, "reason": str(error)}


def _plain(settings: Settings) -> dict[str, Any]:
    # JSON has no infinity; float() reads this one back.
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else value
        for key, value in dataclasses.asdict(settings).items()
    }


def _in_the_dtypes_of(checkpoint: Mapping[str, Tensor] | None, state: Mapping[str, Any]) -> Mapping[str, Any]:
    # A file in half precision is computed with in float32 and goes back to half precision without a loss.
    if checkpoint is None:
        return state
    kept = OrderedDict(
        (key, value.to(checkpoint[key].dtype) if key in checkpoint and isinstance(value, Tensor) else value)
        for key, value in state.items()
    )
    kept._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return kept


def _metadata(document: Mapping[str, Any], conversion: Conversion) -> dict[str, Any]:
    report = conversion.report
    return {
        "version": __version__,
        "torch": torch.__version__,
        "model": document["model"],
        "input_shape": document["input_shape"],
        "settings": document["settings"],
        "report": {
            "converted": list(report.converted),
            "skipped": {site.name: site.reason for site in report.sites if site.action != "converted"},
        },
        "proof": document["proof"],
    }


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    dtypes = _count_dtypes(checkpoint)
    norms = sum(key == "running_mean" or key.endswith(".running_mean") for key in checkpoint)
    values = ", ".join(f"{count:,} {name}" for name, count in dtypes.items())
    return {
        "path": checkpoint.path,
        "tensors": len(checkpoint),
        "dtypes": dtypes,
        "norms": norms,
        "metadata": checkpoint.metadata,
        "summary": f"{checkpoint.path}: {len(checkpoint)} tensors ({values}), {norms} running means",
    }


def _count_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        if isinstance(tensor, Tensor):  # a module's extra state may be anything
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counts)
