"""Small ONNX graphs: built from parts, run plainly by onnxruntime, and by torch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Arrays = dict[str, np.ndarray]


def batch_norm_parts(name: str, channels: int, rng: np.random.Generator, dtype: Any = np.float32) -> Arrays:
    """Statistics as trained networks have them: scales of both signs, small and large variances."""
    return {
        f"{name}.scale": (rng.normal(1, 0.5, channels) * rng.choice([-1, 1], channels)).astype(dtype),
        f"{name}.bias": rng.normal(0, 1, channels).astype(dtype),
        f"{name}.mean": rng.normal(0, 1, channels).astype(dtype),
        f"{name}.var": np.exp(rng.normal(0, 1, channels)).astype(dtype),
    }


def batch_norm(
    source: str, target: str, name: str, *, node_name: str | None = None, **attributes: Any
) -> onnx.NodeProto:
    inputs = [source, f"{name}.scale", f"{name}.bias", f"{name}.mean", f"{name}.var"]
    return helper.make_node("BatchNormalization", inputs, [target], name=node_name or name, **attributes)


def build(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    constants: Arrays,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    also_inputs: Sequence[str] = (),
    dtype: int = TensorProto.FLOAT,
    output_dtype: int | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """Make a checked model with one input x; ``also_inputs`` names constants that the caller may override."""
    inputs = [helper.make_tensor_value_info("x", dtype, shape)]
    for name in also_inputs:
        inputs.append(helper.make_tensor_value_info(name, dtype, constants[name].shape))
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(name, output_dtype or dtype, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    if functions:
        opsets.append(helper.make_opsetid("local", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=list(functions))
    # The outputs need a shape; the values between are left without, as many files leave them.
    model = onnx.shape_inference.infer_shapes(model)
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


def run_plainly(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """Run a model as it is written: onnxruntime folds nothing itself."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output) for output in session.run(None, {"x": x})]


def run_in_float64(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """Run a model by torch's functions in float64: another implementation, and no rounding to speak of."""
    values: dict[str, Any] = {"": None, "x": torch.from_numpy(x.astype(np.float64))}
    for tensor in model.graph.initializer:
        values[tensor.name] = _float64(tensor)
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            values[node.output[0]] = _float64(attributes["value"])
            continue
        values[node.output[0]] = _OPERATORS[node.op_type](attributes, *[values[name] for name in node.input])
    return [values[output.name].numpy() for output in model.graph.output]


def evaluate_in_float64(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """Run a model by onnx's own reference implementation in float64: any operator that it gets right."""
    doubled = onnx.ModelProto()
    doubled.CopyFrom(model)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for tensor in doubled.graph.initializer:
        if tensor.data_type in floats:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*doubled.graph.input, *doubled.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    outputs = ReferenceEvaluator(doubled).run(None, {"x": x.astype(np.float64)})
    assert all(output.dtype == np.float64 for output in outputs)
    return list(outputs)


def count(model: onnx.ModelProto, op_type: str = "BatchNormalization") -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def _float64(tensor: onnx.TensorProto) -> torch.Tensor:
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor), dtype=np.float64))


def _conv(a: dict[str, Any], x: Any, w: Any, b: Any = None) -> torch.Tensor:
    spatial = w.ndim - 2
    pads = a.get("pads", [0] * 2 * spatial)
    assert pads[:spatial] == pads[spatial:]
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    strides, dilations = tuple(a.get("strides", [1] * spatial)), tuple(a.get("dilations", [1] * spatial))
    return function(x, w, b, strides, tuple(pads[:spatial]), dilations, a.get("group", 1))


def _conv_transpose(a: dict[str, Any], x: Any, w: Any, b: Any = None) -> torch.Tensor:
    spatial = w.ndim - 2
    pads = a.get("pads", [0] * 2 * spatial)
    assert pads[:spatial] == pads[spatial:]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    strides, extra = tuple(a.get("strides", [1] * spatial)), tuple(a.get("output_padding", [0] * spatial))
    return function(x, w, b, strides, tuple(pads[:spatial]), extra, a.get("group", 1))


def _gemm(a: dict[str, Any], x: Any, w: Any, c: Any = None) -> torch.Tensor:
    x = x.T if a.get("transA", 0) else x
    w = w.T if a.get("transB", 0) else w
    y = a.get("alpha", 1.0) * (x @ w)
    return y if c is None else y + a.get("beta", 1.0) * c


def _batch_norm(a: dict[str, Any], x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> torch.Tensor:
    assert not a.get("training_mode", 0)
    to = [1, -1, *[1] * (x.ndim - 2)]
    sigma = torch.sqrt(var + a.get("epsilon", 1e-5))
    return (x - mean.reshape(to)) / sigma.reshape(to) * scale.reshape(to) + bias.reshape(to)


def _window(a: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Kernel, strides and padding of a pooling over images, padded alike on both sides."""
    pads = a.get("pads", [0] * 4)
    assert pads[:2] == pads[2:]
    return tuple(a["kernel_shape"]), tuple(a.get("strides", [1, 1])), tuple(pads[:2])


_OPERATORS: dict[str, Any] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "BatchNormalization": _batch_norm,
    "MatMul": lambda a, x, w: x @ w,
    "Add": lambda a, x, y: x + y,
    "Mul": lambda a, x, y: x * y,
    "Relu": lambda a, x: torch.relu(x),
    "Identity": lambda a, x: x,
    "Concat": lambda a, *xs: torch.cat(xs, dim=a["axis"]),
    "Sub": lambda a, x, y: x - y,
    "Div": lambda a, x, y: x / y,
    "Flatten": lambda a, x: x.flatten(1),
    "MaxPool": lambda a, x: F.max_pool2d(x, *_window(a)),
    "AveragePool": lambda a, x: F.avg_pool2d(
        x, *_window(a), count_include_pad=bool(a.get("count_include_pad", 0))
    ),
    "GlobalAveragePool": lambda a, x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
}
