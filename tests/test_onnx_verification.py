"""The judge: what it passes, and every planted fault it must not."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from renormify import errors
from renormify.onnx import Parity, export_onnx, verify_onnx
from renormify.onnx.precision import kernel_error
from renormify.onnx.reference import KINDS
from renormify.onnx.verification import THOROUGH


class TwoHeads(nn.Module):
    """A small trained-looking network with two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
        )
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return self.left(features), self.right(features)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, bytes]:
    torch.manual_seed(0)
    model = TwoHeads()
    for norm in (model.body[1], model.body[4]):
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(1e-3, 2)
            norm.weight.normal_(1, 0.3)
            norm.bias.normal_()
    x = torch.randn(2, 3, 8, 8)
    path = export_onnx(model, x, tmp_path_factory.mktemp("exported") / "model.onnx", fold=False).path
    return model, x, path.read_bytes()


@pytest.fixture
def model(exported: tuple[nn.Module, Tensor, bytes]) -> nn.Module:
    return copy.deepcopy(exported[0]).eval()


@pytest.fixture
def x(exported: tuple[nn.Module, Tensor, bytes]) -> Tensor:
    return exported[1]


@pytest.fixture
def path(exported: tuple[nn.Module, Tensor, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported[2])
    return path


def edited(path: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(path)
    edit(proto)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    return path


def set_weight(proto: onnx.ModelProto, change: Callable[[np.ndarray], None], rank: int = 4) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == rank)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def test_same_model_passes_with_its_figures(model: nn.Module, path: Path, x: Tensor) -> None:
    model.train()
    model.body[1].eval()
    flags = [module.training for module in model.modules()]
    parity = verify_onnx(model, path, x)
    assert [module.training for module in model.modules()] == flags
    assert parity.passed
    assert (parity.path, parity.first_divergence, parity.notes) == (path, None, ())
    assert [(record.batch_size, record.shape) for record in parity.outputs] == [
        (size, (size, 5)) for size in (1, 2, 7) for _ in range(2)
    ]
    for record in parity.outputs:
        assert record.max_abs is not None
        assert record.floor is not None
        assert record.tolerance is not None
        assert 0 < record.floor < record.tolerance < 1e-5
        assert record.max_abs <= record.tolerance
        assert record.top1 == 1.0
    assert json.loads(json.dumps(parity.to_dict(), allow_nan=False))["passed"] is True


def fault_weight(proto: onnx.ModelProto) -> None:
    set_weight(proto, lambda w: w.__setitem__((0, 0, 0, 0), w[0, 0, 0, 0] + 1e-3))


def fault_swapped(proto: onnx.ModelProto) -> None:
    first, second = proto.graph.output
    swapped = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in (second, first)]
    del proto.graph.output[:]
    proto.graph.output.extend(swapped)


def fault_nan(proto: onnx.ModelProto) -> None:
    set_weight(proto, lambda w: w.__setitem__(0, np.nan))


def fault_inf(proto: onnx.ModelProto) -> None:
    set_weight(proto, lambda w: w.__setitem__((0, 0), np.inf), rank=2)


def fault_removed(proto: onnx.ModelProto) -> None:
    del proto.graph.output[1]


def fault_extra(proto: onnx.ModelProto) -> None:
    conv = next(node for node in proto.graph.node if node.op_type == "Conv")
    proto.graph.output.append(helper.make_tensor_value_info(conv.output[0], 1, ["batch", 8, 8, 8]))


def fault_eps(proto: onnx.ModelProto) -> None:
    norm = next(node for node in proto.graph.node if node.op_type == "BatchNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-5


def fault_shape(proto: onnx.ModelProto) -> None:
    head = next(node for node in proto.graph.node if node.output[0] == proto.graph.output[0].name)
    head.output[0] = "inner"
    axes = numpy_helper.from_array(np.array([0]), "axes")
    proto.graph.initializer.append(axes)
    name = proto.graph.output[0].name
    proto.graph.node.append(helper.make_node("Unsqueeze", ["inner", "axes"], [name]))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, 1, [1, "batch", 5]))


def fault_dtype(proto: onnx.ModelProto) -> None:
    head = next(node for node in proto.graph.node if node.output[0] == proto.graph.output[0].name)
    head.output[0] = "inner"
    name = proto.graph.output[0].name
    proto.graph.node.append(helper.make_node("Cast", ["inner"], [name], to=onnx.TensorProto.DOUBLE))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


FAULTS = {
    fault_weight: "more than the tolerance",
    fault_swapped: "more than the tolerance",
    fault_nan: "the file's output is NaN",
    fault_inf: "the file's output is",
    fault_removed: "1 outputs, the model 2: this one is missing",
    fault_extra: "3 outputs, the model 2: this one is extra",
    fault_eps: "more than the tolerance",
    fault_shape: "its shape is (1, 1, 5), torch's (1, 5)",
    fault_dtype: "its type is float64, torch's float32",
}


# The layer that each is in; what is wrong with the outputs themselves is in none.
LAYERS = {fault_weight: "body.0", fault_nan: "body.0", fault_inf: "left", fault_eps: "body.1"}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: Callable[[Any], None], model: nn.Module, path: Path, x: Tensor) -> None:
    assert verify_onnx(model, path, x).passed
    parity = verify_onnx(model, edited(path, fault), x)
    assert not parity.passed
    # Each batch size by itself shows it.
    for size in (1, 2, 7):
        failed = [record for record in parity.outputs if record.batch_size == size and not record.passed]
        assert failed
    assert FAULTS[fault] in next(record.reason for record in parity.outputs if not record.passed)
    assert parity.first_divergence == LAYERS.get(fault)
    assert any(("at " if fault in LAYERS else "is not known: ") in note for note in parity.notes)
    json.dumps(parity.to_dict(), allow_nan=False)


def test_swapped_outputs_are_told_by_name(model: nn.Module, path: Path, x: Tensor) -> None:
    parity = verify_onnx(model, edited(path, fault_swapped), x)
    assert [record.reason.rpartition("; ")[2] for record in parity.outputs[:2]] == [
        f"it is what the model returns as output {other}: the outputs are out of order" for other in (1, 0)
    ]


def test_a_nan_in_one_channel_is_told_by_its_number(model: nn.Module, path: Path, x: Tensor) -> None:
    parity = verify_onnx(model, edited(path, fault_inf), x)
    assert "all in channel 0" in parity.outputs[0].reason


def test_a_baked_batch_size(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    path = export_onnx(model, x, tmp_path / "baked.onnx", dynamic_batch=False).path
    parity = verify_onnx(model, path, x)
    assert [size for size in (1, 2, 7) if _passed_at(parity, size)] == [2]
    assert all(
        "onnxruntime cannot run the file at batch size" in record.reason
        and record.reason.endswith("input 'x' has the batch size 2 baked in")
        for record in parity.outputs
        if not record.passed
    )


def _passed_at(parity: Parity, size: int) -> bool:
    return all(record.passed for record in parity.outputs if record.batch_size == size)


def test_tolerances_that_are_given(model: nn.Module, path: Path, x: Tensor) -> None:
    edited(path, fault_weight)
    assert not verify_onnx(model, path, x, atol=0.0).passed
    assert not verify_onnx(model, path, x, rtol=1e-6).passed
    loose = verify_onnx(model, path, x, rtol=0.0, atol=1.0)
    assert loose.passed
    assert {record.tolerance for record in loose.outputs} == {1.0}
    assert not verify_onnx(model, edited(path, fault_nan), x, atol=1e30).passed


def test_one_row_and_one_number_are_no_luck(tmp_path: Path) -> None:
    # With one element the floor of a single forward may be 0: it is taken over more rows.
    model = nn.Sequential(
        *[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())], nn.Linear(64, 1)
    )
    x = torch.randn(1, 64)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    (record,) = verify_onnx(model, path, x, batch_sizes=(1,)).outputs
    assert record.passed
    assert record.floor


def test_a_small_error_in_every_element(tmp_path: Path) -> None:
    model, x = nn.Linear(4096, 1000), torch.randn(1, 4096)
    x[0, 7] = 1.0
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    assert verify_onnx(model, path, x).passed
    with torch.no_grad():
        model.weight[:, 7] += 1.5e-6
    parity = verify_onnx(model, path, x)
    assert not parity.passed
    assert {record.reason.split(" is ")[0] for record in parity.outputs if not record.passed} == {
        "the root mean square of the differences"
    }


def test_torch_itself_is_nan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    parity = verify_onnx(model, path, x)
    assert not parity.passed
    assert "the model's own output is NaN" in parity.outputs[0].reason


class Named(NamedTuple):
    logits: Tensor
    label: Tensor


class Mixed(nn.Module):
    """Integers in, a dict with None, a named tuple and an integer tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6 + 4, 3)

    def forward(self, ids: Tensor, extra: dict[str, Tensor]) -> dict[str, Any]:
        logits = self.head(torch.cat([self.table(ids).mean(1), extra["x"]], 1))
        return {"out": Named(logits, logits.argmax(1)), "nothing": None}


def test_nested_arguments_and_outputs(tmp_path: Path) -> None:
    model, args = Mixed(), (torch.randint(0, 11, (3, 5)), {"x": torch.randn(3, 4)})
    path = export_onnx(model, args, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, args)
    assert parity.passed, parity
    assert [record.shape for record in parity.outputs[:2]] == [(1, 3), (1,)]
    assert [record.top1 for record in parity.outputs[:2]] == [1.0, None]
    assert any("no tensors" in note for note in parity.notes)
    with torch.no_grad():
        model.head.bias[:] = torch.tensor([100.0, 0.0, 0.0])
    labels = [record for record in verify_onnx(model, path, args).outputs if record.shape == (7,)]
    assert not labels[0].passed


def test_an_input_too_many(model: nn.Module, path: Path, x: Tensor) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    parity = verify_onnx(Two(), path, (x, x))
    assert not parity.passed
    assert "the file takes 1 inputs, the example has 2" in parity.outputs[0].reason


def test_without_a_float64_model(model: nn.Module, path: Path, x: Tensor) -> None:
    class Stubborn(TwoHeads):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    stubborn = Stubborn()
    stubborn.load_state_dict(model.state_dict())
    parity = verify_onnx(stubborn, path, x)
    assert parity.passed
    assert "no float64 model to compare with (RuntimeError: no copies)" in parity.notes[0]
    assert all(record.floor is None for record in parity.outputs)
    with torch.no_grad():
        stubborn.left.weight.mul_(1.001)
    assert not verify_onnx(stubborn, path, x).passed
    assert verify_onnx(model.forward, path, x).passed  # a plain callable


def test_bad_input(model: nn.Module, path: Path, x: Tensor, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model\n")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(errors.CheckpointError, match="no ONNX file at"):
        verify_onnx(model, tmp_path / "missing.onnx", x)
    for name in ("text.onnx", "empty.onnx"):
        with pytest.raises(errors.CheckpointError, match="is not an ONNX file"):
            verify_onnx(model, tmp_path / name, x)
    with pytest.raises(errors.InputError, match=r"runtimes among onnxruntime, .*tensorrt"):
        verify_onnx(model, path, x, runtimes=("tensorrt",))
    for sizes in ((0, 1), (-2,), (2.0,), (True,), (), 2, ("2",)):
        with pytest.raises(errors.InputError, match="batch_sizes of integers of at least 1"):
            verify_onnx(model, path, x, batch_sizes=sizes)  # type: ignore[arg-type]
    with pytest.raises(errors.InputError, match="example input"):
        verify_onnx(model, path, ())
    with pytest.raises(errors.InputError, match="at least 0"):
        verify_onnx(model, path, x, atol=-1.0)


class Kinds(nn.Module):
    """A float output, a mask, a count beyond 53 bits, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("count", torch.tensor([2**60 + 1, 0, 0]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        return y, y > 0, (y * 0).long() + self.count, y[:, :0]


def test_masks_and_integers_are_compared_by_equality(tmp_path: Path) -> None:
    model, x = Kinds(), torch.randn(2, 4)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x)
    assert parity.passed, parity
    for record in parity.outputs:
        if record.shape == (record.batch_size, 3):
            assert (record.floor is None) == (record.tolerance == 0.0)

    def other(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64 and 2**60 + 1 in numpy_helper.to_array(tensor):
                changed = numpy_helper.to_array(tensor) - np.array([1, 0, 0])
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        greater = next(node for node in proto.graph.node if node.op_type == "Greater")
        greater.op_type = "Less"

    parity = verify_onnx(model, edited(path, other), x)
    assert [record.passed for record in parity.outputs] == [True, False, False, True] * 3
    assert "3 of 3 elements differ" in parity.outputs[1].reason
    assert parity.outputs[2].max_abs == 1.0
    json.dumps(parity.to_dict(), allow_nan=False)


class Odd(TwoHeads):
    """Returns what no ONNX file can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        left, right = super().forward(x)
        if self.kind == "complex":
            return left, torch.complex(right, right)
        if self.kind == "sparse":
            return left, right.to_sparse()
        if self.kind == "float8":
            return left, right.to(torch.float8_e4m3fn)
        if self.kind == "text":
            return left, "right"
        if self.kind == "more of them at some sizes":
            return (left, *[right] * len(x))
        return left, right[: len(x) // 2] if self.kind == "fewer rows" else right[0, 0]


@pytest.mark.parametrize(
    "kind", ["complex", "sparse", "float8", "text", "more of them at some sizes", "fewer rows", "scalar"]
)
def test_whatever_a_model_returns_is_a_record(kind: str, model: nn.Module, path: Path, x: Tensor) -> None:
    odd = Odd(kind)
    odd.load_state_dict(model.state_dict())
    parity = verify_onnx(odd, path, x)
    assert not parity.passed
    assert all(record.passed for record in parity.outputs if record.name == parity.outputs[0].name)
    reasons = [record.reason for record in parity.outputs if not record.passed]
    assert all(reasons)
    if kind == "complex":
        assert "the model's own output is complex64, which ONNX files do not have" in reasons[0]
    json.dumps(parity.to_dict(), allow_nan=False)


def test_a_model_that_fails_on_the_example(model: nn.Module, path: Path) -> None:
    with pytest.raises(errors.InputError, match=r"fails at batch size 1: RuntimeError: ") as caught:
        verify_onnx(model, path, torch.randn(2, 4, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_type_that_onnxruntime_does_not_run(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x)
    for record in parity.outputs:
        assert record.passed or record.reason.startswith("onnxruntime cannot run the file")


# the tolerance of one output was that of its largest channel.
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_small_channel_beside_a_large_one(rank: int, tmp_path: Path) -> None:
    model = (nn.Linear(27, 2), nn.Conv1d(3, 2, 3), nn.Conv2d(3, 2, 3))[rank - 2]
    with torch.no_grad():
        model.weight[0] *= 1e6
    x = torch.randn(2, *((27,), (3, 8), (3, 8, 8))[rank - 2])
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    assert verify_onnx(model, path, x).passed
    for factor in (1.5, 1.0001):
        faulty = tmp_path / f"{factor}.onnx"
        faulty.write_bytes(path.read_bytes())
        weight = model.weight.detach().numpy()

        def fault(proto: onnx.ModelProto, weight: np.ndarray = weight, factor: float = factor) -> None:
            tensor = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == rank)
            array = numpy_helper.to_array(tensor).copy()
            # A Linear may be written transposed.
            (array if array.shape == weight.shape else array.T)[1] *= np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

        parity = verify_onnx(model, edited(faulty, fault), x)
        assert [record.passed for record in parity.outputs] == [False] * 3, (factor, parity)


@pytest.mark.parametrize("seed", range(3))
def test_channels_that_are_barely_alive(seed: int, tmp_path: Path) -> None:
    # Behind a ReLU or a clamp a channel shows its noise in a few elements only, or in none.
    torch.manual_seed(seed)
    body = [layer for _ in range(4) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))]
    model = nn.Sequential(*body, nn.Conv2d(64, 512, 1), nn.BatchNorm2d(512), nn.ReLU6())
    with torch.no_grad():
        model[-2].bias.copy_(torch.linspace(-3, 9, 512))
        model[-2].running_var.fill_(0.05)
    x = torch.randn(2, 64, 9, 9)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x)
    assert parity.passed, [record.reason for record in parity.outputs]


def test_a_file_that_no_runtime_loads(model: nn.Module, path: Path, x: Tensor) -> None:
    def unknown_operator(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].domain = "nowhere"
        proto.opset_import.append(helper.make_opsetid("nowhere", 1))

    parity = verify_onnx(model, edited(path, unknown_operator), x)
    assert not parity.passed
    assert all(record.reason.startswith("onnxruntime cannot run the file: ") for record in parity.outputs)


def test_every_measure_is_what_numpy_makes_of_it(model: nn.Module, path: Path, x: Tensor) -> None:
    record = verify_onnx(model, path, x, batch_sizes=(2,)).outputs[0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": x.numpy()})[0].astype(np.float64)
    truth = copy.deepcopy(model).double()(x.double())[0].detach().numpy()
    error = np.abs(theirs - truth)
    assert record.max_abs == pytest.approx(error.max())
    assert record.max_rel == pytest.approx(error.max() / np.abs(truth).max())
    assert record.max_ulp == pytest.approx((error / np.spacing(np.abs(truth).astype(np.float32))).max())
    cosine = (theirs * truth).sum() / np.linalg.norm(theirs) / np.linalg.norm(truth)
    assert record.cosine == pytest.approx(cosine, abs=1e-15)


def test_kinds_of_input_variants_and_levels_beside_one_truth(
    model: nn.Module, path: Path, x: Tensor, tmp_path: Path
) -> None:
    folded = export_onnx(model, x, tmp_path / "folded.onnx").path
    faulty = tmp_path / "faulty.onnx"
    faulty.write_bytes(path.read_bytes())
    variants = {
        "unfolded": path,
        "twin": copy.deepcopy(model).train(),
        "faulty": edited(faulty, fault_weight),
    }
    parity = verify_onnx(model, folded, x, batch_sizes=(2, 3), variants=variants, **THOROUGH)
    failed = {record.variant for record in parity.outputs if not record.passed}
    assert failed == {"faulty"}
    seen = {(record.variant, record.runtime, record.inputs) for record in parity.outputs}
    levels, kinds = ("onnxruntime", "onnxruntime-basic", "onnxruntime-off"), KINDS
    assert kinds == ("example", "normal", "large", "zeros")
    files = {(name, level, kind) for name in ("", "unfolded", "faulty") for level in levels for kind in kinds}
    assert seen == files | {("twin", "torch", kind) for kind in kinds}
    twins = [record for record in parity.outputs if record.variant == "twin"]
    assert all(record.max_abs is not None and record.max_abs <= (record.floor or 0.0) for record in twins)
    assert parity.layers
    assert all(layer.passed for layer in parity.layers)
    assert parity.first_divergence is None  # the file itself is sound


def test_inputs_that_the_model_cannot_take_are_left_out_and_said(tmp_path: Path) -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    model, x = Logarithm(), torch.rand(2, 8) + 1.0
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x, inputs=KINDS)
    assert parity.passed
    assert {record.inputs for record in parity.outputs} == {"example", "large"}
    assert sum("inputs were left out: the model's own outputs are not finite" in n for n in parity.notes) == 2
    with pytest.raises(errors.InputError, match="expected inputs among example, normal, large, zeros"):
        verify_onnx(model, path, x, inputs=("tiny",))


def test_a_sigmoid_is_granted_its_own_precision_and_no_more(tmp_path: Path) -> None:
    # A channel near 0 has a tolerance of its own size; onnxruntime's kernel is exact to an ulp of 1.
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Unflatten(1, (8, 8))), torch.randn(2, 32)
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-18, 2, 64))
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    parity = verify_onnx(model, path, x)
    assert parity.passed, parity

    def shifted(proto: onnx.ModelProto) -> None:
        set_weight(proto, lambda bias: bias.__iadd__(np.float32(1e-5)), rank=1)

    assert not verify_onnx(model, edited(path, shifted), x).passed
    assert 0.0 < kernel_error("onnxruntime", "Sigmoid") < 2 * 2.0**-23
    assert kernel_error("onnxruntime", "Relu") == 0.0


def test_openvino_is_a_judge_too(model: nn.Module, path: Path, x: Tensor) -> None:
    parity = verify_onnx(model, path, x, runtimes=("onnxruntime", "openvino"))
    assert parity.passed, parity
    assert [record.runtime for record in parity.outputs] == ["onnxruntime"] * 6 + ["openvino"] * 6
    assert parity.outputs[4].max_abs != parity.outputs[10].max_abs  # each has errors of its own
    parity = verify_onnx(model, edited(path, fault_weight), x, runtimes=("openvino",))
    assert not parity.passed
    assert parity.first_divergence == "body.0"


def test_without_openvino_the_command_is_said(
    model: nn.Module, path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'renormify\[openvino\]'"):
        verify_onnx(model, path, x, runtimes=("openvino",))


class Detector(nn.Module):
    """Two outputs by name, and a constant that is handed through."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(4, 3), nn.Linear(4, 3)
        self.register_buffer("anchors", torch.randn(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": self.boxes(x), "scores": self.scores(x), "grid": self.anchors, "same": self.boxes(x)}


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ({}, ()),
        ({"boxes": "scores", "scores": "boxes"}, ("boxes", "scores")),
        ({"scores": "logits"}, ("scores",)),
        ({"boxes": "a", "scores": "b", "same": "c"}, ()),  # names of another kind
    ],
)
def test_misnamed_outputs(names: dict[str, str], wrong: tuple[str, ...], tmp_path: Path) -> None:
    model, x = Detector(), torch.randn(2, 4)
    path = export_onnx(model, x, tmp_path / "m.onnx").path

    def rename(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for values in (node.input, node.output):
                values[:] = [names.get(name, name) for name in values]
        for value in proto.graph.output:
            value.name = names.get(value.name, value.name)

    assert [value.name for value in onnx.load(path).graph.output] == ["boxes", "scores", "anchors", "same"]
    parity = verify_onnx(model, edited(path, rename), x)
    assert parity.passed == (not wrong), [record.reason for record in parity.outputs]
    reasons = [record.reason for record in parity.outputs[:4] if not record.passed]
    assert reasons == [f"its name is {names[name]!r}, the model's {name!r}" for name in wrong]
