"""Ways of an affine through the graph, both directions: what folds, what must not, each run in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_graphs import (
    Arrays,
    batch_norm,
    batch_norm_parts,
    build,
    count,
    evaluate_in_float64,
    run_in_float64,
    run_plainly,
)

from renormify.onnx import Fold, fold_onnx

node = helper.make_node
RNG = np.random.default_rng(7)
#: The newest opset that onnxruntime takes.
NEWEST = min(onnx.defs.onnx_opset_version(), 26)


def _random(*shape: int) -> np.ndarray:
    return RNG.normal(0, 1, shape).astype(np.float32)


def _integers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _norm(name: str, channels: int, **changes: float) -> Arrays:
    """Statistics of both signs, with some parameters overwritten."""
    parts = batch_norm_parts(name, channels, RNG)
    for key, value in changes.items():
        parts[f"{name}.{key}"][:] = value
    if "positive" in name:
        parts[f"{name}.scale"] = np.abs(parts[f"{name}.scale"]) + np.float32(0.1)
    return parts


#: Every constant that a case may name; a graph gets those it uses.
CONSTANTS: Arrays = {
    "w": _random(4, 4, 3, 3),
    "w1": _random(4, 4, 1, 1),
    "wide": _random(3, 8, 1, 1),
    "half": _random(3, 2, 1, 1),
    "grouped": _random(6, 2, 3, 3),
    "depthwise": _random(8, 1, 3, 3),
    "w3d": _random(2, 1, 3, 3, 3),
    "wt": _random(4, 3, 3, 3),
    "wt1": _random(4, 3, 1, 1),
    "wtg": _random(4, 3, 1, 1),
    "b4": _random(4),
    "b6": _random(6),
    "fc": _random(4, 5),
    "fcT": _random(5, 4),
    "flat": _random(144, 5),
    "long": _random(6, 6),
    "left": _random(3, 4),
    "b5": _random(5),
    "map": _random(1, 4, 6, 6),
    "part": _random(2, 4, 6, 6),
    "mean": _random(4, 1, 1),
    "std": np.abs(_random(1, 4, 1, 1)) + np.float32(0.5),
    "gain": _random(4, 1, 1),
    "offset": _random(1, 4, 1, 1),
    "one": np.float32(1).reshape(()),
    "four": _random(4),
    "to_flat": _integers(0, -1),
    "to_four": _integers(0, 4, 1, 1),
    "to_pairs": _integers(0, 2, 2, 6, 6),
    "to_image": _integers(0, 4, 6, 6),
    "to_mixed": _integers(0, 6, 4, 6),
    "spatial": _integers(2, 3),
    "axis1": _integers(1),
    "axis3": _integers(3),
    "s1": _integers(1),
    "s3": _integers(3),
    "s5": _integers(5),
    "minus1": _integers(-1),
    "least": _integers(-100),
    "halves": _integers(2, 2),
    "pads": _integers(0, 0, 1, 1, 0, 0, 1, 1),
    "double": np.array([1, 1, 2, 2], np.float32),
    "yes": np.array(True),
    **_norm("bn", 4),
    **_norm("bn2", 4),
    **_norm("bn6", 6),
    **_norm("bn8", 8),
    **_norm("bn144", 144),
    **_norm("positive", 4),
    **_norm("unshifted", 4, bias=0, mean=0),
    **_norm("positive_unshifted", 4, bias=0, mean=0),
    **_norm("unscaled", 4, scale=1, var=1),
}


def bn(source: str, target: str, name: str = "bn", **attributes: Any) -> onnx.NodeProto:
    if name == "unscaled":
        attributes["epsilon"] = 0.0
    return batch_norm(source, target, name, **attributes)


def conv(source: str, target: str, weight: str = "w", *more: str, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", [source, weight, *more], [target], name=f"conv_{target}", **attributes)


def op(op_type: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    name = f"{op_type}_{outputs.split()[0]}"
    return node(op_type, inputs.split(), outputs.split(), name=name, **attributes)


IMAGE = ("n", 4, 6, 6)
ROWS = ("n", 4)
Case = tuple[Sequence[int | str], list[onnx.NodeProto]]

#: What folds: the graph's operators without the norm are all that is left, but for an Add where it says so.
FOLDS: dict[str, Case] = {
    # forward into each operator
    "conv": (IMAGE, [bn("x", "n"), conv("n", "y", "w", "b4")]),
    "conv without bias": (IMAGE, [bn("x", "n"), conv("n", "y", strides=[2, 2], dilations=[2, 2])]),
    "grouped conv": (IMAGE, [bn("x", "n"), conv("n", "y", "grouped", "b6", group=2)]),
    "depthwise conv": (IMAGE, [bn("x", "n"), conv("n", "y", "depthwise", group=4)]),
    "conv that is valid": (IMAGE, [bn("x", "n"), conv("n", "y", auto_pad="VALID")]),
    "conv of one position, padded to the same size": (
        IMAGE,
        [bn("x", "n"), conv("n", "y", "w1", auto_pad="SAME_UPPER", strides=[2, 2])],
    ),
    "scale into a padded conv": (IMAGE, [bn("x", "n", "unshifted"), conv("n", "y", "w", "b4", pads=[1] * 4)]),
    "scale into a transposed conv": (
        IMAGE,
        [
            bn("x", "n", "unshifted"),
            op("ConvTranspose", "n wt b6", "y", group=2, strides=[2, 2], pads=[1] * 4),
        ],
    ),
    "transposed conv of one position": (IMAGE, [bn("x", "n"), op("ConvTranspose", "n wt1", "y")]),
    "grouped transposed conv of one position": (
        IMAGE,
        [bn("x", "n"), op("ConvTranspose", "n wtg b6", "y", group=2)],
    ),
    "gemm": (ROWS, [bn("x", "n"), op("Gemm", "n fc b5", "y", alpha=0.5, beta=-2.0)]),
    "gemm without bias": (ROWS, [bn("x", "n"), op("Gemm", "n fcT", "y", transB=1, alpha=3.0)]),
    "matmul": (ROWS, [bn("x", "n"), op("MatMul", "n fc", "y")]),
    "matmul and its bias": (ROWS, [bn("x", "n"), op("MatMul", "n fc", "m"), op("Add", "b5 m", "y")]),
    "matmul, the constant on the left": (("n", 4, 6), [bn("x", "n"), op("MatMul", "left n", "y")]),
    "relu, norm, gemm": (ROWS, [op("Relu", "x", "r"), bn("r", "n"), op("Gemm", "n fc b5", "y")]),
    # forward through what commutes
    "flatten": (IMAGE, [bn("x", "n"), op("Flatten", "n", "f"), op("Gemm", "f flat b5", "y")]),
    "reshape": (IMAGE, [bn("x", "n"), op("Reshape", "n to_flat", "f"), op("MatMul", "f flat", "y")]),
    "average over all": (
        IMAGE,
        [bn("x", "n"), op("GlobalAveragePool", "n", "p"), op("Flatten", "p", "f"), op("Gemm", "f fc", "y")],
    ),
    "mean": (
        IMAGE,
        [bn("x", "n"), op("ReduceMean", "n spatial", "p", keepdims=0), op("Gemm", "p fc b5", "y")],
    ),
    "squeeze": (
        IMAGE,
        [
            bn("x", "n"),
            op("ReduceMean", "n spatial", "p"),
            op("Squeeze", "p spatial", "s"),
            op("MatMul", "s fc", "y"),
        ],
    ),
    "unsqueeze": (
        IMAGE,
        [bn("x", "n"), op("Unsqueeze", "n axis1", "u"), op("Squeeze", "u axis1", "s"), conv("s", "y")],
    ),
    "average pool": (
        IMAGE,
        [
            bn("x", "n"),
            op("AveragePool", "n", "p", kernel_shape=[2, 2], strides=[2, 2]),
            conv("p", "y", "w1"),
        ],
    ),
    "average pool that does not count its padding": (
        IMAGE,
        [bn("x", "n"), op("AveragePool", "n", "p", kernel_shape=[3, 3], pads=[1] * 4), conv("p", "y", "w1")],
    ),
    "max pool of positive scales": (
        IMAGE,
        [
            bn("x", "n", "positive"),
            op("MaxPool", "n", "p", kernel_shape=[3, 3], pads=[1] * 4),
            conv("p", "y"),
        ],
    ),
    "dropout": (IMAGE, [bn("x", "n"), op("Dropout", "n", "d"), conv("d", "y")]),
    "transpose": (
        IMAGE,
        [bn("x", "n"), op("Transpose", "n", "t", perm=[0, 2, 3, 1]), op("MatMul", "t fc", "y")],
    ),
    "slice of channels": (IMAGE, [bn("x", "n"), op("Slice", "n s1 s3 axis1", "s"), conv("s", "y", "half")]),
    "slice of rows": (IMAGE, [bn("x", "n"), op("Slice", "n s1 s5 axis3", "s"), conv("s", "y")]),
    "concat": (IMAGE, [bn("x", "n"), op("Concat", "x n", "c", axis=1), conv("c", "y", "wide")]),
    "split": (
        IMAGE,
        [
            bn("x", "n"),
            op("Split", "n halves", "a b", axis=1),
            conv("a", "c", "half"),
            conv("b", "d", "half"),
            op("Add", "c d", "y"),
        ],
    ),
    "two users": (IMAGE, [bn("x", "n"), conv("n", "a"), conv("n", "b"), op("Mul", "a b", "y")]),
    "edge padding": (IMAGE, [bn("x", "n"), op("Pad", "n pads", "p", mode="edge"), conv("p", "y")]),
    "scale and zero padding": (IMAGE, [bn("x", "n", "unshifted"), op("Pad", "n pads", "p"), conv("p", "y")]),
    "resize": (
        IMAGE,
        [bn("x", "n"), node("Resize", ["n", "", "double"], ["r"], mode="linear"), conv("r", "y", "w1")],
    ),
    "shift and a sum": (
        IMAGE,
        [bn("x", "n", "unscaled"), op("Relu", "x", "r"), op("Add", "n r", "a"), conv("a", "y")],
    ),
    "positive scale and relu": (
        IMAGE,
        [bn("x", "n", "positive_unshifted"), op("Relu", "n", "r"), conv("r", "y", pads=[1] * 4)],
    ),
    "another norm beyond a flatten": (
        IMAGE,
        [bn("x", "n"), op("Flatten", "n", "f"), bn("f", "g", "bn144"), op("Gemm", "g flat", "y")],
    ),
    # backward through what commutes
    "max pool before": (
        IMAGE,
        [conv("x", "v"), op("MaxPool", "v", "p", kernel_shape=[2, 2]), bn("p", "y", "positive")],
    ),
    "average pool before": (
        IMAGE,
        [conv("x", "v"), op("AveragePool", "v", "p", kernel_shape=[2, 2]), bn("p", "y")],
    ),
    "average over all before": (
        IMAGE,
        [conv("x", "v"), op("GlobalAveragePool", "v", "p"), op("Flatten", "p", "f"), bn("f", "y")],
    ),
    "mean before": (IMAGE, [conv("x", "v"), op("ReduceMean", "v spatial", "p", keepdims=0), bn("p", "y")]),
    "reshape before": (ROWS, [op("Gemm", "x fc4", "g"), op("Reshape", "g to_four", "r"), bn("r", "y")]),
    "transpose before": (IMAGE, [conv("x", "v"), op("Transpose", "v", "t", perm=[0, 1, 3, 2]), bn("t", "y")]),
    "shuffle before": (
        IMAGE,
        [
            conv("x", "v", pads=[1] * 4),
            op("Reshape", "v to_pairs", "r"),
            op("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]),
            op("Reshape", "t to_image", "s"),
            bn("s", "y"),
        ],
    ),
    "concat before": (
        IMAGE,
        [conv("x", "a"), conv("x", "b"), op("Concat", "a b", "c", axis=1), bn("c", "y", "bn8")],
    ),
    "concat with a constant before": (
        (2, 4, 6, 6),
        [conv("x", "a", pads=[1] * 4), op("Concat", "part a", "c", axis=1), bn("c", "y", "bn8")],
    ),
    "sum before": (IMAGE, [conv("x", "a"), conv("x", "b"), op("Add", "a b", "c"), bn("c", "y")]),
    "map of biases before": (IMAGE, [conv("x", "v", pads=[1] * 4), op("Add", "map v", "a"), bn("a", "y")]),
    "slice of rows before": (IMAGE, [conv("x", "v"), op("Slice", "v s1 s3 axis3", "s"), bn("s", "y")]),
    "slice of channels before": (
        IMAGE,
        [conv("x", "v", "grouped", group=2), op("Slice", "v s1 s5 axis1", "s"), bn("s", "y")],
    ),
    "matmul and transpose before": (
        ("n", 6, 4),
        [op("MatMul", "x fc4", "m"), op("Transpose", "m", "t", perm=[0, 2, 1]), bn("t", "y")],
    ),
    "matmul with the constant on the left before": (
        ("n", 4, 6),
        [op("MatMul", "left4 x", "m"), bn("m", "y")],
    ),
    "dropout before": (IMAGE, [conv("x", "v"), op("Dropout", "v", "d"), bn("d", "y")]),
    "relu before, positive scale": (
        IMAGE,
        [conv("x", "v"), op("Relu", "v", "r"), bn("r", "y", "positive_unshifted")],
    ),
    "norm after norm": (IMAGE, [conv("x", "v"), bn("v", "u"), bn("u", "y", "bn2")]),
    # arithmetic as other tools' layers leave it
    "sub, div, mul, add": (
        IMAGE,
        [
            conv("x", "v"),
            op("Sub", "v mean", "a"),
            op("Div", "a std", "b"),
            op("Mul", "gain b", "c"),
            op("Add", "c offset", "y"),
        ],
    ),
    "constant minus": (IMAGE, [conv("x", "v"), op("Sub", "mean v", "y")]),
    "arithmetic before conv": (IMAGE, [op("Sub", "x mean", "a"), op("Div", "a std", "b"), conv("b", "y")]),
    "arithmetic around a norm": (
        IMAGE,
        [conv("x", "v"), op("Mul", "v gain", "a"), bn("a", "b"), op("Add", "b one", "y")],
    ),
    "arithmetic on the last axis": (("n", 6, 4), [op("MatMul", "x fc4", "m"), op("Mul", "m four", "y")]),
}
CONSTANTS["fc4"], CONSTANTS["left4"] = _random(4, 4), _random(4, 4)


def graph(case: Case, **extra: Any) -> onnx.ModelProto:
    shape, nodes = case
    used = {name for n in nodes for name in n.input}
    return build(nodes, shape, {name: array for name, array in CONSTANTS.items() if name in used}, **extra)


def example(shape: Sequence[int | str]) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(0, 1, [{"n": 2, "h": 1}.get(d, d) for d in shape]).astype(np.float32)


def check_same(model: onnx.ModelProto, fold: Fold, x: np.ndarray) -> None:
    """The folded file is no farther from float64 than the unfolded one, but for rounding."""
    onnx.checker.check_model(fold.model, full_check=True)
    # onnx's reference has no grouped ConvTranspose.
    oracle = run_in_float64 if count(model, "ConvTranspose") else evaluate_in_float64
    for truth, before, after in zip(
        oracle(model, x), run_plainly(model, x), run_plainly(fold.model, x), strict=True
    ):
        assert after.shape == truth.shape
        rounding = 4 * np.finfo(np.float32).eps * np.abs(truth).max()
        assert np.abs(after - truth).max() <= np.abs(before - truth).max() + rounding


@pytest.mark.parametrize("name", FOLDS)
def test_it_folds(name: str) -> None:
    model = graph(FOLDS[name])
    fold = fold_onnx(model, leftover="bn")
    assert {site.action for site in fold.sites} == {"folded"}, fold.sites
    assert all(site.into and not site.reason for site in fold.sites)
    assert count(fold.model) == fold.batch_norm_nodes == 0
    arithmetic = ("BatchNormalization", "Mul", "Div", "Add", "Sub")
    others = [n.op_type for n in FOLDS[name][1] if n.op_type not in arithmetic]
    assert [n.op_type for n in fold.model.graph.node if n.op_type not in arithmetic] == others
    assert sum(count(fold.model, kind) for kind in arithmetic) <= 1
    check_same(model, fold, example(FOLDS[name][0]))


#: Operators whose parameters were attributes once, at the last opset where they were.
OLDER: dict[str, tuple[int, Case]] = {
    "mean": (17, (IMAGE, [bn("x", "n"), op("ReduceMean", "n", "p", axes=[2, 3]), conv("p", "y", "w1")])),
    "squeeze": (
        12,
        (
            IMAGE,
            [
                bn("x", "n"),
                op("Unsqueeze", "n", "u", axes=[1]),
                op("Squeeze", "u", "s", axes=[1]),
                conv("s", "y"),
            ],
        ),
    ),
    "slice": (
        9,
        (
            IMAGE,
            [bn("x", "n"), op("Slice", "n", "s", starts=[1], ends=[3], axes=[1]), conv("s", "y", "half")],
        ),
    ),
    "pad": (
        10,
        (
            IMAGE,
            [
                bn("x", "n", "unshifted"),
                op("Pad", "n", "p", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0),
                conv("p", "y"),
            ],
        ),
    ),
    "pad by the edge": (
        10,
        (IMAGE, [bn("x", "n"), op("Pad", "n", "p", pads=[0, 0, 1, 1] * 2, mode="edge"), conv("p", "y")]),
    ),
    "dropout": (11, (IMAGE, [bn("x", "n"), op("Dropout", "n", "d", ratio=0.5), conv("d", "y")])),
    "newest": (NEWEST, (IMAGE, [bn("x", "n"), op("Flatten", "n", "f"), op("Gemm", "f flat b5", "y")])),
}


@pytest.mark.parametrize("name", OLDER)
def test_it_folds_at_every_opset(name: str) -> None:
    opset, case = OLDER[name]
    model = graph(case, opset=opset)
    fold = fold_onnx(model, leftover="bn")
    assert [site.action for site in fold.sites] == ["folded"], fold.sites
    assert fold.model.opset_import[0].version == opset
    check_same(model, fold, example(case[0]))


SECOND_OUTPUT = {"outputs": ["y", "n"]}
#: What must not fold: the graph, a part of the reason, and what else the graph has.
REFUSALS: dict[str, tuple[Case, str, dict[str, Any]]] = {
    "padded conv": ((IMAGE, [bn("x", "n"), conv("n", "y", pads=[1] * 4)]), "Conv pads with zeros", {}),
    "conv padded on one side": (
        (IMAGE, [bn("x", "n"), conv("n", "y", pads=[0, 0, 0, 1])]),
        "Conv pads with zeros",
        {},
    ),
    "conv padded to the same size": (
        (IMAGE, [bn("x", "n"), conv("n", "y", auto_pad="SAME_LOWER")]),
        "Conv pads with zeros",
        {},
    ),
    "one of two convs is padded": (
        (IMAGE, [bn("x", "n"), conv("n", "a", "w1"), conv("n", "b", pads=[1] * 4), op("Mul", "a b", "y")]),
        "Conv pads with zeros",
        {},
    ),
    "transposed conv": (
        (IMAGE, [bn("x", "n"), op("ConvTranspose", "n wt", "y")]),
        "overlap unevenly",
        {},
    ),
    "strided transposed conv of one position": (
        (IMAGE, [bn("x", "n"), op("ConvTranspose", "n wt1", "y", strides=[2, 2])]),
        "overlap unevenly",
        {},
    ),
    "average pool that counts its padding": (
        (
            IMAGE,
            [
                bn("x", "n"),
                op("AveragePool", "n", "p", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
                conv("p", "y"),
            ],
        ),
        "AveragePool counts its padding",
        {},
    ),
    "max pool of a negative scale": (
        (IMAGE, [bn("x", "n"), op("MaxPool", "n", "p", kernel_shape=[2, 2]), conv("p", "y")]),
        "MaxPool commutes only with scales that are not negative",
        {},
    ),
    "relu": (
        (IMAGE, [bn("x", "n", "positive"), op("Relu", "n", "r"), conv("r", "y")]),
        "Relu does not commute",
        {},
    ),
    "zero padding": (
        (IMAGE, [bn("x", "n"), op("Pad", "n pads", "p"), conv("p", "y")]),
        "Pad fills with a constant",
        {},
    ),
    "channels turned round": (
        (IMAGE, [bn("x", "n"), op("Slice", "n minus1 least axis1 minus1", "s"), conv("s", "y")]),
        "Slice turns the channels round",
        {},
    ),
    "gemm along the batch": (
        ((4, 4), [bn("x", "n"), op("Gemm", "n fc", "y", transA=1)]),
        "axis 0 of 2",
        {},
    ),
    "channels mixed with rows": (
        (IMAGE, [bn("x", "n"), op("Reshape", "n to_mixed", "r"), op("MatMul", "r long", "y")]),
        "does not act on the 6 input channels of MatMul",
        {},
    ),
    "flatten of unknown size": (
        (("n", 4, "h", 36), [bn("x", "n"), op("Flatten", "n", "f"), op("MatMul", "f flat", "y")]),
        "cannot be followed through Flatten",
        {},
    ),
    "an output": ((IMAGE, [bn("x", "n"), conv("n", "y")]), "its result is an output", SECOND_OUTPUT),
    "weight is an input": (
        (IMAGE, [bn("x", "n"), conv("n", "y")]),
        "the weight of Conv is a graph input",
        {"also_inputs": ["w"]},
    ),
    "a filter made of it": (
        ((4, 4, 3, 3), [bn("x", "n"), op("Relu", "x", "r"), conv("r", "y", "n")]),
        "the weight or the bias of Conv",
        {},
    ),
    "two ways": (
        (IMAGE, [bn("x", "n"), op("Concat", "n n", "c", axis=1), conv("c", "y", "wide")]),
        "by two ways",
        {},
    ),
    "training": (
        (IMAGE, [bn("x", "n"), op("Dropout", "n one yes", "d"), conv("d", "y")]),
        "Dropout may be in training",
        {},
    ),
    "no rule": ((IMAGE, [bn("x", "n"), op("Sigmoid", "n", "s"), conv("s", "y")]), "Sigmoid neither", {}),
    "scale into a sum": (
        (IMAGE, [bn("x", "n"), op("Relu", "x", "r"), op("Add", "n r", "a"), conv("a", "y")]),
        "Add has another operand",
        {},
    ),
    "crop": (
        (
            IMAGE,
            [
                bn("x", "n"),
                node(
                    "Resize",
                    ["n", "corners", "double"],
                    ["r"],
                    coordinate_transformation_mode="tf_crop_and_resize",
                ),
                conv("r", "y"),
            ],
        ),
        "tf_crop_and_resize",
        {},
    ),
    "part of a split": (
        (
            IMAGE,
            [
                conv("x", "v", pads=[1] * 4),
                op("Split", "v halves", "a b", axis=1),
                bn("a", "n", "bn_half"),
                op("Concat", "n b", "y", axis=1),
            ],
        ),
        "Split has other outputs",
        {},
    ),
    "a branch of a concat that stays": (
        (
            IMAGE,
            [
                conv("x", "a", pads=[1] * 4),
                op("Relu", "x", "b"),
                op("Concat", "a b", "c", axis=1),
                bn("c", "y", "bn8"),
            ],
        ),
        "beyond Concat, Relu does not commute",
        {},
    ),
    "a sum with the input": (
        (IMAGE, [conv("x", "a", pads=[1] * 4), op("Add", "a x", "c"), bn("c", "y")]),
        "beyond Add, there is an input of the graph",
        {},
    ),
    "max pool before, negative scale": (
        (IMAGE, [conv("x", "v"), op("MaxPool", "v", "p", kernel_shape=[2, 2]), bn("p", "y")]),
        "MaxPool commutes only",
        {},
    ),
    "norm of a flattened map": (
        (IMAGE, [conv("x", "v", pads=[1] * 4), op("Flatten", "v", "f"), bn("f", "y", "bn144")]),
        "does not act on the 4 output channels of Conv",
        {},
    ),
    "beside its channels": (
        (("n", 4, 4, 6), [op("MatMul", "x long", "m"), bn("m", "y")]),
        "does not act on the 6 output channels",
        {},
    ),
}
CONSTANTS |= _norm("bn_half", 2) | {"corners": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32)}


@pytest.mark.parametrize("leftover", ["bn", "affine"])
@pytest.mark.parametrize("name", REFUSALS)
def test_it_stays_true_and_says_why(name: str, leftover: str) -> None:
    case, reason, extra = REFUSALS[name]
    model = graph(case, **extra)
    fold = fold_onnx(model, leftover=leftover)
    (site,) = fold.sites
    assert site.action == ("kept" if leftover == "bn" else "rewritten")
    assert reason in site.reason
    if name == "training":  # random by its nature
        return
    check_same(model, fold, example(case[0]))
