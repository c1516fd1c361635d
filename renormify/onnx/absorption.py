"""Taking one affine into the operator before it: where it may go, the new constants, the graph's surgery."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from renormify.onnx.constants import ConstantStore, read_constant
from renormify.onnx.patterns import PRODUCERS, Absorbed, Affine, Float64, Producer, Refusal

__all__ = ["FOLDED_FROM", "NAME_SCOPES", "absorb", "module_path", "replace_output"]

#: Where torch's exporter writes the module path of a node; it survives the export.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
#: Where a folded node says which BatchNorm it has taken in: a JSON list of names, in order.
FOLDED_FROM = "renormify.folded_from"


@dataclass(frozen=True)
class _Place:
    """The operator that may take an affine in, and the constant Add between, if there is one.

    Attributes:
        node: the operator.
        pattern: what is known of its kind.
        add: the Add between it and the BatchNormalization.
        position: which of the Add's inputs is the constant.
        addend: the constant.
    """

    node: ir.Node
    pattern: Producer
    add: ir.Node | None = None
    position: int = 0
    addend: Float64 | None = None


def absorb(bn: ir.Node, name: str, affine: Affine, constants: ConstantStore) -> str | Refusal:
    """Fold one BatchNormalization and return what it went into; nothing is changed on a refusal.

    Args:
        bn: the BatchNormalization.
        name: the site's name.
        affine: what it computes.
        constants: where the new weights go.
    """
    place = _find_place(bn)
    if isinstance(place, Refusal):
        return place
    node = place.node
    weight = read_constant(node.inputs[1], f"the weight of {node.op_type}")
    if isinstance(weight, Refusal):
        return weight
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        read = read_constant(node.inputs[2], f"the bias of {node.op_type}")
        if isinstance(read, Refusal):
            return read
        bias = read
    channels = place.pattern.channels(node, weight)
    if isinstance(channels, Refusal):
        return channels
    if channels != affine.scale.size:
        return Refusal(
            f"{node.op_type} has {channels} output channels, BatchNormalization {affine.scale.size}"
        )
    split = _split(place, affine, place.pattern.rank(weight))
    if isinstance(split, Refusal):
        return split
    inside, behind = split
    absorbed = place.pattern.absorb(node, weight, bias, inside)
    base = module_path(node) or node.name or name
    stored = _store(absorbed, behind, node, base, constants)
    if isinstance(stored, Refusal):
        return stored
    _install(bn, place, stored)
    merged = json.loads(node.metadata_props.get(FOLDED_FROM, "[]"))
    node.metadata_props[FOLDED_FROM] = json.dumps([*merged, name])
    return f"{node.op_type} {base}"


def module_path(node: ir.Node) -> str:
    """Return the path of the torch module that a node came from, or "" where the file does not say."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
        return str(scopes[-2]) if len(scopes) > 1 else ""
    except (ValueError, SyntaxError, TypeError):
        return ""


def replace_output(old: ir.Node, new: ir.Node) -> None:
    """Let ``new`` produce what ``old`` produced, under its name, and remove ``old``."""
    before, after = old.outputs[0], new.outputs[0]
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    after.shape, after.type = before.shape, before.type
    name, graph = before.name, old.graph
    assert graph is not None  # it was reached through its graph
    graph.remove(old, safe=True)
    before.name = None
    after.name = name


def _find_place(bn: ir.Node) -> _Place | Refusal:
    """Go from a BatchNormalization to the operator before it, through at most one constant Add."""
    node = _sole_producer(bn, bn.inputs[0])
    if isinstance(node, Refusal):
        return node
    add, position, addend = None, 0, None
    if node.op_type == "Add" and node.domain in ("", "ai.onnx"):
        for position in (1, 0):
            read = read_constant(node.inputs[position], "the constant")
            if isinstance(read, Refusal):
                continue
            add, addend = node, read
            beyond = _sole_producer(add, add.inputs[1 - position])
            if isinstance(beyond, Refusal):
                return beyond
            node = beyond
            break
    pattern = PRODUCERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if pattern is None:
        return Refusal(f"it follows {node.op_type}, which has no weight to fold into")
    return _Place(node, pattern, add, position, addend)


def _sole_producer(node: ir.Node, value: ir.Value | None) -> ir.Node | Refusal:
    producer = None if value is None else value.producer()
    if value is None or producer is None:
        return Refusal("it follows an input of the graph")
    if producer.graph is not node.graph:
        return Refusal(f"the {producer.op_type} before it is outside of its subgraph")
    if value.is_graph_output():
        return Refusal(f"the output of the {producer.op_type} before it is also an output of the graph")
    if len(value.uses()) > 1:
        return Refusal(f"the output of the {producer.op_type} before it has other users")
    return producer


def _split(place: _Place, affine: Affine, rank: int) -> tuple[Affine, Float64 | None] | Refusal:
    """Say what goes into the operator and what an Add behind it carries, None for no Add.

    ``s (x + c) + t = s x + (s c + t)``. With one ``c`` per channel all of it goes into the operator's bias
    and the Add disappears; a ``c`` of another shape stays in its Add, and MatMul has no bias to begin with.
    """
    per_channel = [1, -1, *[1] * (rank - 2)]
    addend = place.addend
    if addend is not None:
        if addend.ndim > rank:
            return Refusal("the constant of the Add between has more axes than what it is added to")
        shape: tuple[int, ...] = (*[1] * (rank - addend.ndim), *addend.shape)
        if shape[1] not in (1, affine.scale.size):
            return Refusal("the constant of the Add between changes the number of channels")
        addend = addend.reshape(shape)
        one_per_channel = addend.size == shape[1]
    else:
        one_per_channel = True
    if place.pattern.carries_bias and one_per_channel:
        shift = affine.shift if addend is None else affine.shift + affine.scale * addend.reshape(-1)
        return Affine(affine.scale, shift), None
    behind = affine.shift.reshape(per_channel)
    if addend is not None:
        behind = behind + affine.scale.reshape(per_channel) * addend
    return Affine(affine.scale, np.zeros_like(affine.shift)), behind


def _store(
    absorbed: Absorbed, behind: Float64 | None, node: ir.Node, base: str, constants: ConstantStore
) -> tuple[ir.Value, ir.Value | None, ir.Value | None] | Refusal:
    """Store the new weight, bias and constant of the Add in the type of the weight."""
    old = node.inputs[1]
    tensor = None if old is None else ir.convenience.get_const_tensor(old)
    assert tensor is not None  # it has been read
    weight = constants.add(absorbed.weight, tensor.dtype, f"{base}.weight.folded")
    if isinstance(weight, Refusal):
        return weight
    others: list[ir.Value | None] = []
    for array, what in ((absorbed.bias, "bias"), (behind, "shift")):
        value = None if array is None else constants.add(array, tensor.dtype, f"{base}.{what}.folded")
        if isinstance(value, Refusal):
            return value
        others.append(value)
    return weight, others[0], others[1]


def _install(bn: ir.Node, place: _Place, stored: tuple[ir.Value, ir.Value | None, ir.Value | None]) -> None:
    """Put the new constants in place and take the BatchNormalization out."""
    node, add = place.node, place.add
    weight, bias, behind = stored
    node.replace_input_with(1, weight)
    if bias is not None:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, bias)
    if node.op_type == "Gemm":
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    last = node
    if add is not None and behind is None:
        replace_output(add, node)
    elif add is not None:
        add.replace_input_with(place.position, behind)
        last = add
    elif behind is not None:
        assert node.graph is not None  # it was reached through its graph
        last = ir.node("Add", [node.outputs[0], behind], name=f"{bn.name or node.op_type}_add")
        node.graph.insert_after(node, last)
    replace_output(bn, last)
