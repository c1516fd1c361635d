"""The way of an affine through the graph, planned as a whole before anything is changed."""

from __future__ import annotations

import onnx_ir as ir

from renormify.onnx.absorbers import ABSORBERS
from renormify.onnx.affines import Affine
from renormify.onnx.constants import Refusal, is_constant, is_standard
from renormify.onnx.operators import Edit, Operator
from renormify.onnx.passages import PASSAGES
from renormify.onnx.rearrangements import REARRANGEMENTS

__all__ = ["plan_backward", "plan_forward"]

_OPERATORS: dict[str, Operator] = {
    op_type: operator
    for operator in (*ABSORBERS, *PASSAGES, *REARRANGEMENTS)
    for op_type in operator.op_types
}


def plan_backward(
    value: ir.Value, affine: Affine, graph: ir.Graph | ir.Function
) -> tuple[Edit, ...] | Refusal:
    """Place an affine that one node of ``graph`` makes of ``value`` in what computes ``value``.

    Returns:
        The edits after which ``value`` holds what the affine would have made of it, or why there are none.
    """
    node = value.producer()
    if node is None:
        return Refusal("there is an input of the graph" if not is_constant(value) else "there is a constant")
    if node.graph is not graph:
        return Refusal(f"{node.op_type} is outside of its subgraph")
    if value.is_graph_output():
        return Refusal(f"the output of {node.op_type} is also an output of the graph")
    if len(value.uses()) > 1:
        return Refusal(f"the output of {node.op_type} has other users")
    operator = _operator(node)
    if isinstance(operator, Refusal):
        return operator
    step = operator.backward(node, affine)
    if isinstance(step, Refusal):
        return step
    edits = list(step.edits)
    for source, part in step.onward:
        further = plan_backward(source, part, graph)
        if isinstance(further, Refusal):
            return Refusal(f"beyond {node.op_type}, {further.reason}")
        edits += further
    return tuple(edits)


def plan_forward(
    value: ir.Value, affine: Affine, graph: ir.Graph | ir.Function, met: set[ir.Node] | None = None
) -> tuple[Edit, ...] | Refusal:
    """Place the affine whose result ``value`` is in all that use ``value``.

    Args:
        value: the result.
        affine: the affine.
        graph: the graph that it is in.
        met: the nodes on the way so far.

    Returns:
        The edits after which ``value`` may be what the affine is made of, or why there are none.
    """
    met = set() if met is None else met
    if value.is_graph_output():
        return Refusal("its result is an output of the graph")
    uses = tuple(value.uses())
    if not uses:
        return Refusal("nothing uses its result")
    edits: list[Edit] = []
    for node, position in uses:
        if node.graph is not graph:
            return Refusal(f"{node.op_type} uses its result in a subgraph")
        if node in met:
            return Refusal(f"its result reaches {node.op_type} by two ways")
        met.add(node)
        operator = _operator(node)
        if isinstance(operator, Refusal):
            return operator
        step = operator.forward(node, position, affine)
        if isinstance(step, Refusal):
            return step
        edits += step.edits
        for target, part in step.onward:
            if not target.uses() and not target.is_graph_output():
                continue  # a part of Split that nobody needs
            further = plan_forward(target, part, graph, met)
            if isinstance(further, Refusal):
                return Refusal(f"beyond {node.op_type}, {further.reason}")
            edits += further
    return tuple(edits)


def _operator(node: ir.Node) -> Operator | Refusal:
    operator = _OPERATORS.get(node.op_type) if is_standard(node) else None
    if operator is None:
        return Refusal(f"{node.op_type} neither takes in an affine nor commutes with one")
    return operator
