"""An affine of a graph: what an inference BatchNormalization and constant Mul, Div, Add, Sub compute.

All of it is float64 until the constant that takes it is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renormify.onnx.constants import Float64, Refusal, is_constant, is_standard, read_constant

__all__ = ["Affine", "read_affine", "vector"]


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift``.

    Attributes:
        scale: of the rank of x; each axis has x's size there, or 1 where the scale does not change along it.
        shift: likewise; the two may differ in shape.
    """

    scale: Float64
    shift: Float64

    @property
    def varying(self) -> frozenset[int]:
        """The axes along which the scale or the shift changes."""
        arrays = (self.scale, self.shift)
        return frozenset(axis for axis in range(self.scale.ndim) if any(a.shape[axis] > 1 for a in arrays))

    @property
    def shifts(self) -> bool:
        """Whether there is a shift at all."""
        return bool(self.shift.any())

    def then(self, outer: Affine) -> Affine:
        """Return ``outer`` behind this one: ``S (s x + t) + T = (S s) x + (S t + T)``."""
        return Affine(outer.scale * self.scale, outer.scale * self.shift + outer.shift)

    def mapped(self, function: Callable[[Float64], Float64]) -> Affine:
        """Apply to both; an axis along which nothing changes any more becomes 1 again."""
        return Affine(_compact(function(self.scale)), _compact(function(self.shift)))


def vector(array: Float64, axis: int, size: int) -> Float64 | None:
    """Return ``array`` as :math:`(size)` if it changes along ``axis`` alone or not at all, else None."""
    if array.size != array.shape[axis] or array.size not in (1, size):
        return None
    return np.broadcast_to(array.reshape(-1), (size,)).astype(np.float64)


def read_affine(node: ir.Node, rank: int | None = None) -> tuple[ir.Value, Affine] | Refusal:
    """Return a node's one computed input and the affine that the node makes of it, or why it is none.

    Args:
        node: any node.
        rank: of its input, where the graph does not say.
    """
    reader = _READERS.get(node.op_type) if is_standard(node) else None
    if reader is None:
        return Refusal(f"{node.op_type} is no affine")
    with np.errstate(all="ignore"):
        read = reader.read(node, rank)
    if isinstance(read, Refusal):
        return read
    x, affine = read
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        return Refusal("its scale or shift is not finite in some channel")
    return x, affine


def _compact(array: npt.NDArray[np.float64]) -> Float64:
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        array = first if array.shape[axis] > 1 and (array == first).all() else array
    return array


class _Reader(ABC):
    """One kind of node that computes an affine."""

    @abstractmethod
    def read(self, node: ir.Node, rank: int | None) -> tuple[ir.Value, Affine] | Refusal:
        """Return the input and what is made of it."""


class _BatchNorm(_Reader):
    """``y = gamma (x - mean) / sqrt(var + eps) + beta`` on axis 1.

    So ``s = gamma / sqrt(var + eps)`` and ``t = beta - mean s``.
    """

    def read(self, node: ir.Node, rank: int | None) -> tuple[ir.Value, Affine] | Refusal:
        if node.attributes.get_int("training_mode", 0):
            return Refusal("it normalises by the statistics of its batch (training_mode=1)")
        # Before opset 14 that is what makes it normalise by its batch, whether or not they are used.
        if any(output.name for output in node.outputs[1:]):
            return Refusal("it puts out batch statistics, as in training")
        if not node.attributes.get_int("spatial", 1):
            return Refusal("it has statistics for each position, not for each channel (spatial=0)")
        arrays: list[Float64] = []
        names = ("its scale", "its bias", "its mean", "its variance")
        for value, what in zip(node.inputs[1:5], names, strict=True):
            array = read_constant(value, what)
            if isinstance(array, Refusal):
                return array
            arrays.append(array)
        gamma, beta, mean, variance = arrays
        scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        x, y = node.inputs[0], node.outputs[0]
        shape = (None if x is None else x.shape) or y.shape
        rank = len(shape) if shape is not None else rank
        if x is None or rank is None:
            return Refusal("the rank of its input is not known")
        if rank < 2:
            return Refusal("its input has no channel axis")
        per_channel = (1, -1, *[1] * (rank - 2))
        return x, Affine(scale.reshape(per_channel), (beta - mean * scale).reshape(per_channel))


class _WithConstant(_Reader):
    """An operator of two inputs, one of them a constant that broadcasts against the other."""

    commutes: ClassVar[bool] = True

    @abstractmethod
    def affine(self, constant: Float64, first: bool) -> Affine:
        """Return the affine, where ``constant`` is the first operand or the second."""

    def read(self, node: ir.Node, rank: int | None) -> tuple[ir.Value, Affine] | Refusal:
        for position in (1, 0):
            value, x = node.inputs[position], node.inputs[1 - position]
            if x is None or is_constant(x) or (position == 0 and not self.commutes):
                continue
            constant = read_constant(value, f"the other operand of {node.op_type}")
            if isinstance(constant, Refusal):
                continue
            if x.shape is None:
                return Refusal(f"the rank of {node.op_type}'s input is not known")
            sizes: list[object] = list(x.shape)
            if constant.ndim > len(sizes):
                return Refusal(f"the constant of {node.op_type} has more axes than what it meets")
            constant = constant.reshape([1] * (len(sizes) - constant.ndim) + list(constant.shape))
            if not all(constant.shape[axis] in (1, size) for axis, size in enumerate(sizes)):
                return Refusal(f"the constant of {node.op_type} may change the shape of what it meets")
            return x, self.affine(constant, position == 0)
        return Refusal(f"{node.op_type} has no constant operand")


class _Mul(_WithConstant):
    """``y = c x``."""

    def affine(self, constant: Float64, first: bool) -> Affine:
        return Affine(constant, np.zeros([1] * constant.ndim))


class _Div(_WithConstant):
    """``y = x / c``; ``c / x`` is no affine."""

    commutes = False

    def affine(self, constant: Float64, first: bool) -> Affine:
        return Affine(1.0 / constant, np.zeros([1] * constant.ndim))


class _Add(_WithConstant):
    """``y = x + c``."""

    def affine(self, constant: Float64, first: bool) -> Affine:
        return Affine(np.ones([1] * constant.ndim), constant)


class _Sub(_WithConstant):
    """``y = x - c``, or ``y = c - x = -x + c``."""

    def affine(self, constant: Float64, first: bool) -> Affine:
        sign = -1.0 if first else 1.0
        return Affine(np.full([1] * constant.ndim, sign), -sign * constant)


_READERS: dict[str, _Reader] = {
    "BatchNormalization": _BatchNorm(),
    "Mul": _Mul(),
    "Div": _Div(),
    "Add": _Add(),
    "Sub": _Sub(),
}
