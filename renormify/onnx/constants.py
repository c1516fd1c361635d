"""Constants of an ONNX graph: reading them as float64, storing new ones once each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "ConstantStore",
    "Float64",
    "Refusal",
    "Stored",
    "is_constant",
    "is_standard",
    "read_constant",
    "read_integers",
]

Float64 = npt.NDArray[np.float64]

_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, *_HALVES}


@dataclass(frozen=True)
class Refusal:
    """Why something stays as it is, in words."""

    reason: str


def is_standard(node: ir.Node) -> bool:
    """Tell whether a node is of ONNX's own operators."""
    return node.domain in ("", "ai.onnx")


def is_constant(value: ir.Value) -> bool:
    """Tell whether a value is the same whatever the caller feeds."""
    # An initializer that is an input too gives only a default: the caller may feed another.
    return not value.is_graph_input() and ir.convenience.get_const_tensor(value) is not None


def read_constant(value: ir.Value | None, what: str) -> Float64 | Refusal:
    """Return a constant's values in float64, or why they cannot be relied upon."""
    if value is None:
        return Refusal(f"{what} is missing")
    if value.is_graph_input():
        return Refusal(f"{what} is a graph input")
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return Refusal(f"{what} is computed in the graph, not a constant")
    if tensor.dtype not in _FLOATS:
        return Refusal(f"{what} is of type {tensor.dtype.name}, not a float")
    return np.asarray(tensor.numpy()).astype(np.float64)


def read_integers(node: ir.Node, attribute: str, position: int) -> list[int] | Refusal | None:
    """Return integers that older opsets have in an attribute, newer ones in an input; None where absent."""
    if attribute in node.attributes:
        return [int(i) for i in node.attributes[attribute].as_ints()]
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return None
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None:
        return Refusal(f"the {attribute} of {node.op_type} are computed in the graph")
    return [int(i) for i in np.asarray(tensor.numpy()).reshape(-1)]


@dataclass(frozen=True)
class Stored:
    """A constant in the graph.

    Attributes:
        value: the initializer.
        rounding: the largest error that its type adds, relative to the largest entry of its row (all entries
            of one index on the first axis); None for float32 and float64, whose rounding is no news.
    """

    value: ir.Value
    rounding: float | None


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
        # Nodes get their names here too, and onnxruntime refuses two nodes of one name.
        self._names |= {node.name for graph in model.graphs() for node in graph}
        self._stored: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}

    @property
    def used(self) -> bool:
        """Whether anything has been stored, be it for a fold that came to nothing in the end."""
        return bool(self._stored)

    def name(self, wanted: str) -> str:
        """Return a name that no value and no node of the model bears yet, as near to ``wanted`` as can be."""
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def add(self, array: Float64, dtype: ir.DataType, wanted: str) -> Stored | Refusal:
        """Store ``array``, rounded once to ``dtype``, or say that ``dtype`` cannot hold it."""
        with np.errstate(over="ignore", under="ignore"):
            rounded = np.ascontiguousarray(array).astype(dtype.numpy()).reshape(array.shape)
        back = rounded.astype(np.float64)
        if not np.isfinite(back).all():
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
        return Stored(self._stored[key], _rounding(array, back) if dtype in _HALVES else None)


def _rounding(exact: Float64, stored: Float64) -> float:
    if not exact.size:
        return 0.0
    rows = (exact.shape[0], -1) if exact.ndim > 1 else (1, -1)
    largest = np.abs(exact).reshape(rows).max(axis=1)
    error = np.abs(stored - exact).reshape(rows).max(axis=1)
    return float(np.divide(error, largest, out=np.zeros_like(error), where=largest > 0).max())
