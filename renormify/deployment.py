"""What the commands on ONNX files do, without the terminal: export, fold and verify."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from renormify import __version__, sources
from renormify.commands import convert_subject
from renormify.errors import CheckpointError, InputError, NothingToConvertError
from renormify.outputs import check_output, staged
from renormify.proof import run
from renormify.samples import Samples
from renormify.selection import Selection
from renormify.settings import Settings
from renormify.subjects import Request, Shapes, Subject, load_subject
from renormify.writers import Progress, silent

if TYPE_CHECKING:
    from renormify.onnx import Parity
    from renormify.onnx.originals import Original

__all__ = ["export_checkpoint", "fold_file", "verify_file"]


class _NotProvenError(Exception):
    """Leaves a staged output without publishing it."""


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
        conversion = convert_subject(subject, Settings(), Selection())
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
                    progress("Looking for the site that makes the difference")
                    parity = _blamed(parity, path, original, len(fold.sites), leftover)
                    raise _NotProvenError
    except _NotProvenError:
        pass
    reason = None if parity is None else _disparity(output, parity)
    if reason is not None and parity is not None and parity.first_divergence is None:
        reason += "; it differs with nothing folded too: it does not compute the same twice"
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
        thorough: whether to compare at every optimisation level of onnxruntime too, and layer by layer.

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
    options: dict[str, Any] = dict(THOROUGH) if thorough else {"inputs": THOROUGH["inputs"]}
    if runtimes:
        options["runtimes"] = tuple(runtimes)
    parity = verify_onnx(subject.model, path, args, batch_sizes=tuple(batch_sizes), **options)
    return document | {
        "parity": parity.to_dict(),
        "passed": parity.passed,
        "reason": _disparity(path, parity),
    }


def _blamed(parity: Parity, path: Path, original: Original, sites: int, leftover: str) -> Parity:
    """Names the first site whose folding makes the difference, in the place of a layer that diverges."""
    from renormify.onnx import verify_onnx
    from renormify.onnx.faults import first_fault

    size = next(record.batch_size for record in parity.outputs if not record.passed)

    def agrees(folded: Path) -> bool:
        return verify_onnx(original, folded, original.args, batch_sizes=(size,)).passed

    site = first_fault(path, sites, agrees, leftover=leftover)
    return parity if site is None else replace(parity, first_divergence=site.name)


def _check_onnx(path: Path) -> None:
    if not path.is_file():
        near = sources.nearest(path.name, [file.name for file in path.parent.glob("*.onnx")], files=True)
        raise CheckpointError(f"no such file: {path}{near}")


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
