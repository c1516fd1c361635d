"""Parity between a torch model and an ONNX file, measured in the float noise that torch itself makes.

The judge knows a callable and a file, and nothing of how the one became the other. The model in float64 is
the truth. How far torch's own float32 forward is from it, with these weights and with their last places
rounded otherwise (``rounding.py``), is the floor: no file can be asked for less. The file may be off by a few
floors and a few units in the last place of the largest value, in each channel by its own, and over many
elements, in the root mean square, by somewhat less: the factors are in ``noise.py``. What is no float, a mask
or an index, must be equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch.utils import _pytree as pytree

from renormify import errors
from renormify.modes import evaluating
from renormify.onnx.comparison import OutputParity, Setting, compare, failure
from renormify.onnx.divergence import LayerParity, find_divergence, profile
from renormify.onnx.examples import as_arguments, unwrapped
from renormify.onnx.precision import granted, makers
from renormify.onnx.reference import KINDS, Answer, Array, Reference, ask_torch, to_numpy
from renormify.onnx.runtimes import RUNTIMES, Runtime

if TYPE_CHECKING:
    import onnx

__all__ = ["THOROUGH", "LayerParity", "OutputParity", "Parity", "verify_onnx"]

#: Arguments of ``verify_onnx`` that leave nothing out that onnxruntime can show; a few times as slow.
THOROUGH: dict[str, Any] = {
    "inputs": KINDS,
    "runtimes": ("onnxruntime", "onnxruntime-basic", "onnxruntime-off"),
    "layers": True,
}
_RANDOM = (
    "the model's own output differs from one call to the next: it draws random numbers or keeps a state, and "
    "nothing can be proven of it"
)
_ORDER = "the outputs are out of order"
_NAME = "its name is"
_UNKNOWN = "which layer diverges first is not known"
Model: TypeAlias = "torch.nn.Module | Callable[..., Any]"


@dataclass(frozen=True)
class Parity:
    """What ``verify_onnx`` returns.

    Attributes:
        path: the file.
        outputs: one entry per output, batch size, runtime, kind of input and variant.
        first_divergence: the path of the first torch module whose output is another one in the file; None
            where all is well, or where it is not known: then the notes say why.
        notes: what a reader should know about how it was measured, and what diverges there.
        layers: layers within the network that were compared, in the file's order: those that the search for
            the first divergence asked about, or, where that was asked for, all over the depth.
    """

    path: Path
    outputs: tuple[OutputParity, ...]
    first_divergence: str | None = None
    notes: tuple[str, ...] = ()
    layers: tuple[LayerParity, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output passed at every batch size on every runtime."""
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "outputs": [asdict(output) for output in self.outputs],
            "first_divergence": self.first_divergence,
            "notes": list(self.notes),
            "layers": [layer.to_dict() for layer in self.layers],
        }


def verify_onnx(
    model: Model,
    path: str | os.PathLike[str],
    args: Any,
    *,
    batch_sizes: tuple[int, ...] = (1, 2, 7),
    rtol: float | None = None,
    atol: float | None = None,
    runtimes: tuple[str, ...] = ("onnxruntime",),
    inputs: tuple[str, ...] = ("example",),
    variants: Mapping[str, str | os.PathLike[str] | Model] | None = None,
    layers: bool = False,
) -> Parity:
    """Run a model and an ONNX file on the same inputs and compare every output.

    Outputs are matched by position with the tensors that the model returns. Floats are compared within their
    noise, masks and integers must be equal. NaN, infinities, a missing, extra, misshapen or misnamed output,
    another dtype, an output of a kind that ONNX does not have or that changes from call to call, and a file
    that does not run all fail; none raises. An output is misnamed where the model returns it under a key, a
    dict's say, and the file, which has others by their keys, has not this one.
    Where the file fails, the first layer that diverges is sought by bisection.

    Args:
        model: the torch model; it is run in evaluation mode, and its training flags come back afterwards. Of
            a DataParallel or compiled module the module inside is run.
        path: the ONNX file.
        args: an example input, as for ``export_onnx``. At each batch size the example's own rows come first;
            further rows are seeded noise with the example's mean, standard deviation and range (for integers,
            the example's rows again).
        batch_sizes: the batch sizes to compare at.
        rtol: if it or ``atol`` is given, an element may differ by ``atol + rtol * abs(truth)`` instead of by
            float noise; the other is then 0.
        atol: see ``rtol``.
        runtimes: what to run the file with: "onnxruntime" with all its optimisations, as by default it has
            them, "onnxruntime-basic", "onnxruntime-off", "openvino".
        inputs: kinds of input: "example", "normal" (standard normal), "large" (the example a hundred times as
            large), "zeros". One at which the model itself fails or is not finite is left out, with a note.
        variants: by name, what else is to be compared with the model: other ONNX files, the unfolded one say,
            or a callable of the same arguments, as the converted model.
        layers: whether to compare layers over the whole depth of the network also where all is well.

    Raises:
        errors.InputError: ``args`` hold no tensor, or the model fails on them; an unknown runtime or kind of
            input; a batch size that is no integer of at least 1.
        errors.CheckpointError: the file is missing or not an ONNX file.
        errors.MissingExtraError: the package of a runtime is not installed.
    """
    _check_names("runtimes", runtimes, RUNTIMES)
    _check_names("inputs", inputs, KINDS)
    if (
        not isinstance(batch_sizes, (tuple, list))
        or not batch_sizes
        or not all(type(size) is int and size > 0 for size in batch_sizes)
    ):
        raise errors.InputError(f"expected batch_sizes of integers of at least 1 (got {batch_sizes!r})")
    for limit in (rtol, atol):
        if limit is not None and not limit >= 0:
            raise errors.InputError(f"expected rtol and atol of at least 0 (got {limit})")
    arguments = as_arguments(args)
    subjects = [
        _Subject.of("", path),
        *(_Subject.of(name, other) for name, other in (variants or {}).items()),
    ]
    if isinstance(model, torch.nn.Module):
        model = unwrapped(model)
    given = None if rtol is None and atol is None else (atol or 0.0, rtol or 0.0)
    records: list[OutputParity] = []
    notes: list[str] = []
    worst: tuple[Answer, str, frozenset[str]] | None = None
    last: Answer | None = None
    for kind in dict.fromkeys(inputs):
        reference = _ask(model, arguments, tuple(batch_sizes), kind, notes)
        if reference is None:
            continue
        for subject in subjects:
            for name in runtimes if subject.run is None else ("torch",):
                found = _judge(subject, name, kind, reference, given)
                records += found
                failed = [record.batch_size for record in found if not record.passed and record.shape]
                if failed and worst is None and not subject.variant:
                    wrong = frozenset(record.name for record in found if _has_wrong_values(record))
                    worst = reference.answers[max(failed)], name, wrong
        last = reference.answers[min(reference.answers)] if last is None else last
    checked = Path(path)
    first: str | None = None
    seen: tuple[LayerParity, ...] = ()
    if worst is not None:
        divergence = find_divergence(model, checked, *worst)
        first, seen = divergence.name, divergence.layers
        notes.append(f"{f'at {first}' if first else _UNKNOWN}: {divergence.reason}")
    elif any(not record.passed for record in records if not record.variant):
        notes.append(f"{_UNKNOWN}: the file gave no output that could be compared")
    elif layers and last is not None:
        depth = profile(model, checked, last, runtimes[0])
        seen = depth.layers
        if depth.reason:
            notes.append(f"no layers were compared: {depth.reason}")
    return Parity(checked, tuple(records), first, tuple(dict.fromkeys(notes)), seen)


def _has_wrong_values(record: OutputParity) -> bool:
    """Whether an output stands where it should, under its name, and holds what it should not."""
    elsewhere = record.reason.endswith(_ORDER) or record.reason.startswith(_NAME)
    return not record.passed and record.tolerance is not None and not elsewhere and record.reason != _RANDOM


def _check_names(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise errors.InputError(
            f"expected {what} among {', '.join(known)} (got {', '.join(unknown) or 'none'})"
        )


def _ask(
    model: Model, arguments: tuple[Any, ...], sizes: tuple[int, ...], kind: str, notes: list[str]
) -> Reference | None:
    """Ask torch, or note why inputs of our own making are left out: it is no fault of a file."""
    try:
        reference = ask_torch(model, arguments, sizes, kind)
    except errors.InputError as error:
        if kind == "example":
            raise
        notes.append(f"{kind} inputs were left out: {errors.one_line(error)}")
        return None
    if kind != "example" and not reference.finite:
        notes.append(f"{kind} inputs were left out: the model's own outputs are not finite")
        return None
    notes += reference.notes
    return reference


@dataclass(frozen=True)
class _Subject:
    """What is compared: a file, with what its inputs and outputs are, or a callable."""

    variant: str
    path: Path
    graph: onnx.GraphProto | None
    run: Callable[..., Any] | None

    @classmethod
    def of(cls, variant: str, given: str | os.PathLike[str] | Model) -> _Subject:
        if callable(given):
            model = unwrapped(given) if isinstance(given, torch.nn.Module) else given
            return cls(variant, Path(), None, model)
        path, graph = _check_file(cast("str | os.PathLike[str]", given))
        return cls(variant, path, graph, None)


def _check_file(path: str | os.PathLike[str]) -> tuple[Path, onnx.GraphProto]:
    import onnx

    path = Path(path)
    if not path.is_file():
        raise errors.CheckpointError(f"no ONNX file at {path}: check the path")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its implementations
        raise errors.CheckpointError(f"{path} is not an ONNX file: {errors.one_line(error)}") from error
    if not proto.opset_import:
        raise errors.CheckpointError(f"{path} is not an ONNX file: it names no opset")
    return path, proto.graph


def _judge(
    subject: _Subject, name: str, kind: str, reference: Reference, given: tuple[float, float] | None
) -> list[OutputParity]:
    """Compare one file on one runtime, or one callable, with torch at every batch size."""
    settings = {size: Setting(size, name, kind, subject.variant) for size in reference.answers}
    runtime: Runtime | None = None
    if subject.run is None:
        try:
            runtime = RUNTIMES[name](subject.path)
        except errors.RenormifyError:  # the runtime's package is missing: it says what to install
            raise
        except Exception as error:  # each runtime has its own types
            reason = f"{name} cannot run the file: {errors.one_line(error)}"
            return [failure("(file)", at, reason) for at in settings.values()]
    made = {} if subject.graph is None else makers(subject.graph)
    records: list[OutputParity] = []
    for size, answer in reference.answers.items():
        at = settings[size]
        if runtime is not None and len(answer.inputs) != len(runtime.input_names):
            reason = f"the file takes {len(runtime.input_names)} inputs, the example has {len(answer.inputs)}"
            records.append(failure("(file)", at, reason))
            continue
        try:
            outputs = _call(subject.run, answer) if runtime is None else runtime.run(answer.inputs)
        except Exception as error:
            reason = f"{name} cannot run the file at batch size {size}: {errors.one_line(error)}"
            records.append(failure("(file)", at, reason + _baked(subject.graph, answer)))
            continue
        counts = f"the file has {len(outputs)} outputs, the model {len(answer.outputs)}"
        for position, output in enumerate(outputs):
            title = f"(output {position})" if runtime is None else runtime.output_names[position]
            if position >= len(answer.outputs):
                records.append(failure(title, at, f"{counts}: this one is extra", output.shape))
                continue
            truth = None if answer.truth is None else answer.truth[position]
            noise, own = reference.noise[position], answer.outputs[position]
            kernel = None
            if noise is not None:
                kernel = granted(name, made.get(title, ""), own if truth is None else truth)
            record = compare(title, at, output, own, truth, noise, kernel=kernel, given=given)
            if not record.passed:
                others = _swapped(at, output, position, reference, answer)
                record = replace(record, reason=record.reason + others)
            elif given is None and position in reference.random:
                record = replace(record, passed=False, reason=_RANDOM)
            elif wrong := _misnamed(subject.graph, position, answer.names):
                record = replace(record, passed=False, reason=wrong)
            records.append(record)
        for position in range(len(outputs), len(answer.outputs)):
            records.append(failure(f"(output {position})", at, f"{counts}: this one is missing"))
    return records


def _call(run: Callable[..., Any] | None, answer: Answer) -> list[Array]:
    """Run a callable as though it were a file."""
    assert run is not None  # where there is no runtime, there is a callable
    with torch.no_grad(), evaluating(run) if isinstance(run, torch.nn.Module) else nullcontext():
        leaves = pytree.tree_leaves(run(*answer.arguments))
    return [to_numpy(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _baked(graph: onnx.GraphProto | None, answer: Answer) -> str:
    """Say that the file was exported for one batch size, or ""."""
    for value, given in zip(graph.input if graph is not None else (), answer.inputs, strict=False):
        shape = value.type.tensor_type.shape.dim
        if shape and given.shape and shape[0].dim_value not in (0, given.shape[0]):
            return f"; input {value.name!r} has the batch size {shape[0].dim_value} baked in"
    return ""


def _misnamed(graph: onnx.GraphProto | None, position: int, names: Sequence[str]) -> str:
    """Say that an output has not the name that the model has for it, or "".

    A file that has none of the model's names was not made to have them.
    """
    given = [] if graph is None else [value.name for value in graph.output]
    if not names[position] or not set(given) & set(filter(None, names)):
        return ""
    name = given[position]
    # An input or a constant that is handed through has one name, and keeps it.
    made = graph is not None and any(name in node.output for node in graph.node)
    if name == names[position] or not (made or name in names):
        return ""
    return f"{_NAME} {name!r}, the model's {names[position]!r}"


def _swapped(at: Setting, output: Array, position: int, reference: Reference, answer: Answer) -> str:
    """Say that the output is another one of the model's, or ""."""
    for other, own in enumerate(answer.outputs):
        noise = reference.noise[other]
        if other != position and noise is not None:
            truth = None if answer.truth is None else answer.truth[other]
            if compare("", at, output, own, truth, noise).passed:
                return f"; it is what the model returns as output {other}: {_ORDER}"
    return ""
