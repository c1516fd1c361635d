"""What folding stores: shared weights, half precision, other forms, subgraphs, files of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import batch_norm, batch_norm_parts, build, count, evaluate_in_float64, run_plainly

from renormify.onnx import files, fold_onnx

node = helper.make_node
IMAGE = ("n", 4, 6, 6)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return rng(seed).normal(0, 1, shape).astype(np.float32)


def check_close(model: onnx.ModelProto, folded: onnx.ModelProto, x: np.ndarray) -> None:
    for before, after in zip(run_plainly(model, x), run_plainly(folded, x), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_shared_weight_is_copied_for_the_norm_alone_and_its_size_is_told() -> None:
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    nodes = [
        node("Conv", ["x", "w"], ["v"], name="first"),
        batch_norm("v", "a", "bn"),
        node("Conv", ["x", "w"], ["b"], name="second"),
        node("Mul", ["a", "b"], ["y"]),
    ]
    model = build(nodes, IMAGE, constants)
    fold = fold_onnx(model)
    assert fold.copied == fold.sites[0].copied == 4 * 4 * 3 * 3 * 4
    assert fold.to_dict()["copied"] == fold.copied
    assert fold.sites[0].into == "Conv first"
    check_close(model, fold.model, normal(2, 4, 6, 6))


def test_a_weight_that_every_user_folds_alike_is_stored_once_and_costs_nothing() -> None:
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    nodes = []
    for which in "ab":
        nodes.append(node("Conv", ["x", "w"], [f"v{which}"], name=which))
        nodes.append(batch_norm(f"v{which}", which, "bn", node_name=f"norm_{which}"))
    nodes.append(node("Mul", ["a", "b"], ["y"]))
    model = build(nodes, IMAGE, constants)
    fold = fold_onnx(model)
    assert len([t for t in fold.model.graph.initializer if len(t.dims) == 4]) == 1
    assert {site.action for site in fold.sites} == {"folded"}
    check_close(model, fold.model, normal(2, 4, 6, 6))


@pytest.mark.parametrize(
    ("dtype", "code", "unit"),
    [
        (np.float16, TensorProto.FLOAT16, 2.0**-11),
        (ml_dtypes.bfloat16, TensorProto.BFLOAT16, 2.0**-8),
        (np.float32, TensorProto.FLOAT, None),
    ],
)
@pytest.mark.parametrize("forward", [False, True])
def test_half_precision_folds_in_float64_and_tells_what_it_adds(
    dtype: Any, code: int, unit: float | None, forward: bool
) -> None:
    parts = {"w": normal(4, 4, 3, 3), "b": normal(4), **batch_norm_parts("bn", 4, rng())}
    constants = {name: array.astype(dtype) for name, array in parts.items()}
    nodes = [node("Conv", ["x", "w", "b"], ["v"]), batch_norm("v", "y", "bn")]
    if forward:
        nodes = [batch_norm("x", "v", "bn"), node("Conv", ["v", "w", "b"], ["y"])]
    model = build(nodes, IMAGE, constants, dtype=code)
    fold = fold_onnx(model)
    (site,) = fold.sites
    assert site.action == "folded"
    assert {tensor.data_type for tensor in fold.model.graph.initializer} == {code}
    if unit is None:
        assert site.rounding is None
        return
    assert site.rounding is not None
    # One rounding of each weight, and the largest of a row by up to half a unit in the last place.
    assert 0 < site.rounding <= unit
    x = normal(2, 4, 6, 6)
    for truth, after in zip(evaluate_in_float64(model, x), evaluate_in_float64(fold.model, x), strict=True):
        assert np.abs(after - truth).max() <= 8 * unit * np.abs(truth).max()


def test_weights_that_half_precision_cannot_tell_from_zero_show_in_the_rounding() -> None:
    constants = {"w": normal(4, 4, 3, 3).astype(np.float16), **batch_norm_parts("bn", 4, rng(), np.float16)}
    constants["bn.scale"][2] = 1e-7
    model = build([node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")], IMAGE, constants, dtype=10)
    (site,) = fold_onnx(model).sites
    assert site.rounding is not None
    assert site.rounding > 0.01


@pytest.mark.parametrize("op_type", ["Loop", "If"])
@pytest.mark.parametrize("forward", [False, True])
def test_inside_subgraphs(op_type: str, forward: bool) -> None:
    constants = {"w": normal(4, 4, 1, 1), **batch_norm_parts("bn", 4, rng())}
    info = helper.make_tensor_value_info
    inner = "state" if op_type == "Loop" else "x"
    pair = [node("Conv", [inner, "w"], ["m"]), batch_norm("m", "out", "bn")]
    if forward:
        pair = [batch_norm(inner, "m", "bn"), node("Conv", ["m", "w"], ["out"])]
    image = [2, 4, 6, 6]
    if op_type == "Loop":
        inputs = [
            info("i", TensorProto.INT64, []),
            info("on", TensorProto.BOOL, []),
            info("state", TensorProto.FLOAT, image),
        ]
        outputs = [info("still", TensorProto.BOOL, []), info("out", TensorProto.FLOAT, image)]
        body = helper.make_graph([node("Identity", ["on"], ["still"]), *pair], "body", inputs, outputs)
        constants |= {"trips": np.array(3, np.int64), "go": np.array(True), "image": np.array(image)}
        # What a loop carries may change its shape, so its result has none that is known.
        nodes = [node("Loop", ["trips", "go", "x"], ["l"], body=body), node("Reshape", ["l", "image"], ["y"])]
    else:
        then = helper.make_graph(pair, "then", [], [info("out", TensorProto.FLOAT, image)])
        other = helper.make_graph(
            [node("Relu", ["x"], ["e"])], "e", [], [info("e", TensorProto.FLOAT, image)]
        )
        constants |= {"go": np.array(True)}
        nodes = [node("If", ["go"], ["y"], then_branch=then, else_branch=other)]
    model = build(nodes, image, constants)
    fold = fold_onnx(model, leftover="bn")
    assert [site.action for site in fold.sites] == ["folded"]
    onnx.checker.check_model(fold.model, full_check=True)
    check_close(model, fold.model, normal(*image))


def test_what_a_subgraph_uses_is_not_folded_into_it() -> None:
    constants = {"w": normal(4, 4, 1, 1), "go": np.array(True), **batch_norm_parts("bn", 4, rng())}
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ce"]
    then = helper.make_graph([node("Conv", ["n", "w"], ["c"])], "then", [], out[:1])
    other = helper.make_graph([node("Relu", ["n"], ["e"])], "else", [], out[1:])
    nodes = [batch_norm("x", "n", "bn"), node("If", ["go"], ["y"], then_branch=then, else_branch=other)]
    (site,) = fold_onnx(build(nodes, IMAGE, constants), leftover="bn").sites
    assert site.action == "kept"
    assert "in a subgraph" in site.reason


def test_two_norms_that_do_not_fold_become_one() -> None:
    constants = {**batch_norm_parts("b1", 4, rng(1)), **batch_norm_parts("b2", 4, rng(2))}
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "m", "b1"), batch_norm("m", "y", "b2")]
    model = build(nodes, IMAGE, constants)
    fold = fold_onnx(model, leftover="bn")
    assert [site.action for site in fold.sites] == ["kept", "rewritten"]
    assert fold.sites[1].into == "one BatchNormalization"
    assert count(fold.model) == fold.batch_norm_nodes == 1
    check_close(model, fold.model, normal(2, 4, 6, 6))


@pytest.mark.parametrize(
    ("leftover", "left"),
    [
        ("bn", ["Sub", "Div", "Mul", "Add"]),
        ("affine", ["Mul", "Add"]),
        ("conv", ["Conv"]),
        ("auto", ["Conv"]),
    ],
)
def test_arithmetic_that_does_not_fold_becomes_shorter(leftover: str, left: list[str]) -> None:
    constants = {name: np.abs(normal(4, 1, 1, seed=i)) + 0.1 for i, name in enumerate("abcd")}
    values = ["r", "s", "t", "u", "y"]
    operators = zip(["Sub", "Div", "Mul", "Add"], constants, values[:-1], values[1:], strict=True)
    nodes = [node("Relu", ["x"], ["r"])]
    nodes += [node(op_type, [source, name], [target]) for op_type, name, source, target in operators]
    model = build(nodes, IMAGE, {name: array.astype(np.float32) for name, array in constants.items()})
    fold = fold_onnx(model, leftover=leftover)
    (site,) = fold.sites
    assert (site.kind, site.action) == ("chain", "kept" if leftover == "bn" else "rewritten")
    assert fold.batch_norm_nodes == 0
    assert [n.op_type for n in fold.model.graph.node] == ["Relu", *left]
    check_close(model, fold.model, normal(2, 4, 6, 6))


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_arithmetic_becomes_one_norm_where_that_is_fastest(rank: int) -> None:
    shape = (4, *[1] * (rank - 2))
    constants = {"c": normal(*shape), "d": np.abs(normal(*shape)) + np.float32(0.1)}
    nodes = [node("Relu", ["x"], ["r"]), node("Sub", ["r", "c"], ["s"]), node("Div", ["s", "d"], ["y"])]
    model = build(nodes, ("n", 4, *[3] * (rank - 2)), constants)
    fold = fold_onnx(model)
    assert [site.into for site in fold.sites] == ["one BatchNormalization"]
    assert count(fold.model) == fold.batch_norm_nodes == 1
    check_close(model, fold.model, normal(2, 4, *[3] * (rank - 2)))


def test_the_end_of_a_layer_norm_stays_for_the_runtime_to_fuse() -> None:
    constants = {"axes": np.array([-1]), "g": normal(6), "b": normal(6), "eps": np.float32(1e-5).reshape(())}
    constants["w"] = normal(6, 5)
    nodes = [
        node("ReduceMean", ["x", "axes"], ["m"]),
        node("Sub", ["x", "m"], ["d"]),
        node("Mul", ["d", "d"], ["q"]),
        node("ReduceMean", ["q", "axes"], ["v"]),
        node("Add", ["v", "eps"], ["e"]),
        node("Sqrt", ["e"], ["s"]),
        node("Div", ["d", "s"], ["n"]),
        node("Mul", ["n", "g"], ["k"]),
        node("Add", ["k", "b"], ["l"]),
        node("MatMul", ["l", "w"], ["y"]),
    ]
    model = build(nodes, ("n", 3, 6), constants)
    fold = fold_onnx(model, leftover="auto")
    (site,) = fold.sites
    assert site.action == "kept"
    assert "runtimes fuse as a whole" in site.reason
    assert [n.op_type for n in fold.model.graph.node] == [n.op_type for n in nodes]


def test_opsets_that_broadcast_by_attributes_are_left_alone() -> None:
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    bn = batch_norm("v", "y", "bn", is_test=1)
    model = build([node("Conv", ["x", "w"], ["v"]), bn], IMAGE, constants, opset=6)
    (site,) = fold_onnx(model).sites
    assert site.action == "kept"
    assert "opset 6 is older than 7" in site.reason


def test_arithmetic_that_broadcasts_by_attributes_is_left_alone() -> None:
    """Of a vector along axis 1, a newer opset would take the last axis."""
    constants = {name: normal(4, seed=i) for i, name in enumerate("abc")}
    nodes = [node("Relu", ["x"], ["r"])]
    for name, (source, target) in zip(constants, ["rs", "st", "ty"], strict=True):
        nodes.append(node("Mul" if name == "a" else "Add", [source, name], [target], broadcast=1, axis=1))
    fold = fold_onnx(build(nodes, ("n", 4, 4, 4), constants, opset=6), leftover="affine")
    assert [n.op_type for n in fold.model.graph.node] == ["Relu", "Mul", "Add", "Add"]


def test_files_whose_initializers_were_all_inputs() -> None:
    """IR version 3 knows no others, and a new one is no input."""
    parts = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    nodes = [node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in parts.items()]
    nodes += [node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")]
    model = build(nodes, IMAGE, {}, opset=8)
    model.ir_version = 3
    fold = fold_onnx(model)
    assert fold.folded == ("bn",)
    check_close(model, fold.model, normal(2, 4, 6, 6))


def test_float64_keeps_a_form_that_onnxruntime_has() -> None:
    """It has no Conv in float64."""
    parts = {name: array.astype(np.float64) for name, array in batch_norm_parts("bn", 4, rng()).items()}
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "y", "bn")]
    model = build(nodes, IMAGE, parts, dtype=TensorProto.DOUBLE)
    fold = fold_onnx(model)
    assert fold.batch_norm_nodes == 1
    run_plainly(fold.model, normal(2, 4, 6, 6).astype(np.float64))


def test_a_leftover_in_half_precision_tells_what_it_adds_too() -> None:
    parts = {name: array.astype(np.float16) for name, array in batch_norm_parts("bn", 4, rng()).items()}
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "y", "bn")]
    (site,) = fold_onnx(build(nodes, IMAGE, parts, dtype=TensorProto.FLOAT16)).sites
    assert site.action == "rewritten"
    assert site.rounding is not None
    assert 0 < site.rounding <= 2**-11


def test_a_file_beyond_one_message_gets_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGEST_MESSAGE", 1000)
    constants = {"w": normal(40, 4, 3, 3), **batch_norm_parts("bn", 40, rng())}
    model = build([node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")], IMAGE, constants)
    fold_onnx(model, tmp_path / "large.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    check_close(model, onnx.load(tmp_path / "large.onnx"), normal(2, 4, 6, 6))


def test_the_account_is_plain_data() -> None:
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    model = build([node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")], IMAGE, constants)
    record = json.loads(json.dumps(fold_onnx(model).to_dict()))
    assert record["sites"] == [
        {
            "name": "bn",
            "action": "folded",
            "into": "Conv bn",
            "reason": "",
            "kind": "BatchNormalization",
            "copied": 0,
            "rounding": None,
        }
    ]
    taken = numpy_helper.to_array(fold_onnx(model).model.graph.initializer[0])
    assert taken.dtype == np.float32
