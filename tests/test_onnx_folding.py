"""Folding on small graphs: every pattern, every refusal, each against torch in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Arrays, batch_norm, batch_norm_parts, build, count, run_in_float64, run_plainly

from renormify import errors
from renormify.onnx import Fold, fold_onnx

node = helper.make_node


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return rng(seed).normal(0, 1, shape).astype(np.float32)


def check_same(model: onnx.ModelProto, folded: onnx.ModelProto, x: np.ndarray) -> None:
    """The folded file is no farther from float64 than the unfolded one, but for rounding."""
    onnx.checker.check_model(folded, full_check=True)
    for truth, before, after in zip(
        run_in_float64(model, x), run_plainly(model, x), run_plainly(folded, x), strict=True
    ):
        assert after.shape == truth.shape
        assert after.dtype == before.dtype
        rounding = 4 * np.finfo(np.float32).eps * np.abs(truth).max()
        assert np.abs(after - truth).max() <= np.abs(before - truth).max() + rounding


def check_exact(model: onnx.ModelProto, folded: onnx.ModelProto, x: np.ndarray, dtype: Any) -> None:
    """Run in float64, the folded file differs by one rounding of its weights and no more."""
    for truth, after in zip(run_in_float64(model, x), run_in_float64(folded, x), strict=True):
        np.testing.assert_allclose(after, truth, rtol=0, atol=8 * np.finfo(dtype).eps * np.abs(truth).max())


def check_folded(model: onnx.ModelProto, x: np.ndarray, *, left: int = 0) -> Fold:
    before = model.SerializeToString()
    fold = fold_onnx(model, leftover="bn")
    assert model.SerializeToString() == before, "the model that was given has changed"
    assert count(fold.model) == fold.batch_norm_nodes == left
    assert sum(site.kind == "BatchNormalization" for site in fold.sites) == count(model)
    check_same(model, fold.model, x)
    check_exact(model, fold.model, x, np.float32)
    return fold


CONVS = {
    "plain": ((5, 3, 3, 3), False, {}),
    "bias": ((5, 3, 3, 3), True, {}),
    "padded-strided-dilated": ((5, 3, 3, 3), True, {"pads": [2] * 4, "strides": [2, 2], "dilations": [2, 2]}),
    "grouped": ((6, 2, 3, 3), True, {"group": 2}),
    "depthwise": ((4, 1, 3, 3), False, {"group": 4, "pads": [1] * 4}),
    "depthwise-multiplied": ((8, 1, 3, 3), True, {"group": 4}),
    "1d": ((5, 3, 3), True, {}),
    "3d": ((5, 3, 3, 3, 3), False, {"pads": [1] * 6}),
}
TRANSPOSED = {
    "plain": ((4, 5, 3, 3), False, {}),
    "bias": ((4, 5, 3, 3), True, {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
    "grouped": ((4, 3, 3, 3), True, {"group": 2}),
    "depthwise": ((4, 1, 3, 3), False, {"group": 4, "strides": [2, 2]}),
    "1d": ((4, 5, 3), True, {}),
    "3d": ((4, 3, 2, 2, 2), True, {"strides": [2, 2, 2]}),
}


def convolution(op_type: str, shape: tuple[int, ...], bias: bool, attributes: dict[str, Any]) -> Any:
    groups = attributes.get("group", 1)
    channels = shape[0] if op_type == "Conv" else shape[1] * groups
    inputs = shape[1] * groups if op_type == "Conv" else shape[0]
    constants: Arrays = {"w": normal(*shape, seed=2), **batch_norm_parts("bn", channels, rng(3))}
    if bias:
        constants["b"] = normal(channels, seed=4)
    operator = node(op_type, ["x", "w", *(["b"] if bias else [])], ["c"], name="conv", **attributes)
    spatial = [9] * (len(shape) - 2)
    model = build([operator, batch_norm("c", "y", "bn")], ["n", inputs, *spatial], constants)
    return model, normal(2, inputs, *spatial)


@pytest.mark.parametrize("case", CONVS)
def test_conv(case: str) -> None:
    model, x = convolution("Conv", *CONVS[case])
    fold = check_folded(model, x)
    (site,) = fold.sites
    assert (site.name, site.action, site.into, site.reason) == ("bn", "folded", "Conv conv", "")
    assert [n.op_type for n in fold.model.graph.node] == ["Conv"]


@pytest.mark.parametrize("case", TRANSPOSED)
def test_conv_transpose(case: str) -> None:
    model, x = convolution("ConvTranspose", *TRANSPOSED[case])
    check_folded(model, x)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (2, 1), (2, 5)])
def test_gemm(bias: tuple[int, ...] | None, trans_a: int, trans_b: int) -> None:
    constants = {"w": normal(*((5, 3) if trans_b else (3, 5))), **batch_norm_parts("bn", 5, rng())}
    if bias is not None:
        constants["c"] = normal(*bias) if bias else np.float32(1.5).reshape(())
    inputs = ["x", "w", *(["c"] if bias is not None else [])]
    gemm = node("Gemm", inputs, ["g"], alpha=0.5, beta=-2.0, transA=trans_a, transB=trans_b)
    shape = (3, 2) if trans_a else (2, 3)
    check_folded(build([gemm, batch_norm("g", "y", "bn")], shape, constants), normal(*shape))


def test_gemm_whose_beta_is_zero_never_sees_its_bias() -> None:
    constants = {"w": normal(3, 5), "c": np.full(5, 3e38, np.float32), **batch_norm_parts("bn", 5, rng())}
    gemm = node("Gemm", ["x", "w", "c"], ["g"], beta=0.0)
    check_folded(build([gemm, batch_norm("g", "y", "bn")], (2, 3), constants), normal(2, 3))


@pytest.mark.parametrize("form", ["alone", "add", "add-left", "add-scalar"])
def test_matmul(form: str) -> None:
    addend = np.float32(0.7).reshape(()) if form == "add-scalar" else normal(5, seed=3)
    constants = {"w": normal(3, 5), **batch_norm_parts("bn", 5, rng())}
    nodes = [node("MatMul", ["x", "w"], ["m"], name="fc")]
    if form != "alone":
        constants["c"] = addend
        nodes.append(node("Add", ["c", "m"] if form == "add-left" else ["m", "c"], ["a"]))
    nodes.append(batch_norm(nodes[-1].output[0], "y", "bn"))
    fold = check_folded(build(nodes, ("n", 3), constants), normal(4, 3))
    assert [n.op_type for n in fold.model.graph.node] == ["MatMul", "Add"]


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    ("shape", "stays"),
    [((1, 4, 1, 1), False), ((4, 1, 1), False), ((), False), ((1, 4, 7, 7), True), ((7,), True)],
)
def test_constant_add_between(op_type: str, shape: tuple[int, ...], stays: bool) -> None:
    constants = {"w": normal(4, 4, 3, 3), "c": normal(*shape) if shape else np.float32(0.7).reshape(())}
    constants |= batch_norm_parts("bn", 4, rng())
    spatial = 9 if op_type == "Conv" else 5
    nodes = [node(op_type, ["x", "w"], ["v"]), node("Add", ["v", "c"], ["a"]), batch_norm("a", "y", "bn")]
    model = build(nodes, ("n", 4, spatial, spatial), constants)
    fold = check_folded(model, normal(2, 4, spatial, spatial))
    assert count(fold.model, "Add") == stays


def test_one_after_another() -> None:
    constants = {
        "w": normal(4, 3, 3, 3),
        **batch_norm_parts("b1", 4, rng(1)),
        **batch_norm_parts("b2", 4, rng(2)),
    }
    nodes = [
        node("Conv", ["x", "w"], ["v"], name="conv"),
        batch_norm("v", "u", "b1"),
        batch_norm("u", "y", "b2"),
    ]
    fold = check_folded(build(nodes, ("n", 3, 6, 6), constants), normal(2, 3, 6, 6))
    assert [site.into for site in fold.sites] == ["Conv conv"] * 2


@pytest.mark.parametrize("same_statistics", [True, False])
def test_two_convs_that_share_a_weight(same_statistics: bool) -> None:
    second = "b1" if same_statistics else "b2"
    constants = {
        "w": normal(4, 4, 3, 3),
        **batch_norm_parts("b1", 4, rng(1)),
        **batch_norm_parts("b2", 4, rng(2)),
    }
    nodes = [
        node("Conv", ["x", "w"], ["v"], pads=[1] * 4),
        batch_norm("v", "u", "b1"),
        node("Conv", ["u", "w"], ["t"], pads=[1] * 4),
        batch_norm("t", "y", second, node_name="second"),
    ]
    fold = check_folded(build(nodes, ("n", 4, 6, 6), constants), normal(2, 4, 6, 6))
    weights = [tensor for tensor in fold.model.graph.initializer if len(tensor.dims) == 4]
    assert len(weights) == (1 if same_statistics else 2)


def test_a_weight_that_another_conv_uses_as_it_is() -> None:
    constants = {"w": normal(4, 3, 3, 3), **batch_norm_parts("bn", 4, rng())}
    nodes = [node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn"), node("Conv", ["x", "w"], ["z"])]
    check_folded(build(nodes, ("n", 3, 6, 6), constants, outputs=["y", "z"]), normal(2, 3, 6, 6))


def test_constants_as_nodes_and_an_identity_between() -> None:
    parts = {"w": normal(4, 3, 3, 3), **batch_norm_parts("bn", 4, rng())}
    nodes = [node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in parts.items()]
    nodes += [node("Conv", ["x", "w"], ["v"]), node("Identity", ["v"], ["u"]), batch_norm("u", "y", "bn")]
    fold = check_folded(build(nodes, ("n", 3, 6, 6), {}), normal(2, 3, 6, 6))
    assert [n.op_type for n in fold.model.graph.node] == ["Conv"]


@pytest.mark.parametrize("variance", [0.0, 1e-42, 2.7e8])
def test_variances_of_real_checkpoints(variance: float) -> None:
    constants = {"w": normal(4, 3, 3, 3), **batch_norm_parts("bn", 4, rng())}
    constants["bn.var"][1] = variance
    nodes = [node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn", epsilon=1e-3)]
    check_folded(build(nodes, ("n", 3, 6, 6), constants), normal(2, 3, 6, 6))


@pytest.mark.parametrize(
    ("dtype", "code"), [(np.float16, TensorProto.FLOAT16), (np.float64, TensorProto.DOUBLE)]
)
def test_weights_keep_their_type(dtype: Any, code: int) -> None:
    constants = {"w": normal(4, 3, 3, 3).astype(dtype), **batch_norm_parts("bn", 4, rng(), dtype)}
    nodes = [node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")]
    model = build(nodes, ("n", 3, 6, 6), constants, dtype=code)
    fold = fold_onnx(model)
    assert fold.batch_norm_nodes == 0
    assert {tensor.data_type for tensor in fold.model.graph.initializer} == {code}
    check_exact(model, fold.model, normal(2, 3, 6, 6), dtype)


def refused(kind: str) -> tuple[onnx.ModelProto, np.ndarray, str]:
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    conv, bn = node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")
    shape: tuple[int | str, ...] = ("n", 4, 6, 6)
    x = normal(2, 4, 6, 6)
    if kind == "weight is an input":
        return build([conv, bn], shape, constants, also_inputs=["w"]), x, "weight of Conv is a graph input"
    if kind == "statistics are an input":
        return build([conv, bn], shape, constants, also_inputs=["bn.mean"]), x, "its mean is a graph input"
    if kind == "weight is computed":
        nodes = [node("Relu", ["w"], ["r"]), node("Conv", ["x", "r"], ["v"]), bn]
        return build(nodes, shape, constants), x, "weight of Conv is computed"
    if kind == "bias is an input":
        constants["b"] = normal(4)
        nodes = [node("Conv", ["x", "w", "b"], ["v"]), bn]
        return build(nodes, shape, constants, also_inputs=["b"]), x, "bias of Conv is a graph input"
    if kind == "other users":
        nodes = [conv, bn, node("Relu", ["v"], ["z"])]
        return build(nodes, shape, constants, outputs=["y", "z"]), x, "has other users"
    if kind == "graph output":
        return build([conv, bn], shape, constants, outputs=["y", "v"]), x, "also an output of the graph"
    if kind == "no producer":
        return build([batch_norm("x", "y", "bn")], shape, constants), x, "an input of the graph"
    if kind == "relu before":
        return (
            build([conv, node("Relu", ["v"], ["r"]), batch_norm("r", "y", "bn")], shape, constants),
            x,
            "Relu",
        )
    if kind == "sum of two":
        nodes = [
            node("Conv", ["x", "w"], ["v"], pads=[1] * 4),
            node("Relu", ["x"], ["u"]),
            node("Add", ["v", "u"], ["a"]),
            batch_norm("a", "y", "bn"),
        ]
        return build(nodes, shape, constants), x, "Relu does not commute"
    if kind == "matmul of rank 3":
        constants["w"] = normal(6, 4)
        nodes = [node("MatMul", ["x", "w"], ["v"]), bn]
        return build(nodes, ("n", 4, 6), constants), normal(2, 4, 6), "axis 2 of 3"
    if kind == "add of a higher rank":
        # The sum has the batch on axis 1, and just as many rows as there are channels.
        constants["c"] = normal(1, 1, 4, 1, 1)
        nodes = [conv, node("Add", ["v", "c"], ["a"]), batch_norm("a", "y", "bn")]
        return build(nodes, (4, 4, 6, 6), constants), normal(4, 4, 6, 6), "more axes"
    if kind == "scale is not finite":
        constants["bn.var"][2] = 0.0
        constants["bn.scale"][2] = 0.0
        return build([conv, batch_norm("v", "y", "bn", epsilon=0.0)], shape, constants), x, "not finite"
    raise AssertionError(kind)


REFUSALS = (
    "weight is an input",
    "statistics are an input",
    "weight is computed",
    "bias is an input",
    "other users",
    "graph output",
    "no producer",
    "relu before",
    "sum of two",
    "matmul of rank 3",
    "add of a higher rank",
    "scale is not finite",
)


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_say_why_and_change_nothing(kind: str) -> None:
    model, x, reason = refused(kind)
    fold = fold_onnx(model, leftover="bn")
    (site,) = fold.sites
    assert (site.action, site.into) == ("kept", None)
    assert reason in site.reason
    for before, after in zip(run_plainly(model, x), run_plainly(fold.model, x), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    "kind", [kind for kind in REFUSALS if "statistics" not in kind and "finite" not in kind]
)
@pytest.mark.parametrize("leftover", ["affine", "conv", "auto"])
def test_what_does_not_fold_is_rewritten(kind: str, leftover: str) -> None:
    model, x, reason = refused(kind)
    fold = fold_onnx(model, leftover=leftover)
    (site,) = fold.sites
    # At these ranks BatchNormalization is the fastest.
    left = leftover == "auto" and kind in ("matmul of rank 3", "add of a higher rank")
    assert site.action == ("kept" if left else "rewritten")
    assert site.into in ((None,) if left else ("Mul and Add", "a depthwise 1x1 Conv"))
    assert reason in site.reason
    assert count(fold.model) == fold.batch_norm_nodes == left
    check_same(model, fold.model, x)


@pytest.mark.parametrize("leftover", ["affine", "conv", "auto"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_leftovers_at_every_rank(rank: int, leftover: str) -> None:
    shape = (2, 4, 3, 3, 3)[:rank]
    constants = batch_norm_parts("bn", 4, rng())
    model = build([node("Relu", ["x"], ["r"]), batch_norm("r", "y", "bn")], ("n", *shape[1:]), constants)
    fold = fold_onnx(model, leftover=leftover)
    assert count(fold.model, "Conv") == (
        rank > 2 and (leftover == "conv" or (leftover == "auto" and rank == 4))
    )
    assert count(fold.model) == fold.batch_norm_nodes == (leftover == "auto" and rank != 4)
    check_same(model, fold.model, normal(*shape))


@pytest.mark.parametrize("leftover", ["bn", "affine", "conv", "auto"])
def test_training_mode_is_never_touched(leftover: str) -> None:
    constants = {"w": normal(4, 3, 3, 3), **batch_norm_parts("bn", 4, rng())}
    inputs = ["v", "bn.scale", "bn.bias", "bn.mean", "bn.var"]
    bn = node("BatchNormalization", inputs, ["y", "m", "s"], name="bn", training_mode=1)
    model = build([node("Conv", ["x", "w"], ["v"]), bn], ("n", 3, 6, 6), constants)
    fold = fold_onnx(model, leftover=leftover)
    assert fold.sites[0].action == "kept"
    assert "training_mode=1" in fold.sites[0].reason
    x = normal(2, 3, 6, 6)
    np.testing.assert_array_equal(run_plainly(fold.model, x)[0], run_plainly(model, x)[0])


def test_fp16_weight_that_would_overflow() -> None:
    constants = {"w": normal(4, 3, 3, 3).astype(np.float16), **batch_norm_parts("bn", 4, rng(), np.float16)}
    constants["bn.scale"][0], constants["bn.var"][0] = 6e4, 0.0
    nodes = [node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")]
    fold = fold_onnx(build(nodes, ("n", 3, 6, 6), constants, dtype=TensorProto.FLOAT16))
    assert fold.sites[0].action == "kept"
    assert "not finite in FLOAT16" in fold.sites[0].reason
    assert {tensor.name for tensor in fold.model.graph.initializer} == set(constants)


@pytest.mark.parametrize("conv_inside", [True, False])
def test_subgraphs(conv_inside: bool) -> None:
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    conv = node("Conv", ["x", "w"], ["v"], pads=[1] * 4)
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("t", "e")]
    then = helper.make_graph(
        [*([conv] if conv_inside else []), batch_norm("v", "t", "bn")], "then", [], out[:1]
    )
    other = helper.make_graph([node("Relu", ["x"], ["e"])], "else", [], out[1:])
    zero = numpy_helper.from_array(np.float32(0).reshape(()), "zero")
    nodes = [
        *([] if conv_inside else [conv]),
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "zero"], ["positive"]),
        node("If", ["positive"], ["y"], then_branch=then, else_branch=other),
    ]
    model = build(nodes, ("n", 4, 6, 6), {**constants, "zero": numpy_helper.to_array(zero)})
    fold = fold_onnx(model, leftover="bn")
    (site,) = fold.sites
    assert site.action == ("folded" if conv_inside else "kept")
    assert conv_inside or "outside of its subgraph" in site.reason
    onnx.checker.check_model(fold.model)
    for x in (normal(2, 4, 6, 6), -np.abs(normal(2, 4, 6, 6))):
        before, after = run_plainly(model, x)[0], run_plainly(fold.model, x)[0]
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_function_of_another_opset_stays_and_is_accounted_for() -> None:
    body = [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"])]
    function = helper.make_function(
        "local", "Block", ["x", *"wsbmv"], ["y"], body, [helper.make_opsetid("", 17)]
    )
    parts = batch_norm_parts("bn", 4, rng())
    constants = {"w": normal(4, 3, 3, 3), "u": normal(4, 4, 1, 1), **parts}
    nodes = [
        node("Block", ["x", "w", *parts], ["a"], domain="local"),
        node("Conv", ["a", "u"], ["d"]),
        batch_norm("d", "y", "bn"),
    ]
    fold = fold_onnx(build(nodes, ("n", 3, 6, 6), constants, functions=[function]))
    assert [site.action for site in fold.sites] == ["folded", "kept"]
    assert "function Block is of another opset" in fold.sites[1].reason
    assert [n.op_type for n in fold.model.graph.node] == ["Block", "Conv"]


def test_functions_are_inlined() -> None:
    names = ["w", "s", "b", "m", "v"]
    body = [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"])]
    function = helper.make_function(
        "local", "Block", ["x", *names], ["y"], body, [helper.make_opsetid("", 20)]
    )
    parts = batch_norm_parts("bn", 4, rng())
    constants = {"w": normal(4, 3, 3, 3), **parts}
    call = node("Block", ["x", "w", *parts], ["y"], domain="local")
    plain = build([node("Conv", ["x", "w"], ["c"]), batch_norm("c", "y", "bn")], ("n", 3, 6, 6), constants)
    fold = fold_onnx(build([call], ("n", 3, 6, 6), constants, functions=[function]), leftover="bn")
    assert fold.sites[0].action == "folded"
    check_same(plain, fold.model, normal(2, 3, 6, 6))


@pytest.mark.parametrize("opset", [9, 13, 17, 24])
def test_opsets(opset: int) -> None:
    constants = {"w": normal(4, 3, 3, 3), **batch_norm_parts("bn", 4, rng())}
    nodes = [node("Conv", ["x", "w"], ["v"]), batch_norm("v", "y", "bn")]
    fold = check_folded(build(nodes, ("n", 3, 6, 6), constants, opset=opset), normal(2, 3, 6, 6))
    assert fold.model.opset_import[0].version == opset


def test_paths_and_models_in_and_a_file_out(tmp_path: Path) -> None:
    model, x = convolution("Conv", *CONVS["bias"])
    onnx.save(model, tmp_path / "in.onnx")
    given_model = onnx_ir.from_proto(model)
    for source in (tmp_path / "in.onnx", str(tmp_path / "in.onnx"), model, given_model):
        fold = fold_onnx(source, tmp_path / "out.onnx")
        written = onnx.load(tmp_path / "out.onnx")
        assert count(written) == count(fold.model) == 0
        check_same(model, written, x)
    assert sum(n.op_type == "BatchNormalization" for n in given_model.graph) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]
    assert json.loads(json.dumps(fold.to_dict()))["batch_norm_nodes"] == 0


def test_external_data_is_read(tmp_path: Path) -> None:
    model, x = convolution("Conv", *CONVS["bias"])
    (tmp_path / "deep").mkdir()
    stored = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(stored, tmp_path / "deep" / "in.onnx", save_as_external_data=True, size_threshold=0)
    fold = fold_onnx(tmp_path / "deep" / "in.onnx", tmp_path / "out.onnx")
    check_same(model, onnx.load(tmp_path / "out.onnx"), x)
    check_same(model, fold.model, x)


def test_bad_input(tmp_path: Path) -> None:
    model, _ = convolution("Conv", *CONVS["bias"])
    (tmp_path / "text.onnx").write_text("not a model\n")
    with pytest.raises(errors.InputError, match="leftover to be one of auto, bn, affine, conv"):
        fold_onnx(model, leftover="mul")
    with pytest.raises(errors.CheckpointError, match="no ONNX file at"):
        fold_onnx(tmp_path / "missing.onnx")
    with pytest.raises(errors.CheckpointError, match=r"text\.onnx"):
        fold_onnx(tmp_path / "text.onnx")
    with pytest.raises(errors.OutputError, match="does not exist"):
        fold_onnx(model, tmp_path / "nowhere" / "out.onnx")
    with pytest.raises(errors.InputError, match="expected a path"):
        fold_onnx(3)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["text.onnx"]


def test_the_other_outputs_of_an_old_norm_mean_training() -> None:
    """Before opset 14 they did, used or not: onnxruntime normalises such a node by its batch."""
    constants = {"w": normal(4, 4, 3, 3), **batch_norm_parts("bn", 4, rng())}
    inputs = ["v", "bn.scale", "bn.bias", "bn.mean", "bn.var"]
    bn = node("BatchNormalization", inputs, ["y", "m", "s", "saved_m", "saved_s"], name="bn")
    model = build([node("Conv", ["x", "w"], ["v"]), bn], ("n", 4, 6, 6), constants, opset=9)
    fold = fold_onnx(model)
    assert [site.action for site in fold.sites] == ["kept"]
    assert "batch statistics" in fold.sites[0].reason
    x = normal(2, 4, 6, 6)
    np.testing.assert_array_equal(run_plainly(fold.model, x)[0], run_plainly(model, x)[0])


@pytest.mark.parametrize("forward", [False, True])
def test_a_graph_deeper_than_the_stack_of_python(forward: bool) -> None:
    depth = 1500
    constants = {"w": normal(4, 4, 1, 1), **batch_norm_parts("bn", 4, rng())}
    constants |= {f"bn.{part}": np.zeros(4, np.float32) for part in ("mean", "bias")}
    constants["bn.scale"] = np.abs(constants["bn.scale"])
    between = [node("Relu", [f"r{i}"], [f"r{i + 1}"]) for i in range(depth)]
    conv = node("Conv", ["x" if not forward else f"r{depth}", "w"], ["y" if forward else "r0"])
    bn = batch_norm("x" if forward else f"r{depth}", "r0" if forward else "y", "bn")
    model = build([bn, *between, conv] if forward else [conv, *between, bn], ("n", 4, 2, 2), constants)
    fold = check_folded(model, normal(1, 4, 2, 2))
    assert fold.folded == ("bn",)


def test_what_asks_for_a_shape_is_not_in_the_way() -> None:
    """As torch's old exporter wrote ``x.view(x.size(0), -1)``."""
    constants = {"fc": normal(16, 4), **batch_norm_parts("bn", 4, rng()), **batch_norm_parts("b2", 4, rng(2))}
    constants |= {"first": np.array(0), "rest": np.array([-1]), "w": normal(4, 4, 1, 1)}
    nodes = [
        node("Relu", ["x"], ["r"]),
        batch_norm("r", "n", "bn"),
        node("Shape", ["n"], ["shape"]),
        node("Gather", ["shape", "first"], ["rows"]),
        node("Unsqueeze", ["rows", "at"], ["row"]),
        node("Concat", ["row", "rest"], ["to"], axis=0),
        node("Reshape", ["n", "to"], ["f"]),
        node("MatMul", ["f", "fc"], ["g"]),
        node("Shape", ["g"], ["again"]),
        batch_norm("g", "h", "b2"),
        node("Reshape", ["h", "again"], ["y"]),
    ]
    constants["at"] = np.array([0])
    model = build(nodes, ("n", 4, 2, 2), constants)
    fold = fold_onnx(model, leftover="bn")
    assert {site.action for site in fold.sites} == {"folded"}, fold.sites
    x = normal(3, 4, 2, 2)
    truth, (after,) = run_plainly(model, x)[0], run_plainly(fold.model, x)
    np.testing.assert_allclose(after, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


def test_new_names_are_no_nodes_names() -> None:
    """onnxruntime refuses a file in which two nodes have one name."""
    constants = batch_norm_parts("bn", 4, rng())
    nodes = [node("Relu", ["x"], ["r"], name="bn_conv"), batch_norm("r", "y", "bn")]
    model = build(nodes, ("n", 4, 6, 6), constants)
    check_same(model, fold_onnx(model, leftover="conv").model, normal(2, 4, 6, 6))


def test_a_rank_that_only_a_consumer_tells() -> None:
    """Behind another domain's operator shape inference knows nothing."""
    constants = {"w": normal(4, 4, 1, 1), **batch_norm_parts("bn", 4, rng())}
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "n", "bn"), node("Conv", ["n", "w"], ["y"])]
    model = build(nodes, ("n", 4, 6, 6), constants)
    model.graph.node[0].CopyFrom(node("Gelu", ["x"], ["r"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    fold = fold_onnx(model)
    assert fold.folded == ("bn",)
    x = normal(2, 4, 6, 6)
    before, after = run_plainly(model, x)[0], run_plainly(fold.model, x)[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_branch_that_returns_a_value_of_the_graph_around_it() -> None:
    constants = {"w": normal(4, 4, 3, 3), "zero": np.float32(0).reshape(())}
    constants |= batch_norm_parts("bn", 4, rng())
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("t", "e")]
    nodes = [
        node("Conv", ["x", "w"], ["v"]),
        batch_norm("v", "n", "bn"),
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "zero"], ["positive"]),
        node(
            "If",
            ["positive"],
            ["y"],
            then_branch=helper.make_graph([node("Relu", ["n"], ["t"])], "then", [], out[:1]),
            else_branch=helper.make_graph([node("Identity", ["n"], ["e"])], "else", [], out[1:]),
        ),
    ]
    model = build(nodes, ("n", 4, 6, 6), constants)
    fold = fold_onnx(model)
    assert fold.folded == ("bn",)
    onnx.checker.check_model(fold.model)
    for x in (normal(2, 4, 6, 6), -np.abs(normal(2, 4, 6, 6))):
        before, after = run_plainly(model, x)[0], run_plainly(fold.model, x)[0]
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("whole", [False, True])
def test_a_function_of_a_conv_takes_in_what_follows_it(whole: bool) -> None:
    body = [node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "k"], ["y"])]
    function = helper.make_function(
        "local",
        "Block",
        ["x", "w", "k"],
        ["y"],
        body if whole else [node("Conv", ["x", "w"], ["y"])],
        [helper.make_opsetid("", 20)],
    )
    constants = {"w": normal(4, 3, 3, 3), "k": normal(4, 1, 1), **batch_norm_parts("bn", 4, rng())}
    nodes = [node("Block", ["x", "w", "k"], ["c"], domain="local"), batch_norm("c", "y", "bn")]
    fold = fold_onnx(build(nodes, ("n", 3, 6, 6), constants, functions=[function]))
    assert [n.op_type for n in fold.model.graph.node] == ["Conv"]
    plain = [*(body if whole else body[:1]), batch_norm("y" if whole else "c", "z", "bn")]
    check_same(build(plain, ("n", 3, 6, 6), constants, outputs=["z"]), fold.model, normal(2, 3, 6, 6))
