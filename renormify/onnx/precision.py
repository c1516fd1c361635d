"""How exact a runtime's own kernels are, measured on the operator by itself.

Sigmoid and Tanh are approximated to the precision of 1, whatever their value: onnxruntime's Sigmoid is off by
an ulp of 1 also where it is 1e-6, torch's by one of its value. That is no fault of a file. So where one of
them makes an output, its error on a grid of inputs is granted on top of the noise, for the runtime that ran.
A fault of the kernel itself, as a wrong result is not one of the file, goes unseen up to that error. SiLU, x
times Sigmoid of x, has that error x times: at -12, where it is -7e-5, onnxruntime has two digits right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from renormify.onnx.runtimes import RUNTIMES

__all__ = ["granted", "kernel_error", "makers"]

_BOUNDED: dict[str, Callable[[Tensor], Tensor]] = {"Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
# They move elements and change none.
_MOVES = {"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
# A kernel that is off by more than a few ulps of 1 is wrong, and nothing is granted for it.
_LARGEST = 4 * 2.0**-23


# SiLU has its minimum at -1.2785; below it falls to 0, and in float32 is 0 before -104.
_BELOW = np.linspace(-1.2785, -104.0, 20001)
_SILU = _BELOW / (1.0 + np.exp(-_BELOW))


def granted(runtime: str, operator: str, truth: Tensor) -> Tensor:
    """Return what each element may be off by for the sake of the kernel that makes it.

    Args:
        runtime: the name of a runtime.
        operator: its kind, "Silu" for the product of a value and its Sigmoid.
        truth: what it should make.
    """
    truth = truth.double()
    if operator != "Silu":
        return torch.full_like(truth, kernel_error(runtime, operator))
    # The larger of the two x that have this SiLU; above 0 there is one, larger by what the minimum is deep.
    x = np.where(truth < 0.0, -np.interp(truth.numpy(), _SILU, _BELOW), truth.numpy() - _SILU[0])
    return kernel_error(runtime, "Sigmoid") * torch.from_numpy(x)


@cache
def kernel_error(runtime: str, operator: str) -> float:
    """Return the largest absolute error of a bounded operator in float32; 0.0 for every other operator.

    Args:
        runtime: the name of a runtime.
        operator: the operator's kind, "Sigmoid" say.
    """
    if operator not in _BOUNDED:
        return 0.0
    shape = ["n"]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        "kernel",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )
    # An odd number, since the last few are computed by another loop than the vectors before.
    x = np.linspace(-20.0, 20.0, 20001, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        (y,) = RUNTIMES[runtime](path).run([x])
    truth = _BOUNDED[operator](torch.from_numpy(x).double())
    error = float((torch.from_numpy(y).double() - truth).abs().max())
    return error if error <= _LARGEST else 0.0


def makers(graph: onnx.GraphProto) -> dict[str, str]:
    """Return for each value of a graph the kind of the operator that made its elements."""
    made: dict[str, str] = {}
    sigmoids: dict[str, str] = {}
    for node in graph.node:
        kind = "Silu" if node.op_type == "Swish" else node.op_type
        if kind in _MOVES and node.input and node.input[0] in made:
            kind = made[node.input[0]]
        if kind == "Mul" and any(sigmoids.get(a) == b for a, b in (node.input, reversed(node.input))):
            kind = "Silu"
        for output in node.output:
            made[output] = kind
            if kind == "Sigmoid":
                sigmoids[output] = node.input[0]
    return made
