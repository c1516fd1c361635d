"""What an affine becomes that nothing takes in: three forms of the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from renormify.onnx.affines import vector
from renormify.onnx.constants import ConstantStore, Float64, Refusal
from renormify.onnx.runs import Run

__all__ = ["FORMS", "MERGED", "Rewritten", "rewrite_leftover"]

FORMS = ("auto", "bn", "affine", "conv")
MERGED = "one BatchNormalization"
# Spatial axes at which onnxruntime runs a depthwise Conv in its blocked layout and fuses the ReLU behind it.
# There the Conv takes 0.83 to 0.92 of the time of BatchNormalization, 0.63 to 0.84 of that of Mul and Add.
# At every other rank BatchNormalization is the fastest, at 0.5 to 0.8 of Mul and Add, from 64 rows on.
SPATIAL_AS_CONV = 2
# The types in which onnxruntime has a Conv for the CPU; in float64 it has BatchNormalization alone.
_CONV_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Rewritten:
    """An affine in its new form.

    Attributes:
        nodes: the last of them bears the result.
        form: its name.
        rounding: the largest error of the new constants, as in ``Stored``.
    """

    nodes: tuple[ir.Node, ...]
    form: str
    rounding: float | None


def rewrite_leftover(run: Run, form: str, constants: ConstantStore) -> Rewritten | Refusal:
    """Write an affine in another form.

    Args:
        run: the nodes that compute it; they are left in the graph.
        form: "bn" leaves a BatchNormalization, and takes what follows it directly into it; "affine" is for
            Mul and Add; "conv" for a depthwise 1x1 Conv, which onnxruntime fuses with the activation behind
            it (it needs spatial axes, so rank 2 becomes Mul and Add); "auto" for what runs fastest: the Conv
            on images (rank 4) in float32 and float16, one BatchNormalization elsewhere, also for arithmetic.
        constants: where the new weights go.

    Returns:
        The new nodes, or why they stay as they are.
    """
    x, affine = run.x, run.affine
    dtype = x.dtype or run.nodes[-1].outputs[0].dtype
    if dtype is None:
        return Refusal("the type of its input is not known")
    spatial = affine.scale.ndim - 2
    channels = max(affine.scale.size, affine.shift.size)
    per_channel = affine.varying <= {1} and (bool(run.norms) or 1 in affine.varying)
    base = run.nodes[0].name or run.nodes[-1].outputs[0].name or "affine"
    fastest = form
    if form == "auto":
        as_conv = spatial == SPATIAL_AS_CONV and dtype in _CONV_TYPES
        fastest = "conv" if as_conv else "bn" if per_channel else "affine"
    if len(run.nodes) == 1 and (not run.norms or fastest == "bn"):
        return Refusal("" if run.norms else "one node is the least it can be")
    if fastest == "bn":
        if not run.norms and form == "bn":
            return Refusal("")
        return _as_batch_norm(run, channels, dtype, base, constants)
    if fastest == "conv" and spatial > 0 and per_channel:
        return _as_conv(run, channels, dtype, base, constants)
    if len(run.nodes) <= 2 and not run.norms:
        return Refusal("two nodes are the least it can be")
    return _as_arithmetic(run, dtype, base, constants)


def _as_conv(
    run: Run, channels: int, dtype: ir.DataType, base: str, constants: ConstantStore
) -> Rewritten | Refusal:
    """``y[c] = s[c] x[c] + t[c]`` is a Conv of one position in as many groups as channels."""
    scale, shift = _vectors(run, channels)
    spatial = [1] * (run.affine.scale.ndim - 2)
    stored = _store({"weight": scale.reshape(-1, 1, *spatial), "bias": shift}, dtype, base, constants)
    if isinstance(stored, Refusal):
        return stored
    values, rounding = stored
    conv = ir.node("Conv", [run.x, *values], {"group": channels}, name=constants.name(f"{base}_conv"))
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", spatial)
    return Rewritten((conv,), "a depthwise 1x1 Conv", rounding)


def _as_arithmetic(run: Run, dtype: ir.DataType, base: str, constants: ConstantStore) -> Rewritten | Refusal:
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
    values, rounding = stored
    nodes: list[ir.Node] = []
    x = run.x
    for op_type, value in zip([{"scale": "Mul", "shift": "Add"}[key] for key in short], values, strict=True):
        node = ir.node(op_type, [x, value], name=constants.name(f"{base}_{op_type.lower()}"))
        x = node.outputs[0]
        x.name, x.shape, x.type = constants.name(f"{base}_{op_type.lower()}ed"), y.shape, y.type
        nodes.append(node)
    return Rewritten(tuple(nodes), " and ".join(node.op_type for node in nodes), rounding)


def _as_batch_norm(
    run: Run, channels: int, dtype: ir.DataType, base: str, constants: ConstantStore
) -> Rewritten | Refusal:
    """One BatchNormalization of mean 0 and variance 1 for several nodes: ``gamma = s``, ``beta = t``."""
    scale, shift = _vectors(run, channels)
    arrays = {"scale": scale, "bias": shift, "mean": np.zeros(channels), "var": np.ones(channels)}
    stored = _store(arrays, dtype, f"{base}.merged", constants)
    if isinstance(stored, Refusal):
        return stored
    values, rounding = stored
    norm = ir.node("BatchNormalization", [run.x, *values], name=constants.name(f"{base}_merged"))
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
    return Rewritten((norm,), MERGED, rounding)


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
) -> tuple[list[ir.Value], float | None] | Refusal:
    values, roundings = [], []
    for key, array in arrays.items():
        stored = constants.add(array, dtype, f"{base}.{key}")
        if isinstance(stored, Refusal):
            return stored
        values.append(stored.value)
        if stored.rounding is not None:
            roundings.append(stored.rounding)
    return values, max(roundings, default=None)
