"""What a BatchNormalization becomes that no operator before it can take: three forms of one affine."""

from __future__ import annotations

import onnx_ir as ir

from renormify.onnx.constants import ConstantStore
from renormify.onnx.patterns import Affine, Refusal

__all__ = ["FORMS", "rewrite_leftover"]

FORMS = ("auto", "bn", "affine", "conv")
# Spatial axes at which onnxruntime runs a depthwise Conv in its blocked layout and fuses the ReLU behind it.
# At three, the one measurement on record has the Conv a little ahead (171 ms, Mul and Add 183 ms); at one
# there is none. In both, "auto" writes the plainer form.
SPATIAL_AS_CONV = 2


def rewrite_leftover(
    node: ir.Node, affine: Affine, form: str, constants: ConstantStore
) -> tuple[list[ir.Node], str] | Refusal:
    """Write a BatchNormalization in another form.

    Args:
        node: the BatchNormalization; it is left in the graph.
        affine: what it computes.
        form: "affine" for Mul and Add; "conv" for a depthwise 1x1 Conv, which onnxruntime fuses with the
            activation behind it; "auto" for the Conv on images (rank 4), Mul and Add elsewhere. A Conv needs
            spatial axes, so rank 2 becomes Mul and Add under every form.
        constants: where the new weights go.

    Returns:
        The new nodes, the last of which bears the result, and the form's name; or why there are none.
    """
    x, y = node.inputs[0], node.outputs[0]
    shape = x.shape if x is not None and x.shape is not None else y.shape
    if x is None or shape is None:
        return Refusal("the rank of its input is not known")
    dtype = x.dtype or y.dtype
    if dtype is None:
        return Refusal("the type of its input is not known")
    spatial = len(shape) - 2
    if spatial < 0:
        return Refusal("its input has no channel axis")
    base = node.name or y.name or "batch_norm"
    if spatial > 0 and (form == "conv" or (form == "auto" and spatial == SPATIAL_AS_CONV)):
        weight = constants.add(affine.scale.reshape(-1, 1, *[1] * spatial), dtype, f"{base}.weight")
        bias = constants.add(affine.shift, dtype, f"{base}.bias")
        if isinstance(weight, Refusal):
            return weight
        if isinstance(bias, Refusal):
            return bias
        conv = ir.node("Conv", [x, weight, bias], {"group": affine.scale.size}, name=f"{base}_conv")
        conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [1] * spatial)
        return [conv], "a depthwise 1x1 Conv"
    scale = constants.add(affine.scale.reshape(-1, *[1] * spatial), dtype, f"{base}.scale")
    shift = constants.add(affine.shift.reshape(-1, *[1] * spatial), dtype, f"{base}.shift")
    if isinstance(scale, Refusal):
        return scale
    if isinstance(shift, Refusal):
        return shift
    mul = ir.node("Mul", [x, scale], name=f"{base}_mul")
    mul.outputs[0].name = constants.name(f"{base}_scaled")
    mul.outputs[0].shape, mul.outputs[0].type = y.shape, y.type
    return [mul, ir.node("Add", [mul.outputs[0], shift], name=f"{base}_add")], "Mul and Add"
