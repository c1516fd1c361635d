"""What an affine may do at an operator: go in, pass to the other side, or neither, with the reason.

Backward, ``y = A(op(x))`` becomes ``y = op'(B(x))``; forward, ``y = op(A(x))`` becomes ``y = B(op'(x))``. The
operator's new constants are the edit; B is what is still to be placed, and nothing of it is left where the
operator takes the affine in.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from renormify.onnx.affines import Affine
from renormify.onnx.constants import Float64, Refusal

__all__ = ["Edit", "Operator", "Step"]


@dataclass(frozen=True)
class Edit:
    """New constants of one node.

    Attributes:
        node: the node.
        constants: by the position of the input; float64.
        like: the input whose type new constants are stored in, where there was none at their position.
        attributes: new values of float attributes.
        behind: what an Add is to put behind the node's output, or None.
    """

    node: ir.Node
    constants: Mapping[int, Float64]
    like: int = 1
    attributes: Mapping[str, float] = field(default_factory=dict)
    behind: Float64 | None = None


@dataclass(frozen=True)
class Step:
    """What becomes of an affine at one operator.

    Attributes:
        edits: what changes in the operator.
        onward: the values on the operator's other side that are to get an affine each.
    """

    edits: tuple[Edit, ...] = ()
    onward: tuple[tuple[ir.Value, Affine], ...] = ()


class Operator(ABC):
    """One pattern; a subclass knows one or a few kinds of operator, and both of its sides unless it says why.

    Both methods return a :class:`Refusal` whose reason is a clause that names the operator.
    """

    op_types: ClassVar[tuple[str, ...]]

    def backward(self, node: ir.Node, affine: Affine) -> Step | Refusal:
        """Place an affine that acts on the node's first output."""
        return Refusal(f"{node.op_type} takes in no affine behind it")

    def forward(self, node: ir.Node, position: int, affine: Affine) -> Step | Refusal:
        """Place an affine that acts on the node's input at ``position``."""
        return Refusal(f"{node.op_type} takes in no affine before it")
