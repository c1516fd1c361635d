"""Changing the graph as planned: constants in place, the affine's own nodes out, names and outputs kept."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from renormify.onnx.affines import read_affine
from renormify.onnx.constants import ConstantStore, Refusal, Stored, is_standard
from renormify.onnx.operators import Edit
from renormify.onnx.runs import Run

__all__ = [
    "FOLDED_FROM",
    "NAME_SCOPES",
    "Applied",
    "apply",
    "bypass",
    "drop_identities",
    "module_path",
    "replace_run",
]

#: Where torch's exporter writes the module path of a node; it survives the export.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
#: Where a node that has taken in an affine says whose: a JSON list of the sites' names, in order.
FOLDED_FROM = "renormify.folded_from"


@dataclass(frozen=True)
class Applied:
    """What an affine went into.

    Attributes:
        into: the operators, by kind and name.
        copied: bytes by which the file grows, for weights that other nodes still use as they were.
        rounding: the largest error of the new weights, relative to the largest of their row; None where they
            are float32 or float64, whose rounding is no news.
    """

    into: str
    copied: int
    rounding: float | None


def module_path(node: ir.Node) -> str:
    """Return the path of the torch module that a node came from, or "" where the file does not say."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
        return str(scopes[-2]) if len(scopes) > 1 else ""
    except (ValueError, SyntaxError, TypeError):
        return ""


def apply(
    edits: Sequence[Edit], run: Run, names: Sequence[str], constants: ConstantStore
) -> Applied | Refusal:
    """Store the new constants, put them in place and take the affine's nodes out; all of it or nothing.

    Args:
        edits: what the plan says.
        run: the affine's own nodes.
        names: of the sites that it is.
        constants: where the new constants go.
    """
    stored = []
    for edit in edits:
        values = _store(edit, names[0], constants)
        if isinstance(values, Refusal):
            return values
        stored.append(values)
    bypass(run)
    copied, into, roundings = 0, [], []
    for edit, values in zip(edits, stored, strict=True):
        node = edit.node
        for position, new in values.items():
            copied += _put(node, position, new.value)
            if new.rounding is not None:
                roundings.append(new.rounding)
        for key, number in edit.attributes.items():
            node.attributes[key] = ir.AttrFloat32(key, number)
        if edit.behind is not None:
            _put_behind(edit, names[0], constants)
        merged = json.loads(node.metadata_props.get(FOLDED_FROM, "[]"))
        node.metadata_props[FOLDED_FROM] = json.dumps([*merged, *names])
        into.append(f"{node.op_type} {_title(node, names[0])}")
    return Applied(", ".join(dict.fromkeys(into)), copied, max(roundings, default=None))


def bypass(run: Run) -> None:
    """Let what used the affine's result use its input, under the result's name where it is an output."""
    x, y = run.x, run.nodes[-1].outputs[0]
    name, was_output = y.name, y.is_graph_output()
    y.replace_all_uses_with(x, replace_graph_outputs=True)
    # An output needs both; between the nodes, many files leave them out.
    x.shape, x.type = x.shape or y.shape, x.type or y.type
    _remove(run)
    if was_output:
        y.name, x.name = None, name


def replace_run(run: Run, nodes: Sequence[ir.Node]) -> None:
    """Put ``nodes``, which make the same result of the same input, in the place of the affine's own."""
    last = run.nodes[-1]
    graph, y, new = last.graph, last.outputs[0], nodes[-1].outputs[0]
    assert graph is not None  # it was reached through its graph
    for node in nodes:
        if NAME_SCOPES in last.metadata_props:
            node.metadata_props[NAME_SCOPES] = last.metadata_props[NAME_SCOPES]
    graph.insert_after(last, nodes)
    name = y.name
    y.replace_all_uses_with(new, replace_graph_outputs=True)
    new.shape, new.type = y.shape, y.type
    _remove(run)
    y.name, new.name = None, name


def drop_identities(model: ir.Model) -> None:
    """Let what uses an Identity use its input, in place; one that returns a value from outside stays.

    onnx_ir's own pass also takes the Identity by which a branch returns a value of the graph around it.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Identity" or not is_standard(node) or node.inputs[0] is None:
            continue
        x, y = node.inputs[0], node.outputs[0]
        producer, graph, name = x.producer(), node.graph, y.name
        assert graph is not None  # it was reached through its graph
        was_output = y.is_graph_output()
        if was_output and (producer is None or producer.graph is not graph or x.is_graph_output()):
            continue
        x.shape, x.type = x.shape or y.shape, x.type or y.type
        y.replace_all_uses_with(x, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if was_output:
            y.name, x.name = None, name


def _remove(run: Run) -> None:
    graph = run.nodes[-1].graph
    assert graph is not None  # it was reached through its graph
    for node in reversed(run.nodes):
        graph.remove(node, safe=True)


def _put(node: ir.Node, position: int, value: ir.Value) -> int:
    """Put a constant in place and return its size in bytes if the old one has to stay for others."""
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    old = node.inputs[position]
    shared_already = bool(value.uses())
    node.replace_input_with(position, value)
    if old is None or shared_already or not (old.uses() or old.is_graph_output()):
        return 0
    return 0 if value.const_value is None else value.const_value.nbytes


def _put_behind(edit: Edit, site: str, constants: ConstantStore) -> None:
    """Add a constant to a node's output, in the constant Add that is there already or in a new one."""
    node, shift = edit.node, edit.behind
    assert shift is not None  # the caller has looked
    output, graph = node.outputs[0], node.graph
    assert graph is not None  # it was reached through its graph
    base, dtype = _title(node, site), _dtype(node, edit.like)
    uses = tuple(output.uses())
    if len(uses) == 1 and not output.is_graph_output() and uses[0].node.op_type == "Add":
        following, position = uses[0]
        read = read_affine(following)
        if not isinstance(read, Refusal) and following.graph is graph:
            merged = constants.add(read[1].shift + shift, dtype, f"{base}.shift.folded")
            if not isinstance(merged, Refusal):
                following.replace_input_with(1 - position, merged.value)
                return
    stored = constants.add(shift, dtype, f"{base}.shift.folded")
    assert not isinstance(stored, Refusal)  # it has been tried before anything was changed
    add = ir.node("Add", [output, stored.value], name=constants.name(f"{base}_shift"))
    result = add.outputs[0]
    result.shape, result.type = output.shape, output.type
    if NAME_SCOPES in node.metadata_props:
        add.metadata_props[NAME_SCOPES] = node.metadata_props[NAME_SCOPES]
    name, was_output = output.name, output.is_graph_output()
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    graph.insert_after(node, add)
    if was_output:
        output.name, result.name = constants.name(f"{name}_unshifted"), name
    else:
        result.name = constants.name(f"{name}_shifted")


def _store(edit: Edit, site: str, constants: ConstantStore) -> dict[int, Stored] | Refusal:
    """Store an edit's constants, each in the type of the one that it replaces."""
    node = edit.node
    base, values = _title(node, site), {}
    for position, array in edit.constants.items():
        old = node.inputs[position] if position < len(node.inputs) else None
        dtype = _dtype(node, edit.like if old is None else position)
        stored = constants.add(array, dtype, f"{base}.{_label(edit, position)}.folded")
        if isinstance(stored, Refusal):
            return stored
        values[position] = stored
    if edit.behind is not None:
        tried = constants.add(edit.behind, _dtype(node, edit.like), f"{base}.shift.folded")
        if isinstance(tried, Refusal):
            return tried
    return values


def _title(node: ir.Node, otherwise: str) -> str:
    return module_path(node) or node.name or otherwise


def _dtype(node: ir.Node, position: int) -> ir.DataType:
    value = node.inputs[position]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None  # it has been read
    return tensor.dtype


def _label(edit: Edit, position: int) -> str:
    if position == edit.like:
        return "weight"
    return "bias" if position == 2 else f"input{position}"
