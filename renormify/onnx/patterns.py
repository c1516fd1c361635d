"""Operators that take a per-channel affine behind them into their own weight and bias: one class for each.

With ``s = gamma / sqrt(var + eps)`` and ``t = beta - mean * s``, BatchNormalization in inference is
``y = s * x + t`` on axis 1. Where ``x`` is linear in a constant weight, ``s`` goes into the weight and ``t``
into the bias. All of it is computed in float64; who stores it rounds once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["PRODUCERS", "Absorbed", "Affine", "Producer", "Refusal"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Refusal:
    """Why something stays as it is, in words: the end of the phrase "it stays because ..."."""

    reason: str


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift`` per channel; both of shape :math:`(C)`, float64."""

    scale: Float64
    shift: Float64


@dataclass(frozen=True)
class Absorbed:
    """A producer's new weight, and its new bias where the producer carries one; float64."""

    weight: Float64
    bias: Float64 | None


class Producer(ABC):
    """An operator with a constant weight as its second input and, but for MatMul, a bias as its third.

    A subclass says where the output channels lie in the weight, and no more.
    """

    op_type: ClassVar[str]
    carries_bias: ClassVar[bool] = True

    @abstractmethod
    def channels(self, node: ir.Node, weight: Float64) -> int | Refusal:
        """Return the number of output channels on axis 1, or why axis 1 holds no channels."""

    @abstractmethod
    def scaled(self, node: ir.Node, weight: Float64, scale: Float64) -> Float64:
        """Return the weight with its output channels multiplied by ``scale``."""

    def rank(self, weight: Float64) -> int:
        """Return the rank of the output."""
        return weight.ndim

    def absorb(self, node: ir.Node, weight: Float64, bias: Float64 | None, affine: Affine) -> Absorbed:
        """Return weight and bias of the operator that includes ``affine``."""
        return Absorbed(
            self.scaled(node, weight, affine.scale),
            self.shifted(node, bias, affine) if self.carries_bias else None,
        )

    def shifted(self, node: ir.Node, bias: Float64 | None, affine: Affine) -> Float64 | None:
        """Return the bias behind the affine; None where there was none and none is needed."""
        if bias is None:
            return affine.shift if affine.shift.any() else None
        return bias * affine.scale + affine.shift


class ConvProducer(Producer):
    """Conv, whatever its groups, strides and padding.

    ``y[o] = sum_i W[o, i] * x[i] + b[o]``, with W of shape :math:`(C_{out}, C_{in} / g, ...)`, so
    ``W'[o] = s[o] W[o]`` and ``b' = s b + t``. Padding is inside the sum and stays true.
    """

    op_type = "Conv"

    def channels(self, node: ir.Node, weight: Float64) -> int | Refusal:
        return int(weight.shape[0])

    def scaled(self, node: ir.Node, weight: Float64, scale: Float64) -> Float64:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


class ConvTransposeProducer(Producer):
    """ConvTranspose, grouped and depthwise too.

    W has shape :math:`(C_{in}, C_{out} / g, ...)`: row i belongs to group ``i // (C_in / g)``, and column j
    of group k is the output channel ``k * C_out / g + j``. So the weight is split into its groups first,
    ``W'[k, i, j] = s[k, j] W[k, i, j]``, and ``b' = s b + t``.
    """

    op_type = "ConvTranspose"

    def channels(self, node: ir.Node, weight: Float64) -> int | Refusal:
        groups = node.attributes.get_int("group", 1)
        if weight.shape[0] % groups:
            return Refusal(f"{weight.shape[0]} input channels do not divide into {groups} groups")
        return int(weight.shape[1]) * groups

    def scaled(self, node: ir.Node, weight: Float64, scale: Float64) -> Float64:
        groups = node.attributes.get_int("group", 1)
        split = weight.reshape(groups, -1, *weight.shape[1:])
        per_group = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return (split * per_group).reshape(weight.shape)


class GemmProducer(Producer):
    """Gemm: ``y = alpha A' B' + beta C``.

    ``s`` multiplies the columns of B' (the rows of B under transB) and alpha stays. C may be a scalar, a
    row, a column or a matrix, so ``C' = beta s C + t`` broadcasts to the right shape by itself; beta
    becomes 1.
    """

    op_type = "Gemm"

    def channels(self, node: ir.Node, weight: Float64) -> int | Refusal:
        return int(weight.shape[0 if node.attributes.get_int("transB", 0) else 1])

    def scaled(self, node: ir.Node, weight: Float64, scale: Float64) -> Float64:
        return weight * (scale[:, None] if node.attributes.get_int("transB", 0) else scale)

    def shifted(self, node: ir.Node, bias: Float64 | None, affine: Affine) -> Float64 | None:
        beta = node.attributes.get_float("beta", 1.0)
        return super().shifted(node, None if bias is None or beta == 0.0 else bias * beta, affine)


class MatMulProducer(Producer):
    """MatMul with a constant right operand and a result of rank 2: ``y = A B``.

    ``B' = B s`` on the columns. There is no bias to take ``t``: an Add behind the MatMul carries it. At a
    higher rank the columns are the last axis and BatchNormalization's channels are axis 1, so nothing folds.
    """

    op_type = "MatMul"
    carries_bias = False

    def channels(self, node: ir.Node, weight: Float64) -> int | Refusal:
        left = node.inputs[0]
        if weight.ndim != 2:
            return Refusal(f"the constant operand of MatMul has rank {weight.ndim}, not 2")
        if left is None or left.shape is None:
            return Refusal("the rank of MatMul's result is not known, so neither is its channel axis")
        if len(left.shape) != 2:
            return Refusal(
                f"MatMul's channels are the last of {len(left.shape)} axes, BatchNormalization's are axis 1"
            )
        return int(weight.shape[1])

    def scaled(self, node: ir.Node, weight: Float64, scale: Float64) -> Float64:
        return weight * scale


PRODUCERS: dict[str, Producer] = {
    pattern.op_type: pattern
    for pattern in (ConvProducer(), ConvTransposeProducer(), GemmProducer(), MatMulProducer())
}
