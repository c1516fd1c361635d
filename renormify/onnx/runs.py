"""Runs of affines: BatchNormalization and constant Mul, Div, Add, Sub that follow each other directly."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from renormify.onnx.affines import Affine, read_affine
from renormify.onnx.constants import Refusal, is_constant, is_standard

__all__ = ["Run", "find_run", "is_batch_norm"]

_ARITHMETIC = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class Run:
    """Nodes that make one affine together; what lies between them has no other users.

    Attributes:
        nodes: in order.
        x: what the first is applied to.
        affine: what they compute.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    affine: Affine

    @property
    def norms(self) -> tuple[ir.Node, ...]:
        """The BatchNormalization nodes among them."""
        return tuple(node for node in self.nodes if is_batch_norm(node))

    @property
    def is_site(self) -> bool:
        """Whether it is worth an account: a BatchNormalization, or arithmetic for each channel.

        A scalar factor is part of some activation, and the Add behind a MatMul is its bias.
        """
        if self.norms:
            return True
        producer = self.x.producer()
        bias = (
            producer is not None
            and producer.op_type == "MatMul"
            and any(value is not None and is_constant(value) for value in producer.inputs)
        )
        return bool(self.affine.varying) and not (bias and all(node.op_type == "Add" for node in self.nodes))


def is_batch_norm(node: ir.Node) -> bool:
    """Tell whether a node is ONNX's BatchNormalization."""
    return node.op_type == "BatchNormalization" and is_standard(node)


def find_run(node: ir.Node) -> Run | Refusal:
    """Return the run that begins with ``node``, or why ``node`` is no affine for each channel."""
    read = _read(node)
    if isinstance(read, Refusal):
        return read
    x, affine = read
    nodes = [node]
    while (following := _following(nodes[-1])) is not None:
        read = _read(following)
        if isinstance(read, Refusal) or len(affine.varying | read[1].varying) > 1:
            break
        nodes.append(following)
        affine = affine.then(read[1])
    return Run(tuple(nodes), x, affine)


def _read(node: ir.Node) -> tuple[ir.Value, Affine] | Refusal:
    read = read_affine(node, _rank_by_weight(node) if is_batch_norm(node) else None)
    if not isinstance(read, Refusal) and len(read[1].varying) > 1:
        return Refusal("it changes along several axes")
    return read


def _following(node: ir.Node) -> ir.Node | None:
    """Return the only user of a node's result, if it is in the same graph and may be a part of the run."""
    result = node.outputs[0]
    uses = tuple(result.uses())
    if result.is_graph_output() or len(uses) != 1:
        return None
    user = uses[0].node
    fits = is_standard(user) and user.op_type in ("BatchNormalization", *_ARITHMETIC)
    return user if fits and user.graph is node.graph else None


def _rank_by_weight(node: ir.Node) -> int | None:
    """Return the rank of a convolution before a node, or of one behind it, where no shape is known."""
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    behind = (use.node for use in node.outputs[0].uses() if use.idx == 0)
    for neighbour in (*([] if producer is None else [producer]), *behind):
        if neighbour.op_type in ("Conv", "ConvTranspose", "Gemm") and is_standard(neighbour):
            weight = neighbour.inputs[1]
            if weight is not None and weight.shape is not None:
                return len(weight.shape)
    return None
