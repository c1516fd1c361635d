"""Files in every opset from 13 on: what has changed its form, what did not exist yet, what has no form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_graphs import build, run_plainly
from torch import Tensor, nn

from renormify import errors
from renormify.onnx import export_onnx, verify_onnx
from renormify.onnx.constants import Refusal
from renormify.onnx.opsets import lower, newest_opset

node = helper.make_node


class Varied(nn.Module):
    """Operators that are younger than opset 13, or have had another form in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.groups, self.layer, self.linear = nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.mish(F.gelu(F.hardswish(F.relu(self.norm(self.conv(x))))))
        first, second = F.max_pool2d(x, 2).chunk(2, 1)
        x = self.groups(torch.cat([second, first], 1))
        x = F.pad(F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 1, 1, 1)).clamp(-1, 6)
        x = self.linear(self.layer(x.mean((2, 3))))
        return F.softmax(x, -1), x.sum(1), x.amax(1), x.split([1, 3], 1)[1]


# onnxruntime 1.31 stops at 26, below the newest of onnx.
@pytest.mark.parametrize("opset", [13, 17, 26])
def test_a_model_of_many_operators(opset: int, tmp_path: Path) -> None:
    model, x = Varied().eval(), torch.randn(2, 3, 8, 8)
    export = export_onnx(model, x, tmp_path / "m.onnx", opset_version=opset)
    proto = onnx.load(export.path)
    onnx.checker.check_model(proto, full_check=True)
    assert export.opset == proto.opset_import[0].version == opset
    assert export.fold is not None
    assert export.fold.batch_norm_nodes == 0
    assert verify_onnx(model, export.path, x).passed


class Reshaped(nn.Module):
    """What torch exports with allowzero, which opset 13 has not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        means = x.mean((2, 3)).view(x.shape[0], 6, 1, 1) * x
        return torch.flatten(x, 1), x.view(x.size(0), -1), x.reshape(-1, 2, 3, 16).transpose(1, 2), means


def test_shapes_without_a_zero_need_not_allow_one(tmp_path: Path) -> None:
    x = torch.randn(2, 6, 4, 4)
    export = export_onnx(Reshaped().eval(), x, tmp_path / "m.onnx", opset_version=13)
    nodes = onnx.load(export.path).graph.node
    assert sum(each.op_type == "Reshape" for each in nodes) >= 3
    assert not any(attribute.name == "allowzero" for each in nodes for attribute in each.attribute)
    assert verify_onnx(Reshaped().eval(), export.path, x).passed


@pytest.mark.parametrize(("shape", "lowered"), [([0, 3], False), ([2, 3], True)])
def test_a_zero_that_is_allowed_stays_so(shape: list[int], lowered: bool) -> None:
    reshape = node("Reshape", ["x", "shape"], ["y"], allowzero=1)
    model = build([reshape], shape, {"shape": np.array(shape, np.int64)}, opset=18)
    found = lower(ir.from_proto(model), 13)
    assert isinstance(found, Refusal) != lowered


def test_an_old_opset_has_the_ir_version_of_its_time(tmp_path: Path) -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    assert onnx.load(export_onnx(model, x, tmp_path / "m.onnx", opset_version=13).path).ir_version == 7


@pytest.mark.parametrize("opset", [-1, 0, 12, newest_opset() + 1])
def test_an_opset_that_there_is_not(opset: int, tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match=rf"from 13 to {newest_opset()}.* \(got {opset}\)") as caught:
        export_onnx(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", opset_version=opset)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_an_opset_has_no_form_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Sampling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False)

    with pytest.raises(
        errors.ExportError, match=r"in opset 13: GridSample is not an operator.*opset_version=18 needs"
    ):
        export_onnx(Sampling(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", opset_version=13)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def graph(operator: onnx.NodeProto, dtype: int = TensorProto.FLOAT, **constants: Any) -> onnx.ModelProto:
    arrays = {name: np.array(values) for name, values in constants.items()}
    model = build(
        [operator],
        ("n", 4, 6, 6),
        arrays,
        outputs=operator.output,
        opset=18,
        dtype=dtype,
        output_dtype=TensorProto.INT64 if operator.op_type == "Shape" else None,
    )
    model.ir_version = 8
    return model


LOWERED = {
    "axes that were an attribute": graph(node("ReduceMean", ["x", "axes"], ["y"]), axes=[2, 3]),
    "no axes": graph(node("ReduceMax", ["x"], ["y"], keepdims=0)),
    "a default": graph(node("Reshape", ["x", "to"], ["y"], allowzero=0), to=[0, -1]),
    "even parts": graph(node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)),
    "parts": graph(node("Split", ["x", "sizes"], ["y", "z"], axis=1), sizes=[1, 3]),
    "young": graph(node("HardSwish", ["x"], ["y"])),
}


@pytest.mark.parametrize("case", LOWERED)
def test_it_goes_down_and_computes_the_same(case: str) -> None:
    model = LOWERED[case]
    lowered = lower(ir.from_proto(model), 13)
    assert isinstance(lowered, ir.Model)
    proto = ir.to_proto(lowered)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 13
    x = np.random.default_rng(0).normal(0, 1, (2, 4, 6, 6)).astype(np.float32)
    for before, after in zip(run_plainly(model, x), run_plainly(proto, x), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-7)


REFUSED = {
    "has num_outputs": graph(node("Split", ["x"], ["y", "z", "u"], axis=1, num_outputs=3)),
    "has start": graph(node("Shape", ["x"], ["y"], start=1)),
    "is given tensor(int32)": graph(node("Relu", ["x"], ["y"]), dtype=TensorProto.INT32),
    "is given axes": graph(
        node("Pad", ["x", "pads", "", "axes"], ["y"]), pads=np.array([1, 1]), axes=np.array([2])
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_it_says_what_has_no_form(reason: str) -> None:
    refusal = lower(ir.from_proto(REFUSED[reason]), 13)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert "opset 13" in refusal.reason
