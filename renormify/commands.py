"""What each command does, without the terminal: from arguments to a document that says what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from renormify import __version__, sources
from renormify.checkpoints import Checkpoint, check_checkpoint_output, load_weights, save_checkpoint
from renormify.diagnosis import diagnose
from renormify.errors import InputError, NothingToConvertError, RenormifyError
from renormify.exported import export_again, save_program
from renormify.fitting import tied_to
from renormify.formats import PROGRAM, Span, locate, recognise
from renormify.importers import AUTO, import_checkpoint
from renormify.outputs import check_output
from renormify.proof import prove_unchanged
from renormify.rewriting import Conversion, convert, revert
from renormify.samples import Samples
from renormify.selection import Selection
from renormify.settings import Settings
from renormify.sites import find_sites
from renormify.subjects import (
    Request,
    Subject,
    available_memory,
    load_subject,
    names_program,
    read_checkpoint,
)

__all__ = [
    "Request",
    "Selection",
    "Settings",
    "convert_checkpoint",
    "convert_subject",
    "diagnose_checkpoint",
    "import_file",
    "inspect_checkpoint",
    "plain_settings",
    "revert_checkpoint",
]


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
    if checkpoint is not None:
        if checkpoint.streamed:
            _check_written_from_memory(output, checkpoint)
        unproven = unproven or _too_large(checkpoint)
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
        conversion = convert_subject(subject, settings, selection)
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


def revert_checkpoint(request: Request, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Makes BatchNorm's checkpoint of one that ``convert`` wrote, proves it, and only then writes it.

    The tensors and their names stay, since they are BatchNorm's all along; what the file says of Batch Renorm
    goes.

    Returns:
        The document, with the proof; ``passed`` tells whether the file was written.

    Raises:
        NothingToConvertError: the file says of no conversion.
        RenormifyError: something given cannot be used.
    """
    check_checkpoint_output(output, force=force, inputs=request.inputs)
    if request.checkpoint is None:
        raise InputError("nothing to revert: give the checkpoint that renormify convert wrote")
    if recognise(locate(request.checkpoint)) == PROGRAM:
        raise InputError(f"{request.checkpoint} is a program; renormify.revert() takes the module of one")
    checkpoint = read_checkpoint(request, stream=False)
    assert checkpoint is not None
    if "settings" not in checkpoint.metadata:
        raise NothingToConvertError(
            f"{request.checkpoint} was not written by renormify convert: it is BatchNorm's file as it is"
        )
    subject = load_subject(request, checkpoint)
    converted = convert_subject(subject, Settings(), Selection()).model
    reverted = revert(converted)
    request.progress("Proving that the outputs are unchanged")
    proof = prove_unchanged(converted, reverted, subject.args())
    document = subject.document("revert") | {"proof": proof.to_dict(), "passed": proof.passed, "reason": None}
    if not proof.passed:
        return document | {"reason": f"the reverted model is not the same: {proof.reason}", "output": None}
    request.progress(f"Writing {output}")
    metadata = {
        "version": __version__,
        "torch": torch.__version__,
        "model": document["model"],
        **subject.recorded,
        "input_shape": document["input_shape"],
    }
    state = _in_the_dtypes_of(subject.checkpoint, reverted.state_dict())
    save_checkpoint(output, state, metadata, force=force, inputs=subject.inputs(request))
    return document | {"output": output}


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


def _check_written_from_memory(output: Path, checkpoint: Checkpoint) -> None:
    # torch.save() can leave room for values that are filled in later, but then the archive's checksums are
    # wrong, and what reads it as a zip file refuses it.
    size, available = _size(checkpoint), available_memory()
    if output.suffix.lower() != ".safetensors" and available is not None and size > available:
        raise InputError(
            f"cannot write {output}: it is written from memory, and the weights take {size:,} bytes, but "
            f"{available:,} are free; give .safetensors, which is written tensor by tensor"
        )


def _size(checkpoint: Checkpoint) -> int:
    tensors = [value for value in checkpoint.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in tensors)


def _too_large(checkpoint: Checkpoint) -> str | None:
    """Why there is no memory for a proof, which takes the model twice."""
    size, available = _size(checkpoint), available_memory()
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
        try:
            subject = load_subject(
                request, checkpoint, structure_only=checkpoint is not None and checkpoint.streamed
            )
        except RenormifyError as error:
            if not recorded:
                raise
            # What a file says of itself is worth telling, also where its model cannot be had from it.
            return document | {"passed": False, "reason": str(error), "exit_code": error.exit_code}
    request.progress("Looking for BatchNorm")
    document |= subject.document("inspect")
    document["dtypes"] = _count_dtypes(dict(subject.model.named_parameters()))
    try:
        conversion = convert_subject(subject, settings, selection)
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


def convert_subject(subject: Subject, settings: Settings, selection: Selection) -> Conversion:
    """Converts the sites that a selection takes.

    Raises:
        InputError: a pattern matches no site.
        NothingToConvertError: no site is left to convert.
    """
    selection.check(site.name for site in find_sites(subject.model))
    model = subject.program or subject.model
    return convert(model, filter_fn=selection, **dataclasses.asdict(settings))


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
