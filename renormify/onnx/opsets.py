"""Writing a model in an older opset than torch's exporter has.

onnx's own converter has a way down for few operators, and none for Relu. Yet from opset 13 to 18 most
changed only in the types that they take. So a node goes down as it is where the older schema knows its
attributes, but for those that have their default, its inputs and their types. Integers that have become an
input were an attribute of the same name. An operator that is younger than the opset is written out as the
function that onnx defines it by.
"""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes import common as passes

from renormify.onnx.cleaning import clean
from renormify.onnx.constants import Refusal, is_standard, read_integers

__all__ = ["LOWEST_OPSET", "lower", "newest_opset"]

#: The lowest opset that a model is written in.
LOWEST_OPSET = 13


def newest_opset() -> int:
    """Return the newest opset that the installed onnx knows."""
    return onnx.defs.onnx_opset_version()


def lower(model: ir.Model, opset: int) -> ir.Model | Refusal:
    """Return ``model``, which has no functions, in an older opset, or what in it has no such form."""
    young = {
        node.op_type for node in model.graph.all_nodes() if is_standard(node) and not _schema(node, opset)
    }
    if young:
        proto = onnx.inliner.inline_selected_functions(
            ir.to_proto(model), [("", op_type) for op_type in young], inline_schema_functions=True
        )
        model = ir.from_proto(proto)
        clean(model)  # the functions compute from shapes what is known here
    passes.ShapeInferencePass()(model)
    for node in model.graph.all_nodes():
        if is_standard(node) and (refusal := _lower(node, model.graph.opset_imports[""], opset)) is not None:
            return Refusal(f"{node.op_type} {refusal.reason}")
    passes.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[""] = opset
    # Who asks for an old opset has an old runtime, which knows no newer IR version either.
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return model


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _lower(node: ir.Node, opset: int, older: int) -> Refusal | None:
    """Write one node as an older opset has it, in place, or say why not."""
    new, old = _schema(node, opset), _schema(node, older)
    if old is None or new is None:
        return Refusal(f"is not an operator of opset {older}, nor a function of such")
    if new.since_version == old.since_version:
        return None
    for name, attribute in [*node.attributes.items()]:
        if name in old.attributes:
            continue
        if not (attribute.value == _default(new, name) or _is_needless(node, name)):
            return Refusal(f"has {name}, which opset {older} does not know")
        del node.attributes[name]
    for position in range(old.max_input, len(node.inputs)):
        name = new.inputs[position].name
        integers = read_integers(node, name, position)
        if isinstance(integers, Refusal) or (integers is not None and name not in old.attributes):
            return Refusal(f"is given {name}, which opset {older} does not know")
        if integers is not None:
            node.attributes[name] = ir.AttrInt64s(name, integers)
    node.resize_inputs(min(len(node.inputs), old.max_input))
    for position, value in enumerate(node.inputs):
        given = _type_name(value)
        if given is not None and given not in old.inputs[min(position, len(old.inputs) - 1)].types:
            return Refusal(f"is given {given}, which opset {older} does not take")
    return None


def _default(schema: onnx.defs.OpSchema, name: str) -> object:
    default = schema.attributes[name].default_value
    return ir.serde.deserialize_attribute(default).value if default.name else None


def _is_needless(node: ir.Node, name: str) -> bool:
    """Tell whether an attribute asks for what the operator does without it too."""
    if (node.op_type, name) == ("Split", "num_outputs"):  # into parts of one size
        axis = node.attributes.get_int("axis", 0)
        sizes = {None if value.shape is None else value.shape[axis] for value in node.outputs}
        return len(sizes) == 1 and None not in sizes
    if (node.op_type, name) == ("Reshape", "allowzero"):  # where there is no zero to allow
        shape = read_integers(node, "shape", 1)
        return not isinstance(shape, Refusal) and shape is not None and 0 not in shape
    return False


def _type_name(value: ir.Value | None) -> str | None:
    """Return a tensor's type as schemas write it, ``tensor(float)`` say."""
    if value is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
        return None
    return f"tensor({value.dtype.name.lower()})"
