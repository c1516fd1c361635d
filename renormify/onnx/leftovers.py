"""What an affine becomes that nothing takes in: three forms of the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from renormify.onnx.affines import vector
from renormify.onnx.constants import ConstantStore, Float64, Refusal
from renormify.onnx.runs import Run

__all__ = ["FORMS", "rewrite_leftover"]

FORMS = ("auto", "bn", "affine", "conv")
# Spatial axes at which onnxruntime runs a depthwise Conv in its blocked layout and fuses the ReLU behind it.
# At three, the one measurement on record has the Conv a little ahead (171 ms, Mul and Add 183 ms); at one
# there is none. In both, "auto" writes the plainer form.
SPATIAL_AS_CONV = 2


def rewrite_leftover(run: Run, form: str, constants: ConstantStore) -> tuple[list[ir.Node], str] | Refusal:
    """Write an affine in another form.

    Args:
        run: the nodes that compute it; they are left in the graph.
        form: "bn" for one BatchNormalization; "affine" for Mul and Add; "conv" for a depthwise 1x1 Conv,
            which onnxruntime fuses with the activation behind it; "auto" for the Conv on images (rank 4), Mul
            and Add elsewhere. A Conv needs spatial axes, so rank 2 becomes Mul and Add under "conv" too.
        constants: where the new weights go.

    Returns:
        The new nodes, the last of which bears the result, and the form's name; or why they stay as they are.
    """
    x, affine = run.x, run.affine
    dtype = x.dtype or run.nodes[-1].outputs[0].dtype
    if dtype is None:
        return Refusal("the type of its input is not known")
    rank = affine.scale.ndim
    channels = max(affine.scale.size, affine.shift.size)
    per_channel = affine.varying <= {1} and (bool(run.norms) or 1 in affine.varying)
    base = run.nodes[0].name or run.nodes[-1].outputs[0].name or "affine"
    if form == "bn":
        if len(run.nodes) == 1 or not run.norms or not per_channel:
            return Refusal("")
        return _as_batch_norm(run, channels, base, constants)
    spatial = rank - 2
    wanted = form == "conv" or (form == "auto" and spatial == SPATIAL_AS_CONV)
    if len(run.nodes) == 1 and not run.norms:
        return Refusal("one node is the least it can be")
    if spatial > 0 and per_channel and wanted:
        return _as_conv(run, channels, dtype, base, constants)
    if len(run.nodes) <= 2 and not run.norms:
        return Refusal("two nodes are the least it can be")
    return _as_arithmetic(run, dtype, base, constants)


def _as_conv(
    run: Run, channels: int, dtype: ir.DataType, base: str, constants: ConstantStore
) -> tuple[list[ir.Node], str] | Refusal:
    """``y[c] = s[c] x[c] + t[c]`` is a Conv of one position in as many groups as channels."""
    scale, shift = _vectors(run, channels)
    spatial = [1] * (run.affine.scale.ndim - 2)
    stored = _store({"weight": scale.reshape(-1, 1, *spatial), "bias": shift}, dtype, base, constants)
    if isinstance(stored, Refusal):
        return stored
    conv = ir.node("Conv", [run.x, *stored], {"group": channels}, name=constants.name(f"{base}_conv"))
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", spatial)
    return [conv], "a depthwise 1x1 Conv"


def _as_arithmetic(
    run: Run, dtype: ir.DataType, base: str, constants: ConstantStore
) -> tuple[list[ir.Node], str] | Refusal:
    """Mul and Add; one of them where the other would do nothing."""
    affine, y = run.affine, run.nodes[-1].outputs[0]
    # A constant may leave out axes of size 1 in front, and runtimes like it short.
    short = {"scale": _short(affine.scale), "shift": _short(affine.shift)}
    if not affine.shifts:
        del short["shift"]
    if (affine.scale == 1.0).all() and affine.shifts:
        del short["scale"]
    stored = _store(short, dtype, base, constants)
    if isinstance(stored, Refusal):
        return stored
    nodes: list[ir.Node] = []
    x = run.x
    for op_type, value in zip([{"scale": "Mul", "shift": "Add"}[key] for key in short], stored, strict=True):
        node = ir.node(op_type, [x, value], name=constants.name(f"{base}_{op_type.lower()}"))
        x = node.outputs[0]
        x.name, x.shape, x.type = constants.name(f"{base}_{op_type.lower()}ed"), y.shape, y.type
        nodes.append(node)
    return nodes, " and ".join(node.op_type for node in nodes)


def _as_batch_norm(
    run: Run, channels: int, base: str, constants: ConstantStore
) -> tuple[list[ir.Node], str] | Refusal:
    """One BatchNormalization of mean 0 and variance 1 for several nodes: ``gamma = s``, ``beta = t``."""
    scale, shift = _vectors(run, channels)
    arrays = {"scale": scale, "bias": shift, "mean": np.zeros(channels), "var": np.ones(channels)}
    nodes = []
    old = run.norms[0]
    for position, (key, array) in enumerate(arrays.items(), start=1):
        parameter = old.inputs[position]
        tensor = None if parameter is None else ir.convenience.get_const_tensor(parameter)
        assert tensor is not None  # it has been read
        stored = constants.add(array, tensor.dtype, f"{base}.{key}.merged")
        if isinstance(stored, Refusal):
            return stored
        nodes.append(stored.value)
    norm = ir.node("BatchNormalization", [run.x, *nodes], name=constants.name(f"{base}_merged"))
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
    return [norm], "one BatchNormalization"


def _vectors(run: Run, channels: int) -> tuple[Float64, Float64]:
    scale, shift = (vector(array, 1, channels) for array in (run.affine.scale, run.affine.shift))
    assert scale is not None  # the caller has seen that it acts on channels
    assert shift is not None
    return scale, shift


def _short(array: Float64) -> Float64:
    keep = next((axis for axis, size in enumerate(array.shape) if size > 1), array.ndim)
    return array.reshape(array.shape[keep:])


def _store(
    arrays: dict[str, Float64], dtype: ir.DataType, base: str, constants: ConstantStore
) -> list[ir.Value] | Refusal:
    values = []
    for key, array in arrays.items():
        stored = constants.add(array, dtype, f"{base}.{key}")
        if isinstance(stored, Refusal):
            return stored
        values.append(stored.value)
    return values
