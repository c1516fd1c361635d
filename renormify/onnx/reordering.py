"""What computes the same in another order, and costs less.

Average pooling before a pointwise Conv: ``pool(W x + b) = W pool(x) + b`` for a Conv of one position and
windows whose weights sum to 1, as both are sums, one over channels and one over positions. DenseNet's
transitions have them in the costly order. And Concat of a Concat, as in Inception, copies its parts twice.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from renormify.onnx.constants import is_standard
from renormify.onnx.surgery import NAME_SCOPES

__all__ = ["join_concats", "pool_first"]


def join_concats(model: ir.Model) -> int:
    """Let each Concat take the parts of the one before it along the same axis, in place; return how many."""
    count = 0
    for outer in list(model.graph.all_nodes()):
        while (position := _nested(outer)) is not None:
            value = outer.inputs[position]
            assert value is not None  # it has a producer
            inner = value.producer()
            assert inner is not None
            parts = [*outer.inputs[:position], *inner.inputs, *outer.inputs[position + 1 :]]
            outer.resize_inputs(len(parts))
            for index, part in enumerate(parts):
                outer.replace_input_with(index, part)
            assert inner.graph is not None  # it was reached through its graph
            inner.graph.remove(inner, safe=True)
            count += 1
    return count


def _nested(outer: ir.Node) -> int | None:
    """Return the input of a Concat that is another's result, of the same axis and with no other user."""
    if outer.op_type != "Concat" or not is_standard(outer):
        return None
    for position, value in enumerate(outer.inputs):
        inner = None if value is None else value.producer()
        if (
            value is not None
            and inner is not None
            and inner.op_type == "Concat"
            and is_standard(inner)
            and inner.graph is outer.graph
            and inner.attributes.get_int("axis", 1) == outer.attributes.get_int("axis", 1)
            and len(value.uses()) == 1
            and not value.is_graph_output()
        ):
            return position
    return None


def pool_first(model: ir.Model) -> int:
    """Put each strided AveragePool before the pointwise Conv that it follows, in place; return how many."""
    pairs = [
        (conv, pool)
        for pool in model.graph.all_nodes()
        if (conv := _pointwise_before(pool)) is not None and _averages_fewer(pool)
    ]
    for conv, pool in pairs:
        _exchange(conv, pool)
    return len(pairs)


def _pointwise_before(pool: ir.Node) -> ir.Node | None:
    if pool.op_type != "AveragePool" or not is_standard(pool) or pool.inputs[0] is None:
        return None
    value = pool.inputs[0]
    conv = value.producer()
    if conv is None or conv.op_type != "Conv" or not is_standard(conv) or conv.graph is not pool.graph:
        return None
    weight = conv.inputs[1]
    if weight is None or weight.shape is None or any(size != 1 for size in list(weight.shape)[2:]):
        return None
    attributes = conv.attributes
    plain = (
        not any(attributes.get_ints("pads", ()))
        and all(step == 1 for step in attributes.get_ints("strides", ()))
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )
    return conv if plain and len(value.uses()) == 1 and not value.is_graph_output() else None


def _averages_fewer(pool: ir.Node) -> bool:
    """Tell whether there are fewer windows than positions, and each is a mean of positions that are there."""
    attributes = pool.attributes
    return (
        prod(attributes.get_ints("strides", ())) > 1
        and not any(attributes.get_ints("pads", ()))
        and not attributes.get_int("ceil_mode", 0)
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _exchange(conv: ir.Node, pool: ir.Node) -> None:
    graph, x, between, y = pool.graph, conv.inputs[0], conv.outputs[0], pool.outputs[0]
    assert graph is not None  # it was reached through its graph
    assert x is not None  # a Conv has an input
    name, was_output = y.name, y.is_graph_output()
    graph.remove(pool)
    graph.insert_before(conv, pool)
    y.replace_all_uses_with(between, replace_graph_outputs=True)
    pool.replace_input_with(0, x)
    conv.replace_input_with(0, y)
    between.shape, between.type, y.shape = y.shape, y.type, None
    if was_output:
        y.name, between.name = between.name, name
    # What the Conv puts out now is what the pooling did: who looks for a module's output finds it there.
    if NAME_SCOPES in pool.metadata_props:
        conv.metadata_props[NAME_SCOPES] = pool.metadata_props.pop(NAME_SCOPES)
