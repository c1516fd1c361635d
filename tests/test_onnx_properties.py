"""Random networks: folded equals unfolded, whatever the graph; ``make fold-properties`` tries more."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_graphs import Arrays, batch_norm, batch_norm_parts, build, count, run_in_float64, run_plainly

from renormify.onnx import fold_onnx

EXAMPLES = int(os.environ.get("FOLD_EXAMPLES", "60"))
node = helper.make_node
KINDS = ("conv", "pointwise", "bn", "bn", "bn", "chain", "add", "map", "concat", "relu", "max", "average")


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


class Sketch:
    """A network on 4 channels and 6 x 6 positions, drawn node by node."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.seed = draw(st.integers(0, 2**16))
        self.constants: Arrays = {}
        self.nodes: list[onnx.NodeProto] = []
        self.values = ["x"]

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.setdefault(name, array)
        return name

    def add(self, op_type: str, inputs: list[str], target: str, **attributes: Any) -> None:
        self.nodes.append(node(op_type, inputs, [target], name=f"{op_type}_{target}", **attributes))

    def norm(self, source: str, target: str, channels: int = 4) -> None:
        name = f"bn_{target}"
        parts = batch_norm_parts(name, channels, np.random.default_rng(self.seed + len(self.nodes)))
        if self.draw(st.booleans()):  # of one sign, as max pooling wants it
            parts[f"{name}.scale"] = np.abs(parts[f"{name}.scale"])
        if self.draw(st.integers(0, 3)) == 0:  # without a shift, as rectifiers and padding want it
            parts[f"{name}.mean"][:] = parts[f"{name}.bias"][:] = 0
        self.constants |= parts
        self.nodes.append(batch_norm(source, target, name))

    def step(self, index: int) -> None:
        draw, values, target = self.draw, self.values, f"t{index}"
        kind = draw(st.sampled_from(KINDS))
        source = values[draw(st.integers(max(0, len(values) - 2), len(values) - 1))]
        other = draw(st.sampled_from(values))
        seed = self.seed + index
        if kind == "conv":
            weight = self.constant(
                draw(st.sampled_from([f"w{index}", "w"])), normal(4, 4, 3, 3, seed=seed) / 6
            )
            self.add("Conv", [source, weight], target, pads=[1] * 4)
        elif kind == "pointwise":
            weight = self.constant(
                draw(st.sampled_from([f"p{index}", "p"])), normal(4, 4, 1, 1, seed=seed) / 2
            )
            self.add("Conv", [source, weight], target)
        elif kind == "bn":
            self.norm(source, target)
        elif kind == "chain":
            names = [self.constant(f"c{index}{k}", normal(4, 1, 1, seed=seed + k)) for k in range(2)]
            self.constants[names[1]] = np.abs(self.constants[names[1]]) + np.float32(0.5)
            self.add("Sub", [source, names[0]], f"{target}a")
            self.add("Div", [f"{target}a", names[1]], target)
        elif kind == "add":
            self.add("Add", [source, other], target)
        elif kind == "map":
            self.add("Add", [self.constant(f"m{index}", normal(1, 4, 6, 6, seed=seed)), source], target)
        elif kind == "concat":
            weight = self.constant(f"w{index}", normal(4, 8, 1, 1, seed=seed) / 3)
            self.add("Concat", [source, other], f"{target}c", axis=1)
            joined = f"{target}c"
            if draw(st.booleans()):
                self.norm(joined, f"{target}n", 8)
                joined = f"{target}n"
            self.add("Conv", [joined, weight], target)
        elif kind == "relu":
            self.add("Relu", [source], target)
        else:
            extra = {} if kind == "max" else {"count_include_pad": draw(st.integers(0, 1))}
            operator = "MaxPool" if kind == "max" else "AveragePool"
            self.add(operator, [source], target, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1], **extra)
        values.append(target)

    def head(self) -> None:
        """A classifier behind it all, with a norm somewhere in it."""
        last, where = self.values[-1], self.draw(st.integers(0, 2))
        for place, op_type in enumerate(("GlobalAveragePool", "Flatten")):
            if place == where:
                self.norm(last, f"h{place}n")
                last = f"h{place}n"
            self.add(op_type, [last], f"h{place}")
            last = f"h{place}"
        self.constant("fc", normal(4, 3, seed=self.seed))
        self.add(self.draw(st.sampled_from(["Gemm", "MatMul"])), [last, "fc"], "head")
        self.values.append("head")


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Graphs of Conv, BatchNormalization, arithmetic, Add, Concat, Relu, pooling, perhaps a classifier."""
    sketch = Sketch(draw)
    for index in range(draw(st.integers(2, 8))):
        sketch.step(index)
    if draw(st.booleans()):
        sketch.head()
    outputs = [sketch.values[-1]]
    if draw(st.booleans()) and len(sketch.values) > 2:
        outputs.append("t0")
    return build(sketch.nodes, ("n", 4, 6, 6), sketch.constants, outputs=outputs)


@given(model=networks(), leftover=st.sampled_from(["bn", "affine", "conv", "auto"]))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_random_networks_stay_the_same(model: onnx.ModelProto, leftover: str) -> None:
    x = normal(2, 4, 6, 6, seed=1)
    fold = fold_onnx(model, leftover=leftover)
    onnx.checker.check_model(fold.model, full_check=True)
    assert sum(site.kind == "BatchNormalization" for site in fold.sites) == count(model)
    assert all(bool(site.reason) == (site.action != "folded") for site in fold.sites)
    truths, before = run_in_float64(model, x), run_plainly(model, x)
    for truth, exact, plain, after in zip(
        truths, run_in_float64(fold.model, x), before, run_plainly(fold.model, x), strict=True
    ):
        # Through eight layers that may cancel, rounded weights show a little more than one rounding.
        scale = max(1.0, float(np.abs(truth).max()))
        np.testing.assert_allclose(exact, truth, rtol=0, atol=2e-5 * scale)
        assert np.abs(after - truth).max() <= np.abs(plain - truth).max() + 2e-5 * scale
