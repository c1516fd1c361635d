"""One output of a file beside torch's: how far it is off, by every measure, and whether that is noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from renormify import errors
from renormify.onnx.noise import Noise
from renormify.onnx.reference import Array, to_numpy

__all__ = ["Deviation", "OutputParity", "Setting", "as_tensor", "compare", "deviation", "failure"]


@dataclass(frozen=True)
class OutputParity:
    """One output at one batch size on one runtime.

    Attributes:
        name: the output's name in the file; "(file)" where it could not be run.
        batch_size: rows of the input.
        runtime: what ran the file; "torch" for a variant that is a callable.
        shape: the shape it came in, or None where it did not come.
        max_abs: the largest absolute difference from the float64 model, None where it cannot be told.
        max_rel: ``max_abs`` relative to the largest absolute value of the float64 output.
        floor: the largest absolute difference between torch's own forward and the float64 model's, over all
            batch sizes and with the weights' last places rounded otherwise; None without a float64 model, and
            for what is no float.
        tolerance: the absolute difference allowed, at the element of ``max_abs``; channels have their own.
        tolerance_used: the largest share of its tolerance that any element takes; above 1 where one fails.
        top1: for outputs of rank 2, the share of rows whose largest entry is where torch has it.
        passed: whether it is the same output, up to float noise or to the tolerance that was given.
        reason: why not, in words; empty where it passed.
        max_ulp: the largest difference in units in the last place of the float64 model's value, in the type
            of the output; None for what is no float. Near 0 units are small, and noise is many of them.
        cosine: the cosine between the output and the float64 model's, over all elements; None where either is
            all zeros, or for what is no float.
        inputs: the kind of input.
        variant: what was run; "" for the file itself.
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
    max_ulp: float | None = None
    cosine: float | None = None
    inputs: str = "example"
    variant: str = ""


@dataclass(frozen=True)
class Setting:
    """Under what an output was made: see the fields of that name of ``OutputParity``."""

    batch_size: int
    runtime: str
    inputs: str
    variant: str


@dataclass(frozen=True)
class Deviation:
    """How far an output is from the truth, element by element.

    Attributes:
        difference: how far each element is off.
        tolerance: how far it may be.
        reason: what is wrong, or "".
    """

    difference: Tensor
    tolerance: Tensor
    reason: str

    @property
    def max_abs(self) -> float | None:
        """The largest difference, or None where it is not finite."""
        return _finite(float(self.difference.max()) if self.difference.numel() else 0.0)

    @property
    def tolerance_used(self) -> float | None:
        """The largest share of its tolerance that any element takes, or None where it is not finite."""
        # 0 of a tolerance of 0 is none of it.
        shares = (self.difference / self.tolerance).nan_to_num(nan=0.0, posinf=math.inf).flatten()
        return _finite(float(shares.max()) if shares.numel() else 0.0)

    def max_rel(self, truth: Tensor) -> float | None:
        """The largest difference relative to the largest value of ``truth``; None where that is 0."""
        largest = float(truth.abs().max()) if truth.numel() else 0.0
        return None if self.max_abs is None or not largest > 0.0 else _finite(self.max_abs / largest)


def failure(name: str, at: Setting, reason: str, shape: tuple[int, ...] | None = None) -> OutputParity:
    """Return the record of an output that cannot be compared."""
    return OutputParity(
        name, at.batch_size, at.runtime, shape, None, None, None, None, None, None, False, reason,
        inputs=at.inputs, variant=at.variant,
    )  # fmt: skip


def deviation(
    theirs: Tensor,
    ours: Tensor,
    truth: Tensor,
    noise: Noise | None,
    *,
    kernel: Tensor | None = None,
    given: tuple[float, float] | None = None,
) -> Deviation:
    """Compare an output of a file with torch's; the first thing wrong is the reason.

    Args:
        theirs: the file's output, in its own type.
        ours: torch's own.
        truth: the float64 model's, or torch's own where there is no such model.
        noise: what is known of the noise, or None where the output is no plain array of floats.
        kernel: the error of the runtime's own kernel in each element, or None.
        given: the absolute and the relative tolerance to judge by instead of noise.
    """
    exact = (theirs != ours) & (ours.double() == truth.double())
    theirs, ours, truth = theirs.double(), ours.double(), truth.double()
    kernel = torch.zeros(()) if kernel is None else kernel
    if noise is not None:
        difference, tolerance = (theirs - truth).abs(), noise.tolerance(truth) + kernel
    else:
        # An arg max may turn over by noise alone: where torch's own forward does, nothing is asked. Two that
        # differ, differ by 1 at least, also beyond float64's 53 bits.
        difference = torch.where(exact, (theirs - ours).abs().clamp(min=1.0), 0.0)
        tolerance = torch.zeros_like(truth)
    if given is not None:
        tolerance = given[0] + given[1] * truth.abs()
    reason = _not_finite(theirs, ours, truth) or _beyond(difference, tolerance)
    if not reason and given is None and noise is not None:
        reason = noise.spread_beyond((difference - kernel).clamp(min=0.0), ours - truth)
    return Deviation(difference, tolerance, reason)


def compare(
    name: str,
    at: Setting,
    output: Array,
    own: Tensor,
    truth: Tensor | None,
    noise: Noise | None,
    *,
    kernel: Tensor | None = None,
    given: tuple[float, float] | None = None,
) -> OutputParity:
    """Return the record of one output; for the arguments see ``deviation``."""
    if own.is_complex():
        kind = str(own.dtype)[6:]
        reason = f"the model's own output is {kind}, which ONNX files do not have: export its parts"
        return failure(name, at, reason, output.shape)
    try:
        expected = to_numpy(own)
    except Exception as error:  # sparse, nested, quantized: each has an error of its own
        reason = f"the model's own output is no plain array: {errors.one_line(error)}"
        return failure(name, at, reason, output.shape)
    shape = tuple(output.shape)
    if shape != expected.shape:
        return failure(name, at, f"its shape is {shape}, torch's {tuple(expected.shape)}", shape)
    if output.dtype != expected.dtype:
        return failure(name, at, f"its type is {output.dtype}, torch's {expected.dtype}", shape)
    theirs, real = as_tensor(output, own.dtype), own if truth is None else truth
    found = deviation(theirs, own, real, noise, kernel=kernel, given=given)
    largest_at = int(found.difference.flatten().argmax()) if found.difference.numel() else None
    floats = noise is not None
    return OutputParity(
        name=name,
        batch_size=at.batch_size,
        runtime=at.runtime,
        shape=shape,
        max_abs=found.max_abs,
        max_rel=found.max_rel(real.double()),
        floor=None if noise is None else noise.floor,
        tolerance=0.0 if largest_at is None else float(found.tolerance.flatten()[largest_at]),
        tolerance_used=found.tolerance_used,
        top1=_top1(theirs, own),
        passed=not found.reason,
        reason=found.reason,
        max_ulp=_max_ulp(found.difference, real.double(), own.dtype) if floats else None,
        cosine=_cosine(theirs.double(), real.double()) if floats else None,
        inputs=at.inputs,
        variant=at.variant,
    )


def as_tensor(output: Array, dtype: torch.dtype) -> Tensor:
    """Return a tensor of an array that has ``dtype``; NumPy knows bfloat16 by another name."""
    if dtype is torch.bfloat16:
        return torch.from_numpy(output.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(output.copy())


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
            return f"{owner} is {kind} in {int(bad.sum())} of {tensor.numel()} elements{_where(bad)}"
    return ""


def _where(bad: Tensor) -> str:
    """Say in which channel they all are, where they are in one of several."""
    if bad.ndim < 2 or bad.shape[1] < 2:
        return ""
    channels = bad.movedim(1, 0).flatten(1).any(1).nonzero().flatten().tolist()
    return f", all in channel {channels[0]}" if len(channels) == 1 else ""


def _top1(theirs: Tensor, ours: Tensor) -> float | None:
    if ours.ndim != 2 or ours.shape[1] < 2 or not ours.shape[0] or not ours.is_floating_point():
        return None
    return float((theirs.argmax(1) == ours.argmax(1)).double().mean())


def _max_ulp(difference: Tensor, truth: Tensor, dtype: torch.dtype) -> float | None:
    limits = torch.finfo(dtype)
    exponents = torch.frexp(truth.abs().clamp(min=limits.tiny)).exponent - 1
    shares = difference / torch.ldexp(torch.full_like(truth, limits.eps), exponents)
    return _finite(float(shares.max()) if shares.numel() else 0.0)


def _cosine(theirs: Tensor, truth: Tensor) -> float | None:
    lengths = theirs.norm() * truth.norm()
    return _finite(float((theirs * truth).sum() / lengths)) if float(lengths) > 0.0 else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
