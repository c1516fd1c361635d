"""What each command does, without the terminal: from arguments to a document that says what came of it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from renormify import __version__, sources
from renormify.checkpoints import Checkpoint, check_checkpoint_output, load_weights, save_checkpoint
from renormify.diagnosis import diagnose
from renormify.errors import CheckpointError, InputError, NothingToConvertError
from renormify.exported import export_again, save_program
from renormify.fitting import tied_to
from renormify.formats import Span
from renormify.importers import AUTO, import_checkpoint
from renormify.outputs import check_output, staged
from renormify.proof import prove_unchanged, run
from renormify.rewriting import Conversion, convert
from renormify.samples import Samples
from renormify.selection import Selection
from renormify.settings import Settings
from renormify.sites import find_sites
from renormify.subjects import (
    Request,
    Shapes,
    Subject,
    available_memory,
    load_subject,
    names_program,
    read_checkpoint,
)
from renormify.writers import Progress, silent

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
    "import_file",
    "inspect_checkpoint",
    "plain_settings",
    "verify_file",
]


class _NotProvenError(Exception):
    """Leaves a staged output without publishing it."""


def convert_checkpoint(
    request: Request,
    output: Path,
    settings: Settings,
    selection: Selection = Selection(),  # noqa: B008
    *,
    force: bool = False,
    prove: bool = True,
) -> dict[str, Any]:
    """Converts, proves that nothing changed, and only then writes the checkpoint.

    Without the proof, tensors go from file to file one by one, and the model is built without memory for
    them. A checkpoint that memory does not hold twice goes that way too. The document and the file then say
    why they are ``unproven``.

    Returns:
        The document, with the proof; ``passed`` tells whether the file was written. Where every BatchNorm has
        a reason to be skipped it has their report, and in ``reason`` what to say of it.

    Raises:
        RenormifyError: something given cannot be used, or there is no BatchNorm.
    """
    if output.suffix.lower() == ".pt2":
        check_output(output, force=force, inputs=request.inputs)
    else:
        check_checkpoint_output(output, force=force, inputs=request.inputs)
    unproven = None if prove else "the proof was not asked for (--no-proof)"
    checkpoint = None if names_program(request) else read_checkpoint(request)
    if unproven is None and checkpoint is not None:
        unproven = _too_large(checkpoint)
    structure_only = unproven is not None and checkpoint is not None
    subject = load_subject(request, checkpoint, structure_only=structure_only)
    del checkpoint  # what it maps of its file need not stay in memory beside the model
    if output.suffix.lower() == ".pt2" and subject.program is None:
        raise InputError(
            f"cannot write {output}: a program comes only of a program; give .safetensors or .pt"
        )
    args, kwargs = subject.example or (None if unproven else subject.args(), {})
    request.progress("Converting")
    document = subject.document("convert") | {"settings": plain_settings(settings)}
    try:
        conversion = _convert(subject, settings, selection)
    except NothingToConvertError as error:
        return document | _nothing(error) | {"output": None}
    document |= {"report": conversion.report.to_dict(), "proof": None, "unproven": unproven}
    document |= {"passed": True, "reason": None, "output": output}
    if unproven is None:
        request.progress("Proving that the outputs are unchanged")
        assert args is not None
        proof = prove_unchanged(subject.model, conversion.model, args, kwargs)
        document["proof"] = proof.to_dict()
        if not proof.passed:
            reason = f"the converted model is not the original: {proof.reason}"
            return document | {"passed": False, "reason": reason, "output": None}
    request.progress(f"Writing {output}")
    _write(request, subject, conversion, document, output, force, structure_only)
    return document


def _write(
    request: Request,
    subject: Subject,
    conversion: Conversion,
    document: Mapping[str, Any],
    output: Path,
    force: bool,
    structure_only: bool,
) -> None:
    metadata, inputs = _metadata(document, subject, conversion), subject.inputs(request)
    if output.suffix.lower() == ".pt2":
        assert subject.program is not None
        save_program(
            output, export_again(subject.program, conversion.model), metadata, force=force, inputs=inputs
        )
        return
    state: Mapping[str, Any] = conversion.model.state_dict()
    source = None
    if structure_only:
        assert subject.checkpoint is not None
        state, source = _stored_state(subject.model, subject.checkpoint, state)
    else:
        state = _in_the_dtypes_of(subject.checkpoint, state)
    save_checkpoint(
        output, state, metadata, force=force, inputs=inputs, source=source, progress=request.progress
    )


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The tensors of a checkpoint under the keys of a model, which may have several for one."""

    checkpoint: Checkpoint
    places: Mapping[str, str | None]

    def read(self, key: str) -> Tensor:
        return self.checkpoint.read(str(self.places[key]))

    def span(self, key: str) -> Span | None:
        place = self.places[key]
        return None if place is None else self.checkpoint.span(place)


def _stored_state(
    model: nn.Module, checkpoint: Checkpoint, state: Mapping[str, Any]
) -> tuple[Mapping[str, Any], _Stored]:
    """The tensors of the file under the keys of the converted model, and where to read them."""
    tied = tied_to(model)
    places = {
        key: next((name for name in (key, *tied.get(key, ())) if name in checkpoint), None) for key in state
    }
    found = OrderedDict(
        (key, torch.zeros(value.shape, dtype=value.dtype) if place is None else checkpoint[place])
        for (key, value), place in zip(state.items(), places.values(), strict=True)
    )
    found._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return found, _Stored(checkpoint, places)


def _too_large(checkpoint: Checkpoint) -> str | None:
    """Why there is no memory for a proof, which takes the model twice."""
    tensors = [value for value in checkpoint.values() if isinstance(value, Tensor)]
    size = sum(value.numel() * value.element_size() for value in tensors)
    available = available_memory()
    if available is None or 2 * size <= available:
        return None
    return f"the weights take {size:,} bytes and the proof twice that, but only {available:,} bytes are free"


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
    checkpoint = read_checkpoint(request)
    if checkpoint is None and request.source is None:
        raise InputError("nothing to inspect: give a checkpoint, --model SOURCE, or both")
    document: dict[str, Any] = {"command": "inspect", "renormify": __version__, "passed": True}
    if checkpoint is not None:
        document["checkpoint"] = _describe(checkpoint)
    recorded = request.source is None
    source = checkpoint.metadata.get("model") if recorded and checkpoint is not None else request.source
    if names_program(request) and request.trust_pickle:
        subject = load_subject(request)
    elif not isinstance(source, str) or (recorded and sources.names_code(source)):
        return document  # what the file says is told; code that it names is not run
    else:
        subject = load_subject(
            request, checkpoint, structure_only=checkpoint is not None and checkpoint.streamed
        )
    request.progress("Looking for BatchNorm")
    document |= subject.document("inspect")
    document["dtypes"] = _count_dtypes(dict(subject.model.named_parameters()))
    try:
        conversion = _convert(subject, settings, selection)
    except NothingToConvertError as error:
        return document | _nothing(error)
    return document | {"report": conversion.report.to_dict()}


def diagnose_checkpoint(request: Request, samples: Samples) -> dict[str, Any]:
    """Looks at the norm layers of a model with a user's data, at his batch size; advice is no failure.

    Raises:
        RenormifyError: something given cannot be used, or there is no norm layer.
    """
    samples.check()
    subject = load_subject(request)
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
    subject = load_subject(request)
    _check_deployable(subject)
    args = subject.args()
    document = subject.document("export")
    try:
        conversion = _convert(subject, Settings(), Selection())
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
    progress: Progress = silent,
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
    subject = load_subject(request)
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


def import_file(
    request: Request, output: Path, *, peer: str = AUTO, eps: float | None = None, force: bool = False
) -> dict[str, Any]:
    """Imports the norm layers of another package, measures that they evaluate as there, and only then writes.

    Returns:
        The document; ``passed`` tells whether the file was written.

    Raises:
        RenormifyError: something given cannot be used, or the file holds no such layers.
    """
    assert request.checkpoint is not None
    check_checkpoint_output(output, force=force, inputs=request.inputs)
    model = None
    if request.source is not None:
        request.progress(f"Building {request.source}")
        model = sources.build_model(request.source)
    request.progress(f"Importing {request.checkpoint}")
    imported = import_checkpoint(request.checkpoint, peer, model=model, eps=eps)
    if model is not None and imported.complete:
        load_weights(model, Checkpoint(imported.state_dict, path=request.checkpoint))
    report = imported.report
    document: dict[str, Any] = {
        "command": "import",
        "renormify": __version__,
        "weights": str(request.checkpoint),
        "imported": report.to_dict(),
        "passed": report.passed,
        "reason": report.reason,
        "output": output if report.passed else None,
    }
    if request.source is not None:
        document["model"] = request.source
    if report.passed:
        request.progress(f"Writing {output}")
        metadata = {"version": __version__, "torch": torch.__version__, "imported": report.outline()}
        if imported.complete and request.source is not None:  # what export and verify build it with
            metadata["model"] = request.source
        save_checkpoint(output, imported.state_dict, metadata, force=force, inputs=request.inputs)
    return document


def _convert(subject: Subject, settings: Settings, selection: Selection) -> Conversion:
    selection.check(site.name for site in find_sites(subject.model))
    model = subject.program or subject.model
    return convert(model, filter_fn=selection, **dataclasses.asdict(settings))


def _check_deployable(subject: Subject) -> None:
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


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as documents and files have them."""
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


def _metadata(document: Mapping[str, Any], subject: Subject, conversion: Conversion) -> dict[str, Any]:
    report = conversion.report
    return {
        "version": __version__,
        "torch": torch.__version__,
        "model": document["model"] if subject.program is None else None,
        **subject.recorded,
        "input_shape": document["input_shape"],
        "settings": document["settings"],
        "report": {
            "converted": list(report.converted),
            "skipped": {site.name: site.reason for site in report.sites if site.action != "converted"},
        },
        "proof": document["proof"],
        **({"unproven": document["unproven"]} if document["unproven"] else {}),
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
