"""The export: what the file is like, what is left of the model, and what happens when it fails."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx_graphs import count
from torch import Tensor, nn

from renormify import errors
from renormify.onnx import export_onnx, verify_onnx
from renormify.onnx.noise import Noise

Loaded = tuple[nn.Module, Tensor]


def statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 3)
                module.weight.normal_(1, 0.5)
                module.bias.normal_()
    return model


def small() -> nn.Module:
    return statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).train()


class Calls(nn.Module):
    """One Conv and one BatchNorm, called twice, and a BatchNorm behind a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.other, self.fc, self.last = nn.BatchNorm2d(4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, image: Tensor, more: dict[str, list[Tensor]]) -> dict[str, Any]:
        twice = self.norm(self.conv(self.norm(self.conv(image))))
        other = self.other(self.conv(image))
        return {"twice": twice, "rest": (other, None), "last": self.last(self.fc(more["rows"][0]))}


class Deconvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.ConvTranspose2d(4, 4, 3, groups=4)
        self.norm2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm2(self.deep(F.relu(self.norm(self.up(x))))))


class Untracked(nn.Module):
    """A BatchNorm that has no statistics of its own, in evaluation neither."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Baked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.for_each_row = nn.Parameter(torch.randn(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.for_each_row


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this forward never works")


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_example_gives_a_dynamic_batch(rows: int, tmp_path: Path) -> None:
    model, x = small(), torch.randn(rows, 3, 8, 8)
    export = export_onnx(model, x, str(tmp_path / "m.onnx"))
    proto = onnx.load(export.path)
    assert export.opset == proto.opset_import[0].version
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "output"]
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [node.op_type for node in proto.graph.node] == ["Conv", "Relu"]
    assert verify_onnx(model, export.path, x).passed


def test_modes_come_back_and_nothing_else_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(small(), nn.Dropout(), small()[1].eval())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    assert set(flags) == {True, False}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_fold_is_optional_and_sites_bear_module_paths(tmp_path: Path) -> None:
    model, args = statistics(Calls()), (torch.randn(2, 4, 6, 6), {"rows": [torch.randn(2, 4)]})
    plain = export_onnx(model, args, tmp_path / "plain.onnx", fold=False)
    assert plain.fold is None
    assert count(onnx.load(plain.path)) == 4
    export = export_onnx(model, args, tmp_path / "folded.onnx")
    assert export.fold is not None
    proto = onnx.load(export.path)
    assert count(proto) == export.fold.batch_norm_nodes == count(export.fold.model) == 0
    assert sorted(site.name for site in export.fold.sites) == ["last", "norm", "norm:1", "other"]
    assert [value.name for value in proto.graph.output] == ["twice", "rest_0", "last"]
    for path in (plain.path, export.path):
        assert verify_onnx(model, path, args).passed
    assert export.to_dict()["fold"]["batch_norm_nodes"] == 0


@pytest.mark.parametrize(
    "make", [Deconvolutions, lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())]
)
def test_what_comes_before_takes_it_in(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = statistics(make())
    x = torch.randn(2, 8, 5, 5) if isinstance(model, Deconvolutions) else torch.randn(2, 8)
    export = export_onnx(model, x, tmp_path / "m.onnx")
    assert count(onnx.load(export.path)) == 0
    assert export.fold is not None
    assert {site.action for site in export.fold.sites} == {"folded"}
    assert verify_onnx(model, export.path, x).passed


def test_batch_statistics_are_kept(tmp_path: Path) -> None:
    model, x = Untracked(), torch.randn(4, 3, 8, 8)
    export = export_onnx(model, x, tmp_path / "m.onnx")
    assert export.fold is not None
    # As an operator or as arithmetic, it must not be an affine of fixed statistics.
    assert all(site.action == "kept" for site in export.fold.sites)
    assert verify_onnx(model, export.path, x).passed


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_opset(opset: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, x = small(), torch.randn(2, 3, 8, 8)
    export = export_onnx(model, x, tmp_path / "m.onnx", opset_version=opset)
    assert export.opset == onnx.load(export.path).opset_import[0].version == opset
    assert verify_onnx(model, export.path, x).passed
    assert capfd.readouterr() == ("", "")


def test_the_file_says_nothing_of_the_disk_it_comes_from(tmp_path: Path) -> None:
    path = export_onnx(small(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx").path
    written = path.read_bytes()
    assert b"site-packages" not in written
    assert b".py" not in written
    assert len(written) < 2500


def test_a_baked_batch_is_refused(tmp_path: Path) -> None:
    model, x = Baked().train(), torch.randn(3, 3, 8, 8)
    with pytest.raises(errors.ExportError, match=r"Baked.*dynamic_batch=False"):
        export_onnx(model, x, tmp_path / "m.onnx")
    assert model.training
    assert model.norm.training
    assert not list(tmp_path.iterdir())
    path = export_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False).path
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert verify_onnx(model, path, x, batch_sizes=(3,)).passed


def test_a_failure_leaves_the_old_file_and_the_modes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Failing().train()
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(errors.ExportError, match="Failing: RuntimeError: this forward never works"):
        export_onnx(model, torch.randn(1, 3, 4, 4), tmp_path / "m.onnx")
    assert model.training
    assert model.norm.training
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"old")]
    assert capfd.readouterr() == ("", "")


class KeywordOnly(nn.Module):
    def forward(self, *, x: Tensor) -> Tensor:
        return x


class Branching(nn.Module):
    """Prints, and branches on its data: torch.export logs pages about it."""

    def forward(self, x: Tensor) -> Tensor:
        print("in the forward")
        return x if x.sum() > 0 else -x


def test_a_failure_is_one_line_and_no_log(tmp_path: Path) -> None:
    # In a process of its own: torch's log handlers hold the stderr they were made with.
    code = "import sys; sys.path[:0] = ['tests']; import torch; from test_onnx_exporting import *\n"
    code += "import logging; loggers = [logging.getLogger(n) for n in logging.root.manager.loggerDict]\n"
    code += "before = [(log, log.level, log.disabled) for log in loggers]\n"
    code += f"try: export_onnx(Branching(), torch.randn(2, 3), {str(tmp_path / 'm.onnx')!r})\n"
    code += "except errors.ExportError as error: message = str(error)\n"
    code += "assert before == [(log, log.level, log.disabled) for log in loggers]\n"
    code += "assert 50 < len(message) < 450 and '\\n' not in message, message\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("model", [KeywordOnly(), Branching(), Failing()])
def test_a_fixed_batch_is_advised_only_where_it_helps(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(errors.ExportError) as caught:
        export_onnx(model, torch.randn(2, 3, 4, 4), tmp_path / "m.onnx")
    assert "dynamic_batch" not in str(caught.value)


def test_a_fixed_batch_is_advised_where_it_helps(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * 2 for row in x])

    model, x = Rows(), torch.randn(3, 4)
    with pytest.raises(errors.ExportError, match=r"export_onnx\(\.\.\., dynamic_batch=False\)"):
        export_onnx(model, x, tmp_path / "m.onnx")
    assert export_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False).path.is_file()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))]
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model, x = small(), torch.randn(2, 3, 8, 8)
    wrapped = wrap(model).train()
    export = export_onnx(wrapped, x, tmp_path / "m.onnx")
    assert export.fold is not None
    assert [site.name for site in export.fold.sites] == ["1"]
    assert wrapped.training
    assert model.training
    assert verify_onnx(wrapped, export.path, x).passed


def test_which_inputs_have_a_batch(tmp_path: Path) -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
            return x @ table * scale

    args = (torch.randn(2, 4), torch.randn(4, 3), torch.randn(2, 1))
    proto = onnx.load(export_onnx(Table(), args, tmp_path / "m.onnx").path)
    first = [value.type.tensor_type.shape.dim[0] for value in proto.graph.input]
    assert [dim.dim_param or dim.dim_value for dim in first] == ["batch", 4, "batch"]


def test_bad_input(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(errors.OutputError, match="does not exist"):
        export_onnx(Failing(), x, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(errors.OutputError, match="folder"):
        export_onnx(Failing(), x, tmp_path)
    with pytest.raises(errors.InputError, match=r"torch\.nn\.Module"):
        export_onnx(torch.relu, x, tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(errors.InputError, match="example input"):
        export_onnx(small(), (3,), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_importing_the_package_is_cheap() -> None:
    heavy = "{'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'numpy'}"
    code = f"import sys, renormify.onnx as o; assert not {heavy} & set(sys.modules)"
    code += "; assert sorted(o.__all__) == o.__all__"
    code += "; [getattr(o, name) for name in o.__all__]; assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("name", "sites", "shape"),
    [
        ("mobilenet_v2", 52, (1, 3, 64, 64)),
        ("efficientnet_lite0", 49, (1, 3, 64, 64)),
        ("platelet_unet", 18, (1, 1, 10, 32, 32)),
    ],
)
def test_trained_networks(
    name: str,
    sites: int,
    shape: tuple[int, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make: Callable[[], Loaded] = request.getfixturevalue(name)
    model, _ = make()
    x = torch.randn(shape)
    export = export_onnx(model, x, tmp_path / "m.onnx")
    assert export.fold is not None
    assert [site.action for site in export.fold.sites] == ["folded"] * sites
    modules = dict(model.named_modules())
    assert all(isinstance(modules[site.name], nn.modules.batchnorm._BatchNorm) for site in export.fold.sites)
    proto = onnx.load(export.path)
    assert count(proto) == 0
    assert count(proto, "Mul") == 0  # nothing of it left in another form
    # With a margin of two: the largest share of the tolerance that any input used up was 0.28.
    tolerance = Noise.tolerance
    monkeypatch.setattr(Noise, "tolerance", lambda self, like: tolerance(self, like) / 2)
    parity = verify_onnx(model, export.path, x)
    assert parity.passed, parity
    assert sorted({record.batch_size for record in parity.outputs}) == [1, 2, 7]
    for record in parity.outputs:
        assert record.max_abs is not None
        assert record.floor is not None
        assert record.max_abs <= 4 * record.floor
        assert record.top1 in (None, 1.0)


def test_one_wrong_weight_of_a_trained_network(mobilenet_v2: Callable[[], Loaded], tmp_path: Path) -> None:
    model, x = mobilenet_v2()[0], torch.randn(1, 3, 64, 64)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    proto = onnx.load(path)
    # Of the stem: further in, a ReLU may hide one weight of thousands from float32 altogether.
    stem = next(node for node in proto.graph.node if node.op_type == "Conv")
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == stem.input[1])
    array = onnx.numpy_helper.to_array(weight).copy()
    array[np.unravel_index(np.abs(array).argmax(), array.shape)] += 1e-3
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, path)
    parity = verify_onnx(model, path, x)
    assert [record.passed for record in parity.outputs] == [False] * 3


def test_as_small_as_the_exporters_own_optimizer_makes_it(tmp_path: Path) -> None:
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.models.shufflenetv2 import InvertedResidual as Shuffled

    body = nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(3, 16, 3), InvertedResidual(16, 16, 1, 4), Shuffled(16, 16, 1)
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5))
    model, x = statistics(nn.Sequential(body, head)).eval(), torch.randn(2, 3, 16, 16)
    ours = export_onnx(model, x, tmp_path / "ours.onnx").path
    theirs = tmp_path / "theirs.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        model, (x,), theirs, dynamo=True, verbose=False, external_data=False, dynamic_shapes=shapes
    )
    assert len(onnx.load(ours).graph.node) <= len(onnx.load(theirs).graph.node)
    assert ours.stat().st_size <= theirs.stat().st_size
    assert verify_onnx(model, ours, x).passed


def test_weights_too_large_for_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renormify.onnx.files.LARGEST_MESSAGE", 1000)
    model, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)), torch.randn(2, 3, 8, 8)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 1500
    assert verify_onnx(model, path, x).passed


class AlmostNeutral(nn.Module):
    """What is all but 0 or 1 counts; what is 0 or 1 does not."""

    def forward(self, x):
        return (
            torch.log(torch.relu(x) + 1e-9),
            x * 1.000005,
            1e-9 + x * 1e-9,
            x / 1.000005 - 1e-9,
            (x + 0) * 1,
        )


def test_what_is_almost_neutral_is_not_dropped(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    path = tmp_path / "model.onnx"
    export_onnx(AlmostNeutral(), (x,), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for output, expected in zip(found, AlmostNeutral()(x), strict=True):
        np.testing.assert_allclose(output, expected.numpy(), rtol=1e-6, atol=1e-16)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert (kinds.count("Mul"), kinds.count("Div"), kinds.count("Add"), kinds.count("Sub")) == (2, 1, 2, 1)
