"""Operators that only move values, so that an affine moves with them: one class for each.

``A`` stands for the affine. Its arrays are transposed, reshaped, cut and joined as the values are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from renormify.onnx.affines import Affine
from renormify.onnx.constants import Float64, Refusal, is_constant, read_constant, read_integers
from renormify.onnx.operators import Edit, Operator, Step
from renormify.onnx.reshaping import carried

__all__ = ["REARRANGEMENTS"]


class Transpose(Operator):
    """Transpose: A's axes are transposed alike, or back."""

    op_types = ("Transpose",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        x = node.inputs[0]
        assert x is not None  # Transpose has one
        order = np.argsort(self._order(node, affine))
        return Step(onward=((x, affine.mapped(lambda array: array.transpose(order))),))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        order = self._order(node, affine)
        return Step(onward=((node.outputs[0], affine.mapped(lambda array: array.transpose(order))),))

    def _order(self, node: ir.Node, affine: Affine) -> list[int]:
        return list(node.attributes.get_ints("perm", range(affine.scale.ndim)[::-1]))


class Reshape(Operator):
    """Reshape, Flatten, Squeeze, Unsqueeze: the channels are followed from one shape to the other."""

    op_types = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        return self._through(node, affine, node.outputs[0], node.inputs[0])

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        if position:
            return Refusal(f"it is a parameter of {node.op_type}")
        return self._through(node, affine, node.inputs[0], node.outputs[0])

    def _through(
        self, node: ir.Node, affine: Affine, source: ir.Value | None, target: ir.Value | None
    ) -> Step | Refusal:
        if source is None or target is None or source.shape is None or target.shape is None:
            return Refusal(f"the shapes on both sides of {node.op_type} are not known")
        scale = carried(affine.scale, source.shape, target.shape)
        shift = carried(affine.shift, source.shape, target.shape)
        if scale is None or shift is None:
            return Refusal(
                f"the channels cannot be followed through {node.op_type}, from shape {source.shape} to "
                f"{target.shape}"
            )
        return Step(onward=((target, Affine(scale, shift).mapped(lambda array: array)),))


class Slice(Operator):
    """Slice: A is cut alike; backward, the values that are cut away need no affine."""

    op_types = ("Slice",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        cuts, x = self._cuts(node, affine), node.inputs[0]
        if isinstance(cuts, Refusal) or x is None or x.shape is None:
            return cuts if isinstance(cuts, Refusal) else Refusal("the shape before Slice is not known")
        sizes = list(x.shape)

        def widened(array: Float64, fill: float) -> Float64:
            for axis, cut in cuts.items():
                if array.shape[axis] > 1 or axis in affine.varying:
                    shape = [*array.shape[:axis], sizes[axis], *array.shape[axis + 1 :]]
                    wide = np.full(shape, fill)
                    wide[(slice(None),) * axis + (cut,)] = array
                    array = wide
            return array

        return Step(onward=((x, Affine(widened(affine.scale, 1.0), widened(affine.shift, 0.0))),))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        cuts = self._cuts(node, affine)
        if isinstance(cuts, Refusal) or position:
            return cuts if isinstance(cuts, Refusal) else Refusal("it is a parameter of Slice")

        def cut(array: Float64) -> Float64:
            for axis, part in cuts.items():
                array = array[(slice(None),) * axis + (part,)] if array.shape[axis] > 1 else array
            return array

        return Step(onward=((node.outputs[0], affine.mapped(cut)),))

    def _cuts(self, node: ir.Node, affine: Affine) -> dict[int, slice] | Refusal:
        """Return what is kept of each axis along which A changes."""
        x, rank = node.inputs[0], affine.scale.ndim
        lists = []
        for position, name in enumerate(("starts", "ends", "axes", "steps"), start=1):
            values = read_integers(node, name, position)
            if isinstance(values, Refusal):
                return values
            lists.append(values)
        starts, ends, axes, steps = lists
        if starts is None or ends is None or x is None or x.shape is None:
            return Refusal("what Slice cuts is not known")
        cuts = {}
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            axis = (axes[index] if axes else index) % rank
            size, step = x.shape[axis], steps[index] if steps else 1
            if axis not in affine.varying:
                continue
            if not isinstance(size, int) or step < 1:
                return Refusal("Slice turns the channels round, or cuts an unknown number of them")
            cuts[axis] = slice(start, end, step)
        return cuts


class Concat(Operator):
    """Concat: ``A(concat(x, y)) = concat(A_x(x), A_y(y))``; forward, the other parts get ``1 x + 0``."""

    op_types = ("Concat",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        axis = self._axis(node, affine)
        edits, onward, start = [], [], 0
        for position, value in enumerate(node.inputs):
            part = affine
            if axis in affine.varying:
                size = None if value is None or value.shape is None else value.shape[axis]
                if not isinstance(size, int):
                    return Refusal("the sizes of the parts of Concat are not known")
                part = _part(affine, axis, start, size)
                start += size
            if value is None:
                return Refusal("a part of Concat is missing")
            if is_constant(value):
                constant = read_constant(value, "a part of Concat")
                if isinstance(constant, Refusal):
                    return constant
                edits.append(Edit(node, {position: part.scale * constant + part.shift}, like=position))
            else:
                onward.append((value, part))
        return Step(tuple(edits), tuple(onward))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        axis = self._axis(node, affine)
        sizes = [None if v is None or v.shape is None else v.shape[axis] for v in node.inputs]
        if not all(isinstance(size, int) for size in sizes):
            return Refusal("the sizes of the parts of Concat are not known")

        def placed(array: Float64, fill: float) -> Float64:
            parts = []
            for index, size in enumerate(sizes):
                shape = [*array.shape[:axis], size, *array.shape[axis + 1 :]]
                part = np.broadcast_to(array, shape) if index == position else np.full(shape, fill)
                parts.append(part)
            return np.concatenate(parts, axis)

        whole = Affine(placed(affine.scale, 1.0), placed(affine.shift, 0.0))
        return Step(onward=((node.outputs[0], whole),))

    def _axis(self, node: ir.Node, affine: Affine) -> int:
        return node.attributes.get_int("axis", 1) % affine.scale.ndim


class Split(Operator):
    """Split: ``split(A(x))`` is each part under its part of A. Backward is Concat's business, not Split's."""

    op_types = ("Split",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        return Refusal("Split has other outputs, which the affine would change")

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        axis = node.attributes.get_int("axis", 0) % affine.scale.ndim
        onward, start = [], 0
        for output in node.outputs:
            part = affine
            if axis in affine.varying:
                size = None if output.shape is None else output.shape[axis]
                if not isinstance(size, int) or position:
                    return Refusal("the sizes of the parts of Split are not known")
                part = _part(affine, axis, start, size)
                start += size
            onward.append((output, part))
        return Step(onward=tuple(onward))


REARRANGEMENTS: tuple[Operator, ...] = (Transpose(), Reshape(), Slice(), Concat(), Split())


def _part(affine: Affine, axis: int, start: int, size: int) -> Affine:
    """Return what acts on ``size`` entries of ``axis``, from ``start`` on."""
    cut = (slice(None),) * axis + (slice(start, start + size),)
    return affine.mapped(lambda array: array[cut] if array.shape[axis] > 1 else array)
