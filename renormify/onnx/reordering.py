"""What computes the same in another order, or by another operator, and costs less.

Average pooling before a pointwise Conv: ``pool(W x + b) = W pool(x) + b`` for a Conv of one position and
windows whose weights sum to 1, as both are sums, one over channels and one over positions. DenseNet's
transitions have them in the costly order. And Concat of a Concat, as in Inception, copies its parts twice.

Two more for onnxruntime's blocked layout of images. ReduceMean makes it leave that layout, and
GlobalAveragePool does not. And ``relu(max(x)) = max(relu(x))``: right behind a Conv a Relu costs nothing, and
a norm that folds through max pooling leaves it behind the pooling.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir
from onnx_ir.passes import common as passes

from renormify.onnx.constants import Refusal, is_standard, read_integers
from renormify.onnx.surgery import NAME_SCOPES

__all__ = ["average_whole", "join_concats", "pool_first", "rectify_first", "reorder"]

# onnxruntime has no GlobalAveragePool in float64.
_AVERAGED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def reorder(model: ir.Model) -> None:
    """Write all that this module knows of in the cheaper way, in place."""
    pool_first(model)
    rectify_first(model)
    join_concats(model)
    if average_whole(model):
        passes.RemoveUnusedNodesPass()(model)  # the axes


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


def rectify_first(model: ir.Model) -> int:
    """Put each Relu before the MaxPool that parts it from a Conv, in place; return how many."""
    pairs = [
        (pool, relu)
        for relu in model.graph.all_nodes()
        if relu.op_type == "Relu"
        and (pool := _alone_before(relu, "MaxPool")) is not None
        and not any(output.name for output in pool.outputs[1:])
        and _alone_before(pool, "Conv") is not None
    ]
    for pool, relu in pairs:
        _exchange(pool, relu)
    return len(pairs)


def average_whole(model: ir.Model) -> int:
    """Write each mean over all positions of an image as GlobalAveragePool, in place; return how many."""
    means = [node for node in model.graph.all_nodes() if _averages_images(node)]
    for mean in means:
        graph, y = mean.graph, mean.outputs[0]
        assert graph is not None  # it was reached through its graph
        nodes = [ir.node("GlobalAveragePool", mean.inputs[:1], name=mean.name)]
        if not mean.attributes.get_int("keepdims", 1):
            pooled = nodes[0].outputs[0]
            pooled.name, pooled.type = f"{y.name}_pooled", y.type
            nodes.append(ir.node("Flatten", [pooled], name=f"{mean.name}_flattened"))
        nodes[-1].metadata_props.update(mean.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, mean, [mean], nodes, [y], nodes[-1].outputs)
    return len(means)


def _averages_images(node: ir.Node) -> bool:
    x = node.inputs[0] if node.op_type == "ReduceMean" and is_standard(node) else None
    if x is None or x.shape is None or len(x.shape) != 4 or x.dtype not in _AVERAGED:
        return False
    axes = read_integers(node, "axes", 1)
    return axes is not None and not isinstance(axes, Refusal) and {axis % 4 for axis in axes} == {2, 3}


def _alone_before(node: ir.Node, op_type: str) -> ir.Node | None:
    """Return the node that makes a node's input, if it is of that kind and makes it for nothing else."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if (
        value is None
        or producer is None
        or producer.op_type != op_type
        or not (is_standard(producer) and is_standard(node))
        or producer.graph is not node.graph
        or len(value.uses()) != 1
        or value.is_graph_output()
    ):
        return None
    return producer


def _pointwise_before(pool: ir.Node) -> ir.Node | None:
    conv = _alone_before(pool, "Conv") if pool.op_type == "AveragePool" else None
    weight = None if conv is None else conv.inputs[1]
    if conv is None or weight is None or weight.shape is None:
        return None
    attributes = conv.attributes
    plain = (
        all(size == 1 for size in list(weight.shape)[2:])
        and not any(attributes.get_ints("pads", ()))
        and all(step == 1 for step in attributes.get_ints("strides", ()))
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )
    return conv if plain else None


def _averages_fewer(pool: ir.Node) -> bool:
    """Tell whether there are fewer windows than positions, and each is a mean of positions that are there."""
    attributes = pool.attributes
    return (
        prod(attributes.get_ints("strides", ())) > 1
        and not any(attributes.get_ints("pads", ()))
        and not attributes.get_int("ceil_mode", 0)
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _exchange(first: ir.Node, second: ir.Node) -> None:
    """Let ``second``, which alone uses ``first``, come before it."""
    graph, x, between, y = second.graph, first.inputs[0], first.outputs[0], second.outputs[0]
    assert graph is not None  # it was reached through its graph
    assert x is not None  # the first has an input
    name, was_output = y.name, y.is_graph_output()
    graph.remove(second)
    graph.insert_before(first, second)
    y.replace_all_uses_with(between, replace_graph_outputs=True)
    second.replace_input_with(0, x)
    first.replace_input_with(0, y)
    between.shape, between.type, y.shape = y.shape, y.type, None
    if was_output:
        y.name, between.name = between.name, name
    # What the first puts out now is what the second did: who looks for a module's output finds it there.
    if NAME_SCOPES in second.metadata_props:
        first.metadata_props[NAME_SCOPES] = second.metadata_props.pop(NAME_SCOPES)
