"""The yardstick: float noise is told from a fault where torch's own forward alone says too little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from renormify.onnx import export_onnx, verify_onnx
from renormify.onnx.rounding import rounded_otherwise


def with_weights(path: Path, rank: int, change: Callable[[np.ndarray], None]) -> Path:
    """Another file, with the weights of that rank changed."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if len(tensor.dims) == rank and tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path.with_name("changed.onnx"))
    return path.with_name("changed.onnx")


# torch's forward over an even ground makes exact sums, and what folding rounds does not show in it.
@pytest.mark.parametrize("seed", range(3))
def test_sums_that_cancel_on_an_even_ground(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        edges = torch.round(model[0].weight * 256)
        model[0].weight.copy_((edges - edges.mean((1, 2, 3), keepdim=True).round()) / 256)
        model[1].running_var.uniform_(1e-3, 1e-2)
        model[1].weight.uniform_(0.5, 1.5)
    x = torch.full((2, 3, 12, 12), -256.0)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x, layers=True)
    assert parity.passed, [record.reason for record in parity.outputs]
    assert [layer.reason for layer in parity.layers if not layer.passed] == []


def test_weights_are_rounded_otherwise_in_their_last_place_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = rounded_otherwise(model, 0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for key, value in other.state_dict().items():
        places = np.abs(value.numpy() - before[key].numpy()) / np.spacing(np.abs(before[key].numpy()))
        assert places.max() <= 2.0  # of the number itself: one of the power of two below it
    moved = other[0].weight != model[0].weight
    assert 0.5 < moved.double().mean() < 0.8


class Last(nn.Module):
    """A Conv whose channels are the last axis, as in a model that came from TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


def test_a_small_channel_beside_a_large_one_in_the_last_axis(tmp_path: Path) -> None:
    model, x = Last(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.conv.weight[0] *= 1e4
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    assert verify_onnx(model, path, x).passed
    parity = verify_onnx(model, with_weights(path, 4, lambda w: w[1].__imul__(np.float32(1.001))), x)
    assert [record.passed for record in parity.outputs] == [False] * 3


def test_a_channel_that_is_constant_beside_a_large_one(tmp_path: Path) -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.weight[0] *= 1e5
        model.weight[1], model.bias[1] = 0.0, 0.75
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    assert verify_onnx(model, path, x).passed
    parity = verify_onnx(model, with_weights(path, 1, lambda bias: bias[1:2].__iadd__(np.float32(1e-3))), x)
    assert [record.passed for record in parity.outputs] == [False] * 3


class Chance(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 3), kind
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.kind == "dropout":
            return F.dropout(y)
        if self.kind == "little":
            return y + 1e-5 * torch.rand_like(y)
        if self.kind == "integers":
            return (torch.rand_like(y) * 100).long()
        self.calls += 1
        return y + self.calls


@pytest.mark.parametrize("kind", ["dropout", "little", "integers", "state"])
def test_what_changes_from_call_to_call_is_never_proven(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Chance(kind), torch.randn(2, 4)
    parity = verify_onnx(model, export_onnx(model, x, tmp_path / "m.onnx").path, x)
    assert not parity.passed
    reasons = {record.reason for record in parity.outputs}
    assert all(reasons)
    if kind != "state":
        assert any("differs from one call to the next" in reason for reason in reasons)


def test_a_silu_is_granted_what_its_sigmoid_is_off_by(tmp_path: Path) -> None:
    # onnxruntime's Sigmoid is exact to an ulp of 1, and x times that is much where SiLU is all but 0.
    model, x = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Unflatten(1, (8, 8))), torch.randn(2, 32)
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-18, 2, 64))
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x)
    assert parity.passed, [record.reason for record in parity.outputs]
    changed = with_weights(path, 1, lambda bias: bias[-1:].__iadd__(np.float32(1e-5)))
    assert not verify_onnx(model, changed, x).passed
