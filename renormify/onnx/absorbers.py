"""Operators that take an affine into their own constants: one class for each, its algebra at the top.

``s`` and ``t`` are the affine's scale and shift, one for each channel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from renormify.onnx.affines import Affine, read_affine, vector
from renormify.onnx.constants import Float64, Refusal, is_constant, read_constant
from renormify.onnx.operators import Edit, Operator, Step

__all__ = ["ABSORBERS"]


class _Convolution(Operator):
    """What Conv and ConvTranspose have in common: weight, bias, groups, and channels on axis 1."""

    def _split(self, node: ir.Node, weight: Float64) -> Float64 | Refusal:
        """Return the weight as (groups, its first axis in one group, its second, ...)."""
        groups = node.attributes.get_int("group", 1)
        if weight.shape[0] % groups:
            return Refusal(f"the weight of {node.op_type} does not divide into {groups} groups")
        return weight.reshape(groups, -1, *weight.shape[1:])

    def _padded(self, node: ir.Node, weight: Float64) -> bool:
        auto = node.attributes.get_string("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            return any(size > 1 for size in weight.shape[2:])
        return auto != "VALID" and any(node.attributes.get_ints("pads", ()))


class Conv(_Convolution):
    """``y[o] = sum_ik W[o, i, k] x[i, . + k] + b[o]``, with W of shape :math:`(C_{out}, C_{in} / g, ...)`.

    Behind it: ``W'[o] = s[o] W[o]`` and ``b' = s b + t``, whatever the padding, which is inside the sum.
    Before it: ``W'[o, i] = W[o, i] s[i]``, where i counts on through the groups, and
    ``b'[o] = b[o] + sum_ik W[o, i, k] t[i]``. With padding the sum at the border has fewer terms than that:
    then only a scale can go in.
    """

    op_types = ("Conv",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        read = _weight_and_bias(node)
        if isinstance(read, Refusal):
            return read
        weight, bias = read
        split = _channels(node, affine, weight.shape[0], "output")
        if isinstance(split, Refusal):
            return split
        scale, shift = split
        scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return _edited(node, scaled, _behind(bias, scale, shift))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        read = _weight_and_bias(node, position)
        if isinstance(read, Refusal):
            return read
        weight, bias = read
        grouped = self._split(node, weight)
        if isinstance(grouped, Refusal):
            return grouped
        if affine.shifts and self._padded(node, weight):
            return Refusal("Conv pads with zeros, which the shift would have to change")
        groups, _, inputs = grouped.shape[:3]
        split = _channels(node, affine, groups * inputs, "input")
        if isinstance(split, Refusal):
            return split
        to = (groups, 1, inputs, *[1] * (weight.ndim - 2))
        scale, shift = (array.reshape(to) for array in split)
        added = (grouped * shift).sum(axis=tuple(range(2, grouped.ndim))).reshape(-1)
        return _edited(node, (grouped * scale).reshape(weight.shape), _sum(bias, added))


class ConvTranspose(_Convolution):
    """``y[o, . + k] += W[i, o, k] x[i, .]``, with W of shape :math:`(C_{in}, C_{out} / g, ...)`.

    Row i belongs to group ``i // (C_in / g)``, and column j of group k is the output channel
    ``k * C_out / g + j``; so W is split into its groups first, ``W[k, i, j]``.
    Behind it: ``W'[k, i, j] = s[k, j] W[k, i, j]`` and ``b' = s b + t``.
    Before it: ``W'[i] = s[i] W[i]``. What a shift adds depends on how many windows overlap at a position, so
    it goes in only where the kernel has one position: ``b'[o] = b[o] + sum_i W[i, o] t[i]``.
    """

    op_types = ("ConvTranspose",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        read = _weight_and_bias(node)
        if isinstance(read, Refusal):
            return read
        weight, bias = read
        grouped = self._split(node, weight)
        if isinstance(grouped, Refusal):
            return grouped
        groups, _, columns = grouped.shape[:3]
        split = _channels(node, affine, groups * columns, "output")
        if isinstance(split, Refusal):
            return split
        scale, shift = split
        scaled = grouped * scale.reshape(groups, 1, columns, *[1] * (weight.ndim - 2))
        return _edited(node, scaled.reshape(weight.shape), _behind(bias, scale, shift))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        read = _weight_and_bias(node, position)
        if isinstance(read, Refusal):
            return read
        weight, bias = read
        grouped = self._split(node, weight)
        if isinstance(grouped, Refusal):
            return grouped
        one_position = (
            all(size == 1 for size in weight.shape[2:])
            and all(step == 1 for step in node.attributes.get_ints("strides", ()))
            and not any(node.attributes.get_ints("output_padding", ()))
            and "output_shape" not in node.attributes
            and not self._padded(node, weight)
        )
        if affine.shifts and not one_position:
            return Refusal("the windows of ConvTranspose overlap unevenly, which a shift would show")
        split = _channels(node, affine, weight.shape[0], "input")
        if isinstance(split, Refusal):
            return split
        scale, shift = (array.reshape(-1, *[1] * (weight.ndim - 1)) for array in split)
        added = (grouped * shift.reshape(*grouped.shape[:2], *[1] * (weight.ndim - 1))).sum(axis=1)
        added = added.sum(axis=tuple(range(2, added.ndim))).reshape(-1) if affine.shifts else np.zeros(1)
        return _edited(node, weight * scale, _sum(bias, added))


class Gemm(Operator):
    """``y = alpha A' B' + beta C``; a prime stands for the transposition that transA and transB ask for.

    Behind it: ``s`` multiplies the columns of B' (the rows of B under transB), alpha stays, and
    ``C' = beta s C + t``; C may be a scalar, a row, a column or a matrix, and broadcasts to the right shape
    by itself. Before it, along the inner axis: ``s`` multiplies the rows of B', and
    ``C' = beta C + alpha t B'``. In both, beta becomes 1.
    """

    op_types = ("Gemm",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        read = self._read(node)
        if isinstance(read, Refusal):
            return read
        weight, bias, transposed = read
        split = _channels(node, affine, weight.shape[1], "output")
        if isinstance(split, Refusal):
            return split
        scale, shift = split
        return self._edited(node, weight * scale, _behind(bias, scale, shift), transposed)

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        read = self._read(node, position)
        if isinstance(read, Refusal):
            return read
        weight, bias, transposed = read
        inner = 0 if node.attributes.get_int("transA", 0) else 1
        split = _channels(node, affine, weight.shape[0], "input", inner)
        if isinstance(split, Refusal):
            return split
        scale, shift = split
        added = node.attributes.get_float("alpha", 1.0) * (shift @ weight)
        return self._edited(node, weight * scale[:, None], _sum(bias, added), transposed)

    def _read(self, node: ir.Node, position: int = 0) -> tuple[Float64, Float64 | None, bool] | Refusal:
        """Return B', ``beta C``, and whether B is transposed."""
        read = _weight_and_bias(node, position)
        if isinstance(read, Refusal):
            return read
        weight, bias = read
        beta, transposed = node.attributes.get_float("beta", 1.0), bool(node.attributes.get_int("transB", 0))
        # A beta of 0 hides whatever C holds, an infinity too.
        bias = None if bias is None or beta == 0.0 else bias * beta
        return weight.T if transposed else weight, bias, transposed

    def _edited(self, node: ir.Node, weight: Float64, bias: Float64 | None, transposed: bool) -> Step:
        (edit,) = _edited(node, weight.T if transposed else weight, bias).edits
        beta = {} if bias is None and len(node.inputs) < 3 else {"beta": 1.0 if bias is not None else 0.0}
        return Step((Edit(node, edit.constants, attributes=beta),))


class MatMul(Operator):
    """``y = A B`` with one constant operand, a matrix; the other may have any rank.

    The constant on the right, behind it: ``B' = B s`` on the columns, which are y's last axis; before it,
    along A's last axis: ``B' = s B`` on the rows, and the shift ``t B`` is what is left. With the constant on
    the left it is the same of the transposed: the axes are the last but one. MatMul has no bias, so an Add
    behind it carries the shift.
    """

    op_types = ("MatMul",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        position = 0 if node.inputs[0] is not None and is_constant(node.inputs[0]) else 1
        read = self._read(node, position, affine)
        if isinstance(read, Refusal):
            return read
        weight, axis = read
        split = _channels(node, affine, weight.shape[1], "output", axis)
        if isinstance(split, Refusal):
            return split
        return self._edited(node, position, axis, affine.scale.ndim, weight * split[0], split[1])

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        read = self._read(node, 1 - position, affine)
        if isinstance(read, Refusal):
            return read
        weight, axis = read
        split = _channels(node, affine, weight.shape[0], "input", axis)
        if isinstance(split, Refusal):
            return split
        scale, shift = split
        scaled = weight * scale[:, None]
        return self._edited(node, 1 - position, axis, affine.scale.ndim, scaled, shift @ weight)

    def _read(self, node: ir.Node, position: int, affine: Affine) -> tuple[Float64, int] | Refusal:
        """Return the constant at ``position``, the left one transposed, and the axis that it acts on."""
        weight = read_constant(node.inputs[position], "the weight of MatMul")
        if isinstance(weight, Refusal):
            return weight
        rank = affine.scale.ndim
        if weight.ndim != 2 or rank < 2:
            return Refusal(f"MatMul multiplies rank {rank} by a constant of rank {weight.ndim}")
        return (weight, rank - 1) if position else (weight.T, rank - 2)

    def _edited(
        self, node: ir.Node, position: int, axis: int, rank: int, weight: Float64, shift: Float64
    ) -> Step:
        behind = shift.reshape([-1 if i == axis else 1 for i in range(rank)]) if shift.any() else None
        constants = {position: weight if position else weight.T}
        return Step((Edit(node, constants, like=position, behind=behind),))


class BatchNorm(Operator):
    """``y = gamma (x - mean) / sigma + beta``: an affine takes in another, through what parts them.

    Behind it: ``gamma' = s gamma`` and ``beta' = s beta + t``. Before it: ``gamma' = s gamma``, ``mean' = 0``
    and ``beta' = beta + (t - mean) gamma / sigma``.
    """

    op_types = ("BatchNormalization",)

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        read = self._read(node, affine)
        if isinstance(read, Refusal):
            return read
        (scale, shift), (gamma, beta, _), _ = read
        return Step((Edit(node, {1: scale * gamma, 2: scale * beta + shift}),))

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        if position:
            return Refusal("it is a parameter of BatchNormalization")
        read = self._read(node, affine)
        if isinstance(read, Refusal):
            return read
        (scale, shift), (gamma, beta, mean), over_sigma = read
        constants = {1: scale * gamma, 2: beta + (shift - mean) * over_sigma, 3: np.zeros_like(mean)}
        return Step((Edit(node, constants),))

    def _read(
        self, node: ir.Node, affine: Affine
    ) -> tuple[tuple[Float64, Float64], list[Float64], Float64] | Refusal:
        """Return the affine's vectors, gamma, beta and mean, and ``gamma / sigma``."""
        own = read_affine(node, affine.scale.ndim)
        if isinstance(own, Refusal):
            return Refusal(f"BatchNormalization stays: {own.reason}")
        over_sigma = own[1].scale.reshape(-1)
        split = _channels(node, affine, over_sigma.size, "own")
        if isinstance(split, Refusal):
            return split
        arrays = [read_constant(value, "") for value in node.inputs[1:4]]
        return split, [array for array in arrays if not isinstance(array, Refusal)], over_sigma


ABSORBERS: tuple[Operator, ...] = (Conv(), ConvTranspose(), Gemm(), MatMul(), BatchNorm())


def _weight_and_bias(node: ir.Node, position: int = 0) -> tuple[Float64, Float64 | None] | Refusal:
    if position:
        return Refusal(f"it is the weight or the bias of {node.op_type}")
    weight = read_constant(node.inputs[1], f"the weight of {node.op_type}")
    if isinstance(weight, Refusal):
        return weight
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return weight, None
    bias = read_constant(node.inputs[2], f"the bias of {node.op_type}")
    return bias if isinstance(bias, Refusal) else (weight, bias)


def _channels(
    node: ir.Node, affine: Affine, size: int, which: str, axis: int = 1
) -> tuple[Float64, Float64] | Refusal:
    """Return scale and shift as vectors of ``size``, if they change along ``axis`` alone."""
    scale, shift = vector(affine.scale, axis, size), vector(affine.shift, axis, size)
    if scale is None or shift is None:
        along = ", ".join(map(str, sorted(affine.varying)))
        return Refusal(
            f"it does not act on the {size} {which} channels of {node.op_type}, axis {axis} of "
            f"{affine.scale.ndim}, but along axis {along}"
        )
    return scale, shift


def _behind(bias: Float64 | None, scale: Float64, shift: Float64) -> Float64 | None:
    """Return ``s b + t``; None where there was no bias and none is needed."""
    if bias is None:
        return shift if shift.any() else None
    return bias * scale + shift


def _sum(bias: Float64 | None, added: Float64) -> Float64 | None:
    if bias is None:
        return added if added.any() else None
    return bias + added


def _edited(node: ir.Node, weight: Float64, bias: Float64 | None) -> Step:
    return Step((Edit(node, {1: weight} if bias is None else {1: weight, 2: bias}),))
