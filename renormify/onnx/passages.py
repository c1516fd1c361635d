"""Operators that compute and yet commute with an affine: pooling, rectifiers, sums. One class for each way.

An operator that averages values with weights that sum to 1 commutes with an affine that is the same for all
values which it brings together. ``A`` stands for the affine, ``s`` and ``t`` for its scale and shift.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import onnx_ir as ir

from renormify.onnx.affines import Affine, read_affine
from renormify.onnx.constants import Float64, Refusal, is_constant, read_constant, read_integers
from renormify.onnx.operators import Edit, Operator, Step

__all__ = ["PASSAGES"]


class _Commuting(Operator):
    """``op(A(x)) = A(op(x))`` where A is the same along the axes that the operator acts on.

    A subclass says which axes these are, and what else is asked of A.
    """

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        return self._through(node, affine, node.inputs[0])

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        if position:
            return Refusal(f"it is a parameter of {node.op_type}")
        return self._through(node, affine, node.outputs[0])

    def _through(self, node: ir.Node, affine: Affine, target: ir.Value | None) -> Step | Refusal:
        axes = self.axes(node, affine)
        if isinstance(axes, Refusal):
            return axes
        if target is None:
            return Refusal(f"{node.op_type} has no input")
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            return Refusal(f"{node.op_type} has a second output, which is used")
        mixed = sorted(affine.varying & axes)
        if mixed:
            return Refusal(f"{node.op_type} acts along axis {mixed[0]}, and so does the affine")
        return Step(onward=((target, affine),))

    @abstractmethod
    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        """Return the axes that the operator acts on, or why it does not commute."""


def _spatial(affine: Affine) -> frozenset[int]:
    return frozenset(range(2, affine.scale.ndim))


class Unchanged(_Commuting):
    """Identity, and Dropout in inference: ``op(x) = x``."""

    op_types = ("Identity", "Dropout")

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        if node.op_type == "Dropout" and len(node.inputs) > 2 and (mode := node.inputs[2]) is not None:
            tensor = None if mode.is_graph_input() else ir.convenience.get_const_tensor(mode)
            if tensor is None or bool(np.asarray(tensor.numpy()).any()):
                return Refusal("Dropout may be in training mode")
        return frozenset()


class GlobalAverage(_Commuting):
    """GlobalAveragePool: a mean over all positions, and ``mean(s x + t) = s mean(x) + t``."""

    op_types = ("GlobalAveragePool",)

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        return _spatial(affine)


class AveragePool(_Commuting):
    """AveragePool that counts no padding: a mean of real values in each window."""

    op_types = ("AveragePool",)

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        attributes = node.attributes
        padded = any(attributes.get_ints("pads", ())) or attributes.get_string("auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        )
        if affine.shifts and padded and bool(attributes.get_int("count_include_pad", 0)):
            return Refusal("AveragePool counts its padding, which the shift would have to change")
        if affine.shifts and bool(attributes.get_int("ceil_mode", 0)):
            return Refusal(
                "AveragePool with ceil_mode has windows beyond the edge, which runtimes count unlike"
            )
        return _spatial(affine)


class MaxPool(_Commuting):
    """MaxPool, GlobalMaxPool: ``max(s x + t) = s max(x) + t`` where ``s >= 0``; padding never wins."""

    op_types = ("MaxPool", "GlobalMaxPool")

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        negative = int((affine.scale < 0).sum())
        if negative:
            return Refusal(
                f"{node.op_type} commutes only with scales that are not negative, and "
                f"{negative} of {affine.scale.size} are"
            )
        return _spatial(affine)


class Rectifier(_Commuting):
    """Relu, LeakyRelu, PRelu: ``op(s x) = s op(x)`` where ``s >= 0``; a shift does not pass."""

    op_types = ("Relu", "LeakyRelu", "PRelu")

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        if affine.shifts:
            return Refusal(f"{node.op_type} does not commute with a shift")
        if (affine.scale < 0).any():
            return Refusal(f"{node.op_type} does not commute with a negative scale")
        return frozenset()


class Pad(_Commuting):
    """Pad: by values of the edge any affine passes, by zeros only a scale."""

    op_types = ("Pad",)

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        rank = affine.scale.ndim
        pads = read_integers(node, "pads", 1)
        if isinstance(pads, Refusal) or pads is None or len(node.inputs) > 3:
            return Refusal("what Pad adds is computed in the graph")
        if node.attributes.get_string("mode", "constant") == "constant" and any(pads):
            constant: Float64 | Refusal = np.array(node.attributes.get_float("value", 0.0))
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                constant = read_constant(node.inputs[2], "the value of Pad")
            if affine.shifts or isinstance(constant, Refusal) or constant.any():
                return Refusal("Pad fills with a constant, which the affine would have to change")
        return frozenset(
            axis for axis in range(rank) if len(pads) != 2 * rank or pads[axis] or pads[rank + axis]
        )


class Resize(_Commuting):
    """Resize: each value is a mean of its neighbours, with weights that sum to 1."""

    op_types = ("Resize",)

    def axes(self, node: ir.Node, affine: Affine) -> frozenset[int] | Refusal:
        if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
            return Refusal("Resize may fill with a constant (tf_crop_and_resize)")
        x, y = node.inputs[0], node.outputs[0]
        if x is None or x.shape is None or y.shape is None:
            return Refusal("the axes that Resize acts on are not known")
        pairs = enumerate(zip(x.shape, y.shape, strict=True))
        return frozenset(axis for axis, (a, b) in pairs if not isinstance(a, int) or a != b)


class ReduceMean(Operator):
    """ReduceMean over axes along which A does not change: with keepdims=0 they disappear."""

    op_types = ("ReduceMean",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        x = node.inputs[0]
        axes = self._axes(node)
        if isinstance(axes, Refusal) or x is None:
            return axes if isinstance(axes, Refusal) else Refusal("ReduceMean has no input")
        if node.attributes.get_int("keepdims", 1):
            mixed = bool(affine.varying & axes)
            return (
                Refusal("ReduceMean acts along the affine's axis") if mixed else Step(onward=((x, affine),))
            )
        places = tuple(sorted(axes))
        return Step(onward=((x, affine.mapped(lambda array: np.expand_dims(array, places))),))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        axes = self._axes(node)
        if isinstance(axes, Refusal):
            return axes
        if position or affine.varying & axes:
            return Refusal("ReduceMean acts along the affine's axis")
        if not node.attributes.get_int("keepdims", 1):
            places = tuple(sorted(axes))
            affine = affine.mapped(lambda array: array.squeeze(places))
        return Step(onward=((node.outputs[0], affine),))

    def _axes(self, node: ir.Node) -> frozenset[int] | Refusal:
        x = node.inputs[0]
        axes = read_integers(node, "axes", 1)
        if isinstance(axes, Refusal):
            return axes
        if x is None or x.shape is None or axes is None or not axes:
            return Refusal("the axes of ReduceMean are not known")
        return frozenset(axis % len(x.shape) for axis in axes)


class Add(Operator):
    """Add of two values, or of one and a constant.

    Behind it: ``s (x + y) + t = (s x + t) + s y``, so both sides have to take their part. With a constant of
    more than one entry for a channel, a map of biases for example: ``s (x + c) + t = s x + (s c + t)``, so
    ``c' = s c + t`` and s goes on. Before it, only a shift passes: ``(x + t) + y = (x + y) + t``.
    """

    op_types = ("Add",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        one, other = node.inputs[:2]
        rest = Affine(affine.scale, np.zeros([1] * affine.scale.ndim))
        if one is None or other is None:
            return Refusal("Add has one operand")
        if is_constant(one) or is_constant(other):
            read = read_affine(node)
            if isinstance(read, Refusal):
                return read
            x, own = read
            position = 1 if one is x else 0
            edit = Edit(node, {position: affine.scale * own.shift + affine.shift}, like=position)
            return Step((edit,), ((x, rest),))
        if not _alike(one, other, affine):
            return Refusal("the operands of Add broadcast against each other")
        return Step(onward=((one, affine), (other, rest)))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        if (affine.scale != 1.0).any():
            return Refusal("Add has another operand, which the scale must not change")
        one, other = node.inputs[:2]
        if one is None or other is None or not _alike(one, other, affine):
            return Refusal("the operands of Add broadcast against each other")
        return Step(onward=((node.outputs[0], affine),))


def _alike(one: ir.Value, other: ir.Value, affine: Affine) -> bool:
    """Tell whether two values have one rank, and one size along the axes that the affine changes along."""
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    return all(
        isinstance(one.shape[axis], int) and one.shape[axis] == other.shape[axis] for axis in affine.varying
    )


PASSAGES: tuple[Operator, ...] = (
    Unchanged(),
    GlobalAverage(),
    AveragePool(),
    MaxPool(),
    Rectifier(),
    Pad(),
    Resize(),
    ReduceMean(),
    Add(),
)
