"""The way of an affine through the graph, planned as a whole before anything is changed."""

from __future__ import annotations

import onnx_ir as ir

from renormify.onnx.absorbers import ABSORBERS
from renormify.onnx.affines import Affine
from renormify.onnx.constants import Refusal, is_constant, is_standard
from renormify.onnx.operators import Edit, Operator, Step
from renormify.onnx.passages import PASSAGES
from renormify.onnx.rearrangements import REARRANGEMENTS

__all__ = ["plan_backward", "plan_forward"]

_OPERATORS: dict[str, Operator] = {
    op_type: operator
    for operator in (*ABSORBERS, *PASSAGES, *REARRANGEMENTS)
    for op_type in operator.op_types
}
# They look at the shape of what they are given alone.
_SHAPES = ("Shape", "Size")


def plan_backward(
    value: ir.Value, affine: Affine, graph: ir.Graph | ir.Function
) -> tuple[Edit, ...] | Refusal:
    """Place an affine that one node of ``graph`` makes of ``value`` in what computes ``value``.

    Returns:
        The edits after which ``value`` holds what the affine would have made of it, or why there are none.
    """
    edits: list[Edit] = []
    waiting = [(value, affine, "")]  # a list rather than recursion: graphs are deeper than Python's stack
    while waiting:
        value, affine, beyond = waiting.pop()
        step = _step_backward(value, affine, graph)
        if isinstance(step, Refusal):
            return Refusal(f"{beyond}{step.reason}")
        edits += step.edits
        waiting += [(source, part, _beyond(value.producer())) for source, part in reversed(step.onward)]
    return tuple(edits)


def plan_forward(
    value: ir.Value, affine: Affine, graph: ir.Graph | ir.Function
) -> tuple[Edit, ...] | Refusal:
    """Place the affine whose result ``value`` is in all that use ``value``.

    Args:
        value: the result.
        affine: the affine.
        graph: the graph that it is in.

    Returns:
        The edits after which ``value`` may be what the affine is made of, or why there are none.
    """
    edits: list[Edit] = []
    met: set[ir.Node] = set()
    waiting = [(value, affine, "")]
    while waiting:
        value, affine, beyond = waiting.pop()
        if value.is_graph_output():
            return Refusal(f"{beyond}its result is an output of the graph")
        uses = _uses(value)
        if not uses:
            return Refusal(f"{beyond}nothing uses its result")
        further = []
        for node, position in uses:
            step = _step_forward(node, position, affine, graph, met)
            if isinstance(step, Refusal):
                return Refusal(f"{beyond}{step.reason}")
            edits += step.edits
            # A part of a Split may have no user at all.
            needed = [pair for pair in step.onward if _uses(pair[0]) or pair[0].is_graph_output()]
            further += [(target, part, _beyond(node)) for target, part in needed]
        waiting += reversed(further)
    return tuple(edits)


def _step_backward(value: ir.Value, affine: Affine, graph: ir.Graph | ir.Function) -> Step | Refusal:
    node = value.producer()
    if node is None:
        return Refusal("there is an input of the graph" if not is_constant(value) else "there is a constant")
    if node.graph is not graph:
        return Refusal(f"{node.op_type} is outside of its subgraph")
    if value.is_graph_output():
        return Refusal(f"the output of {node.op_type} is also an output of the graph")
    if len(_uses(value)) > 1:
        return Refusal(f"the output of {node.op_type} has other users")
    operator = _operator(node)
    return operator if isinstance(operator, Refusal) else operator.backward(node, affine)


def _step_forward(
    node: ir.Node, position: int, affine: Affine, graph: ir.Graph | ir.Function, met: set[ir.Node]
) -> Step | Refusal:
    if node.graph is not graph:
        return Refusal(f"{node.op_type} uses its result in a subgraph")
    if node in met:
        return Refusal(f"its result reaches {node.op_type} by two ways")
    met.add(node)
    operator = _operator(node)
    return operator if isinstance(operator, Refusal) else operator.forward(node, position, affine)


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the uses that an affine would change: a shape stays what it is, and exporters ask for many."""
    return [use for use in value.uses() if not (use.node.op_type in _SHAPES and is_standard(use.node))]


def _beyond(node: ir.Node | None) -> str:
    return "" if node is None else f"beyond {node.op_type}, "


def _operator(node: ir.Node) -> Operator | Refusal:
    operator = _OPERATORS.get(node.op_type) if is_standard(node) else None
    if operator is None:
        return Refusal(f"{node.op_type} neither takes in an affine nor commutes with one")
    return operator
