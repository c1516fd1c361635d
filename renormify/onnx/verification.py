"""Parity between a torch model and an ONNX file, measured in the float noise that torch itself makes.

The judge knows a callable and a file, and nothing of how the one became the other. The model in float64 is
the truth. How far torch's own float32 forward is from it is the floor: no file can be asked for less. The
file may be off by a few floors and a few units in the last place of the largest value, in each channel by its
own, and over many elements, in the root mean square, by somewhat less: the factors are in ``noise.py``. What
is no float, a mask or an index, must be equal.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renormify import errors
from renormify.onnx.examples import as_arguments, unwrapped
from renormify.onnx.reference import Array, Reference, ask_torch, to_numpy
from renormify.onnx.runtimes import RUNTIMES

__all__ = ["OutputParity", "Parity", "verify_onnx"]


@dataclass(frozen=True)
class OutputParity:
    """One output at one batch size on one runtime.

    Attributes:
        name: the output's name in the file; "(file)" where it could not be run.
        batch_size: rows of the input.
        runtime: what ran the file.
        shape: the shape it came in, or None where it did not come.
        max_abs: the largest absolute difference from the float64 model, None where it cannot be told.
        max_rel: ``max_abs`` relative to the largest absolute value of the float64 output.
        floor: the largest absolute difference between torch's own forward and the float64 model's, over all
            batch sizes; None without a float64 model, and for what is no float.
        tolerance: the absolute difference allowed, at the element of ``max_abs``; channels have their own.
        tolerance_used: the largest share of its tolerance that any element takes; above 1 where one fails.
        top1: for outputs of rank 2, the share of rows whose largest entry is where torch has it.
        passed: whether it is the same output, up to float noise or to the tolerance that was given.
        reason: why not, in words; empty where it passed.
    """

    name: str
    batch_size: int
    runtime: str
    shape: tuple[int, ...] | None
    max_abs: float | None
    max_rel: float | None
    floor: float | None
    tolerance: float | None
    tolerance_used: float | None
    top1: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Parity:
    """What ``verify_onnx`` returns.

    Attributes:
        path: the file.
        outputs: one entry per output, batch size and runtime.
        first_divergence: the path of the torch module from which the file diverges; None where it is not
            known, and it is not sought yet.
        notes: what a reader should know about how it was measured.
    """

    path: Path
    outputs: tuple[OutputParity, ...]
    first_divergence: str | None = None
    notes: tuple[str, ...] = ()

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
        }


def verify_onnx(
    model: torch.nn.Module | Callable[..., Any],
    path: str | os.PathLike[str],
    args: Any,
    *,
    batch_sizes: tuple[int, ...] = (1, 2, 7),
    rtol: float | None = None,
    atol: float | None = None,
    runtimes: tuple[str, ...] = ("onnxruntime",),
) -> Parity:
    """Run a model and an ONNX file on the same inputs and compare every output.

    Outputs are matched by position with the tensors that the model returns. Floats are compared within their
    noise, masks and integers must be equal. NaN, infinities, a missing, extra or misshapen output, another
    dtype, an output of a kind that ONNX does not have, and a file that does not run all fail; none raises.

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
        runtimes: what to run the file with: "onnxruntime".

    Raises:
        errors.InputError: ``args`` hold no tensor, or the model fails on them; an unknown runtime; a batch
            size that is no integer of at least 1.
        errors.CheckpointError: the file is missing or not an ONNX file.
    """
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        raise errors.InputError(
            f"expected runtimes among {', '.join(RUNTIMES)} (got {', '.join(unknown) or 'none'})"
        )
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
    path = _check_file(path)
    if isinstance(model, torch.nn.Module):
        model = unwrapped(model)
    reference = ask_torch(model, arguments, tuple(batch_sizes))
    given = None if rtol is None and atol is None else (atol or 0.0, rtol or 0.0)
    records: list[OutputParity] = []
    for name in runtimes:
        records += _judge(name, path, reference, given)
    return Parity(path, tuple(records), notes=reference.notes)


def _check_file(path: str | os.PathLike[str]) -> Path:
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
    return path


def _judge(
    name: str, path: Path, reference: Reference, given: tuple[float, float] | None
) -> list[OutputParity]:
    """Compare one runtime with torch at every batch size."""
    try:
        runtime = RUNTIMES[name](path)
    except errors.RenormifyError:  # the runtime's package is missing: it says what to install
        raise
    except Exception as error:  # each runtime has its own types
        reason = f"{name} cannot run the file: {errors.one_line(error)}"
        return [_failure("(file)", size, name, reason) for size in reference.answers]
    records: list[OutputParity] = []
    for size, answer in reference.answers.items():
        if len(answer.inputs) != len(runtime.input_names):
            reason = f"the file takes {len(runtime.input_names)} inputs, the example has {len(answer.inputs)}"
            records.append(_failure("(file)", size, name, reason))
            continue
        try:
            outputs = runtime.run(answer.inputs)
        except Exception as error:
            reason = f"{name} cannot run the file at batch size {size}: {errors.one_line(error)}"
            records.append(_failure("(file)", size, name, reason))
            continue
        counts = f"the file has {len(outputs)} outputs, the model {len(answer.outputs)}"
        for position, output in enumerate(outputs):
            title = runtime.output_names[position]
            if position < len(answer.outputs):
                records.append(_compare(title, size, name, position, output, reference, given))
            else:
                records.append(_failure(title, size, name, f"{counts}: this one is extra", output.shape))
        for position in range(len(outputs), len(answer.outputs)):
            records.append(_failure(f"(output {position})", size, name, f"{counts}: this one is missing"))
    return records


def _failure(
    name: str, size: int, runtime: str, reason: str, shape: tuple[int, ...] | None = None
) -> OutputParity:
    return OutputParity(name, size, runtime, shape, None, None, None, None, None, None, False, reason)


def _compare(
    name: str,
    size: int,
    runtime: str,
    position: int,
    output: Array,
    reference: Reference,
    given: tuple[float, float] | None,
) -> OutputParity:
    """Compare one output with torch's; the first thing wrong is the reason."""
    answer = reference.answers[size]
    own = answer.outputs[position]
    if own.is_complex():
        reason = (
            f"the model's own output is {str(own.dtype)[6:]}, which ONNX files do not have: export its parts"
        )
        return _failure(name, size, runtime, reason, output.shape)
    try:
        expected = to_numpy(own)
    except Exception as error:  # sparse, nested, quantized: each has an error of its own
        reason = f"the model's own output is no plain array: {errors.one_line(error)}"
        return _failure(name, size, runtime, reason, output.shape)
    shape = tuple(output.shape)
    if shape != expected.shape:
        reason = f"its shape is {shape}, torch's {tuple(expected.shape)}"
        return _failure(name, size, runtime, reason, shape)
    if output.dtype != expected.dtype:
        return _failure(name, size, runtime, f"its type is {output.dtype}, torch's {expected.dtype}", shape)
    noise = reference.noise[position]
    theirs, ours = torch.from_numpy(output.astype(np.float64)), own.double()
    truth = ours if answer.truth is None else answer.truth[position].double()
    if noise is not None:
        difference, tolerance = (theirs - truth).abs(), noise.tolerance(truth)
    else:
        # An arg max may turn over by noise alone: where torch's own forward does, nothing is asked. Two that
        # differ, differ by 1 at least, also beyond float64's 53 bits.
        differs = torch.from_numpy(np.asarray(output != expected)) & (ours == truth)
        difference = torch.where(differs, (theirs - ours).abs().clamp(min=1.0), 0.0)
        tolerance = torch.zeros_like(truth)
    if given is not None:
        tolerance = given[0] + given[1] * truth.abs()
    reason = _not_finite(theirs, ours, truth) or _beyond(difference, tolerance)
    if not reason and given is None and noise is not None:
        reason = noise.spread_beyond(difference, ours - truth)
    max_abs = float(difference.max()) if difference.numel() else 0.0
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    largest_at = int(difference.flatten().argmax()) if difference.numel() else None
    # 0 of a tolerance of 0 is none of it.
    shares = (difference / tolerance).nan_to_num(nan=0.0).flatten()
    used = float(shares.max()) if shares.numel() else 0.0
    return OutputParity(
        name=name,
        batch_size=size,
        runtime=runtime,
        shape=shape,
        max_abs=max_abs if math.isfinite(max_abs) else None,
        max_rel=max_abs / largest if largest > 0.0 and math.isfinite(max_abs / largest) else None,
        floor=None if noise is None else noise.floor,
        tolerance=0.0 if largest_at is None else float(tolerance.flatten()[largest_at]),
        tolerance_used=used if math.isfinite(used) else None,
        top1=_top1(theirs, ours),
        passed=not reason,
        reason=reason,
    )


def _beyond(difference: Tensor, tolerance: Tensor) -> str:
    """Say how many elements differ by more than they may, and which by most, or ""."""
    beyond = difference.isnan() | (difference > tolerance)
    count = int(beyond.sum())
    if not count:
        return ""
    worst = int(torch.where(beyond, difference - tolerance, -1.0).flatten().argmax())
    return (
        f"{count} of {difference.numel()} elements differ by more than the tolerance: "
        f"{float(difference.flatten()[worst]):.3g} where {float(tolerance.flatten()[worst]):.3g} is allowed"
    )


def _not_finite(theirs: Tensor, ours: Tensor, truth: Tensor) -> str:
    """Say which of the three is not finite, or ""."""
    for tensor, owner in (
        (ours, "the model's own output"),
        (theirs, "the file's output"),
        (truth, "the output of the model in float64"),
    ):
        bad = ~tensor.isfinite()
        if bool(bad.any()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            return f"{owner} is {kind} in {int(bad.sum())} of {tensor.numel()} elements"
    return ""


def _top1(theirs: Tensor, ours: Tensor) -> float | None:
    if ours.ndim != 2 or ours.shape[1] < 2 or not ours.shape[0] or not ours.is_floating_point():
        return None
    return float((theirs.argmax(1) == ours.argmax(1)).double().mean())
