"""What goes into another order, where that is the same and costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from onnx_graphs import build, evaluate_in_float64, run_plainly
from torch import nn

from renormify.onnx import export_onnx, verify_onnx
from renormify.onnx.reordering import average_whole, join_concats, pool_first, rectify_first, reorder

node = helper.make_node
HALF = {"kernel_shape": [2, 2], "strides": [2, 2]}


def graph(
    *,
    kernel: int = 1,
    conv: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    both: bool = False,
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(0, 1, (3, 4, kernel, kernel)).astype(np.float32)}
    constants["b"] = rng.normal(0, 1, 3).astype(np.float32)
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Conv", ["r", "w", "b"], ["c"], **(conv or {})),
        node("AveragePool", ["c"], ["y"], **(pool or HALF)),
    ]
    return build(nodes, ("n", 4, 7, 7), constants, outputs=["y", "c"] if both else ["y"])


@pytest.mark.parametrize("pool", [HALF, {"kernel_shape": [3, 3], "strides": [1, 2], "auto_pad": "VALID"}])
def test_it_goes_first_and_computes_the_same(pool: dict[str, Any]) -> None:
    before = graph(pool=pool)
    model = ir.from_proto(before)
    assert pool_first(model) == 1
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == ["Relu", "AveragePool", "Conv"]
    assert [value.name for value in after.graph.output] == ["y"]
    x = np.random.default_rng(1).normal(0, 1, (2, 4, 7, 7)).astype(np.float32)
    (truth,), (plain,), (output,) = (
        evaluate_in_float64(before, x),
        run_plainly(before, x),
        run_plainly(after, x),
    )
    rounding = 4 * np.finfo(np.float32).eps * np.abs(truth).max()
    assert np.abs(output - truth).max() <= np.abs(plain - truth).max() + rounding


@pytest.mark.parametrize(
    "case",
    [
        {"kernel": 3},
        {"conv": {"strides": [2, 2]}},
        {"conv": {"pads": [1] * 4}},
        {"conv": {"auto_pad": "SAME_UPPER"}},
        {"pool": {"kernel_shape": [2, 2]}},
        {"pool": {**HALF, "pads": [1] * 4}},
        {"pool": {**HALF, "ceil_mode": 1}},
        {"pool": {**HALF, "auto_pad": "SAME_LOWER"}},
        {"both": True},
    ],
)
def test_it_stays_where_that_is_another_thing_or_no_gain(case: dict[str, Any]) -> None:
    before = graph(**case)
    model = ir.from_proto(before)
    assert pool_first(model) == 0
    assert [n.op_type for n in model.graph] == ["Relu", "Conv", "AveragePool"]


@pytest.mark.parametrize(("axis", "both", "joined"), [(1, False, 2), (-1, False, 0), (1, True, 1)])
def test_concats_of_concats_are_joined(axis: int, both: bool, joined: int) -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Concat", ["x", "r"], ["a"], axis=1),
        node("Concat", ["r", "x"], ["b"], axis=axis),
        node("Concat", ["a", "b", "r"] if axis == 1 else ["b", "b"], ["y"], axis=1),
    ]
    before = build(nodes, ("n", 4, 2, 2), {}, outputs=["y", "a"] if both or axis != 1 else ["y"])
    model = ir.from_proto(before)
    assert join_concats(model) == joined
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(1).normal(0, 1, (2, 4, 2, 2)).astype(np.float32)
    for expected, output in zip(run_plainly(before, x), run_plainly(after, x), strict=True):
        np.testing.assert_array_equal(output, expected)


def test_a_transition_of_densenet_is_exported_so(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.AvgPool2d(2), nn.Conv2d(3, 2, 3)
    ).eval()
    model[0].running_mean.normal_()  # without a shift it would fold
    x = torch.randn(2, 4, 8, 8)
    export_onnx(model, x, tmp_path / "m.onnx")
    operators = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators == ["Conv", "Relu", "AveragePool", "Conv", "Conv"]
    assert verify_onnx(model, tmp_path / "m.onnx", x).passed
    export_onnx(model, x, tmp_path / "plain.onnx", fold=False)
    operators = [n.op_type for n in onnx.load(tmp_path / "plain.onnx").graph.node]
    assert operators == ["BatchNormalization", "Relu", "Conv", "AveragePool", "Conv"]


def pooled(*, outputs: tuple[str, ...] = (), conv: bool = True) -> onnx.ModelProto:
    """Conv, or nothing, MaxPool and Relu; ``outputs`` beside the last."""
    weight = np.random.default_rng(0).normal(0, 1, (3, 4, 3, 3)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w"], ["c"]) if conv else node("Identity", ["x"], ["c"]),
        node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], pads=[1, 1, 0, 0]),
        node("Relu", ["p"], ["y"]),
    ]
    return build(nodes, ("n", 4, 7, 7), {"w": weight}, outputs=["y", *outputs])


def test_a_relu_goes_before_the_max_pooling_that_parts_it_from_a_conv() -> None:
    before = pooled()
    model = ir.from_proto(before)
    assert rectify_first(model) == 1
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == ["Conv", "Relu", "MaxPool"]
    x = np.random.default_rng(1).normal(0, 1, (2, 4, 7, 7)).astype(np.float32)
    np.testing.assert_array_equal(run_plainly(after, x)[0], run_plainly(before, x)[0])


@pytest.mark.parametrize("more", [{"outputs": ("c",)}, {"outputs": ("p",)}, {"conv": False}])
def test_a_relu_stays_where_that_is_another_thing_or_no_gain(more: dict[str, Any]) -> None:
    assert rectify_first(ir.from_proto(pooled(**more))) == 0


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize(("opset", "axes"), [(17, [2, 3]), (20, [-1, -2])])
def test_a_mean_of_an_image_is_pooled(opset: int, axes: list[int], keepdims: int) -> None:
    parts = {"axes": np.array(axes)} if opset > 17 else {}
    old = {"keepdims": keepdims} if parts else {"keepdims": keepdims, "axes": axes}
    nodes = [node("Relu", ["x"], ["r"]), node("ReduceMean", ["r", *parts], ["y"], name="mean", **old)]
    before = build(nodes, ("n", 4, 7, 7), parts, opset=opset)
    model = ir.passes.common.ShapeInferencePass()(ir.from_proto(before)).model
    reorder(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == [
        "Relu",
        "GlobalAveragePool",
        *([] if keepdims else ["Flatten"]),
    ]
    assert not after.graph.initializer
    x = np.random.default_rng(1).normal(0, 1, (2, 4, 7, 7)).astype(np.float32)
    (truth,), (output,) = evaluate_in_float64(before, x), run_plainly(after, x)
    np.testing.assert_allclose(output, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("axes", "shape", "dtype"),
    [
        ([2], (2, 4, 7, 7), 1),
        ([1, 2], (2, 4, 7), 1),
        ([2, 3], (2, 4, 7, 7, 7), 1),
        ([2, 3], (2, 4, 7, 7), 11),
    ],
)
def test_other_means_stay(axes: list[int], shape: tuple[int, ...], dtype: int) -> None:
    nodes = [node("ReduceMean", ["x", "axes"], ["y"])]
    model = build(nodes, shape, {"axes": np.array(axes)}, dtype=dtype)
    assert average_whole(ir.from_proto(model)) == 0


def test_a_norm_through_max_pooling_leaves_no_relu_alone(tmp_path: Path) -> None:
    """As in a ResNet-v2's stem: what the runtime fuses is a Relu right behind a Conv."""
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 12, 12)
    path = export_onnx(stem, x, tmp_path / "m.onnx").path
    assert [n.op_type for n in onnx.load(path).graph.node] == ["Conv", "Relu", "MaxPool", "Conv"]
    assert verify_onnx(stem, path, x, layers=True).passed
