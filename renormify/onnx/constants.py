"""Constants of an ONNX graph: reading them as float64, storing new ones once each."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from renormify.onnx.patterns import Float64, Refusal

__all__ = ["ConstantStore", "read_constant"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def read_constant(value: ir.Value | None, what: str) -> Float64 | Refusal:
    """Return a constant's values in float64, or why they cannot be relied upon."""
    if value is None:
        return Refusal(f"{what} is missing")
    if value.is_graph_input():
        # Also where an initializer gives its default: the caller may feed another.
        return Refusal(f"{what} is a graph input")
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return Refusal(f"{what} is computed in the graph, not a constant")
    if tensor.dtype not in _FLOATS:
        return Refusal(f"{what} is of type {tensor.dtype.name}, not a float")
    return np.asarray(tensor.numpy()).astype(np.float64)


class ConstantStore:
    """Adds initializers to the main graph; equal contents are stored once.

    Args:
        model: the model whose main graph takes the initializers.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = {
            value.name
            for graph in model.graphs()
            for value in (
                *graph.inputs,
                *graph.initializers.values(),
                *(output for node in graph for output in node.outputs),
            )
        }
        self._stored: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}

    def name(self, wanted: str) -> str:
        """Return a name that no value of the model bears yet, as near to ``wanted`` as can be."""
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def add(self, array: Float64, dtype: ir.DataType, wanted: str) -> ir.Value | Refusal:
        """Store ``array``, rounded once to ``dtype``, or say that ``dtype`` cannot hold it."""
        with np.errstate(over="ignore"):
            rounded = array.astype(dtype.numpy())
        if not np.isfinite(rounded.astype(np.float64)).all():
            return Refusal(f"what it would be folded into is not finite in {dtype.name}")
        key = (dtype, rounded.shape, hashlib.sha256(rounded.tobytes()).digest())
        if key not in self._stored:
            name = self.name(wanted)
            value = ir.Value(
                name=name,
                shape=ir.Shape(rounded.shape),
                type=ir.TensorType(dtype),
                const_value=ir.tensor(rounded, dtype=dtype, name=name),
            )
            self._graph.register_initializer(value)
            self._stored[key] = value
        return self._stored[key]
