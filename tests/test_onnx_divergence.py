"""The first layer that diverges bears the name it has in the torch model, and no sound layer is blamed."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from renormify.onnx import Parity, export_onnx, fold_onnx, verify_onnx
from renormify.onnx.runtimes import OnnxRuntime

Loaded = tuple[nn.Module, Tensor]


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3.0)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def scopes(node: onnx.NodeProto) -> list[str]:
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return list(ast.literal_eval(entry.value))
    return []


def break_layer(path: Path, name: str, change: Callable[[np.ndarray], None] | None = None) -> Path:
    """Change a weight of the layer of that name, by 1e-3 in one place where nothing else is said."""
    proto = onnx.load(path)
    [node] = [node for node in proto.graph.node if name in scopes(node)[-2:-1] and len(node.input) > 1]
    [tensor] = [tensor for tensor in proto.graph.initializer if tensor.name == node.input[1]]
    array = numpy_helper.to_array(tensor).copy()
    if change is None:
        array.flat[0] += np.float32(1e-3)
    else:
        change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path)
    return path


def said(parity: Parity) -> str:
    return " ".join(parity.notes)


@pytest.fixture(scope="module")
def mobilenet(
    mobilenet_v2: Callable[[], Loaded], tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Tensor, dict[bool, bytes]]:
    """Trained weights, and the file of them unfolded and folded."""
    torch.manual_seed(0)
    model, x = mobilenet_v2()
    folder = tmp_path_factory.mktemp("mobilenet")
    unfolded = export_onnx(model, x, folder / "unfolded.onnx", fold=False).path
    fold_onnx(unfolded, folder / "folded.onnx")
    return model, x, {False: unfolded.read_bytes(), True: (folder / "folded.onnx").read_bytes()}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("broken", "norm"),
    [
        ("features.0.0", "features.0.1"),
        ("features.5.conv.1.0", "features.5.conv.1.1"),
        ("features.17.conv.2", "features.17.conv.3"),
        ("classifier.1", None),
    ],
)
def test_one_weight_of_trained_mobilenet(
    broken: str,
    norm: str | None,
    fold: bool,
    mobilenet: tuple[nn.Module, Tensor, dict[bool, bytes]],
    tmp_path: Path,
) -> None:
    model, x, files = mobilenet
    (tmp_path / "m.onnx").write_bytes(files[fold])
    # In its liveliest channel: some are dead, and what is changed there nobody can see.
    live = 0 if norm is None else int(model.get_submodule(norm).weight.abs().argmax())

    def change(weight: np.ndarray) -> None:
        weight[live].flat[0] += np.float32(1e-3)

    path = break_layer(tmp_path / "m.onnx", broken, change)
    parity = verify_onnx(model, path, x, batch_sizes=(2,))
    assert not parity.passed
    # Folded, the Conv's own output is nowhere in the file.
    folded = fold and norm is not None
    assert parity.first_divergence == (norm if folded else broken), parity.notes
    assert (f"in the file {broken} and {norm} are one" in said(parity)) == folded
    assert len(parity.layers) <= 4 * math.ceil(math.log2(150))  # a few at each of log2(n) cuts


def test_the_file_runs_a_logarithm_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(64)]), torch.randn(2, 4)
    path = break_layer(export_onnx(model, x, tmp_path / "m.onnx").path, "37")
    runs, run = [], OnnxRuntime.run

    def counted(self: OnnxRuntime, inputs: list[np.ndarray]) -> list[np.ndarray]:
        outputs = run(self, inputs)
        runs.append(len(outputs))
        return outputs

    monkeypatch.setattr(OnnxRuntime, "run", counted)
    assert verify_onnx(model, path, x, batch_sizes=(2,), atol=1e-30).first_divergence == "37"
    assert 0 < len(runs) <= 1 + 7
    assert set(runs) == {1}  # a chain has one value alive at every cut


class Branches(nn.Module):
    """Whatever is broken in the first branch, the second and third do not see, though they run later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU())
            for _ in range(3)
        )
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([branch(x) for branch in self.branches], 1).mean((2, 3)))


def wrong_group_axis(weight: np.ndarray) -> None:
    """Output channels as (channel, group), where the operator has (group, channel)."""
    weight[:] = weight.reshape(2, 4, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("branch", range(3))
def test_a_wrong_group_axis_in_one_of_several_branches(branch: int, fold: bool, tmp_path: Path) -> None:
    model, x = with_statistics(Branches()), torch.randn(2, 3, 6, 6)
    path = export_onnx(model, x, tmp_path / "m.onnx", fold=fold).path
    parity = verify_onnx(model, break_layer(path, f"branches.{branch}.0", wrong_group_axis), x)
    assert parity.first_divergence == f"branches.{branch}.{1 if fold else 0}"


def test_a_lost_eps_is_that_of_its_norm(tmp_path: Path) -> None:
    model, x = with_statistics(Branches()), torch.randn(2, 3, 6, 6)
    model.branches[1][1].eps = 0.1
    proto = onnx.load(export_onnx(model, x, tmp_path / "m.onnx", fold=False).path)
    norm = next(node for node in proto.graph.node if "branches.1.1" in scopes(node))
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1e-5
    onnx.save(proto, tmp_path / "m.onnx")
    assert verify_onnx(model, tmp_path / "m.onnx", x).first_divergence == "branches.1.1"


def test_nan_in_one_channel_is_named_with_the_channel(tmp_path: Path) -> None:
    model, x = with_statistics(Branches()), torch.randn(2, 3, 6, 6)
    path = export_onnx(model, x, tmp_path / "m.onnx", fold=False).path
    parity = verify_onnx(model, break_layer(path, "branches.2.0", lambda w: w[5].fill(np.nan)), x)
    assert parity.first_divergence == "branches.2.0"
    assert "NaN" in said(parity)
    assert "all in channel 5" in said(parity)


@pytest.mark.parametrize(("broken", "named"), [("0", "0"), ("3", "3")])
def test_a_norm_folded_forward_hides_what_is_between(broken: str, named: str, tmp_path: Path) -> None:
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3))
    model, x = with_statistics(nn.Sequential(*layers)), torch.randn(2, 6)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    sound = verify_onnx(model, path, x, layers=True)
    assert [layer.name for layer in sound.layers if layer.passed] == ["0", "1", "3", "4", "5"]
    assert verify_onnx(model, break_layer(path, broken), x).first_divergence == named


class Repeated(nn.Module):
    """One Conv for two calls, and operations in place between a layer and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)
        self.relu, self.norm, self.last = nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.shared(self.relu(self.shared(x))))
        return self.last(self.relu(self.norm(self.conv(x).add_(1.0)).mul_(2.0)))


class Block(nn.Module):
    """Added to its input, so that calls of it may follow each other directly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Looped(nn.Module):
    """One block for three calls, and an activation between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act, self.head = Block(), nn.Tanh(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.block(self.act(self.block(self.block(x))))))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("call", range(3))
def test_a_module_that_is_called_again_bears_the_number_of_the_call(
    call: int, fold: bool, tmp_path: Path
) -> None:
    model, x = with_statistics(Looped()), torch.randn(2, 3, 6, 6)
    path = export_onnx(model, x, tmp_path / "m.onnx", fold=fold).path
    proto = onnx.load(path)
    node = [node for node in proto.graph.node if "block.conv" in scopes(node)][call]
    [shared] = [tensor for tensor in proto.graph.initializer if tensor.name == node.input[1]]
    # That call alone takes another weight.
    own = numpy_helper.from_array(numpy_helper.to_array(shared) * np.float32(1.001), "own")
    proto.graph.initializer.append(own)
    node.input[1] = "own"
    onnx.save(proto, path)
    name = "block.norm" if fold else "block.conv"
    assert verify_onnx(model, path, x).first_divergence == (f"{name}:{call}" if call else name)


def shuffle_net() -> Loaded:
    import torchvision

    return torchvision.models.shufflenet_v2_x0_5(weights=None), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("how", ["unfolded", "folded", "by torch alone"])
@pytest.mark.parametrize("make", [Branches, Repeated, Looped, shuffle_net])
def test_no_layer_of_a_sound_file_is_blamed(
    make: Callable[[], nn.Module | Loaded], how: str, tmp_path: Path
) -> None:
    made = make()
    model, x = made if isinstance(made, tuple) else (made, torch.randn(2, 3, 6, 6))
    with_statistics(model)
    path = tmp_path / "m.onnx"
    if how == "by torch alone":  # its optimizer folds norms and leaves no word of it
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
    else:
        export_onnx(model, x, path, fold=how == "folded")
    parity = verify_onnx(model, path, x, batch_sizes=(2,), layers=True)
    assert parity.passed
    assert len(parity.layers) > 3
    assert [layer for layer in parity.layers if not layer.passed] == []
    assert [layer.position for layer in parity.layers] == sorted(layer.position for layer in parity.layers)


def test_where_it_cannot_be_known_it_is_said_why(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    path = export_onnx(model, x, tmp_path / "m.onnx").path
    assert "no layers were compared: " in said(verify_onnx(model.forward, path, x, layers=True))
    break_layer(path, "0")
    parity = verify_onnx(model.forward, path, x, rtol=1e-6)
    assert parity.first_divergence is None
    assert "the layers of a plain callable have no names" in said(parity)
    proto = onnx.load(path)
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.save(proto, path)
    parity = verify_onnx(model, path, x)
    assert parity.first_divergence is None
    assert "the file does not say which layers its nodes come from" in said(parity)


def test_behind_the_last_layer(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.fc, self.factor = nn.Linear(4, 4), factor

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.factor

    model, other, x = Scaled(2.0), Scaled(3.0), torch.randn(2, 4)
    other.load_state_dict(model.state_dict())
    parity = verify_onnx(model, export_onnx(other, x, tmp_path / "m.onnx").path, x)
    assert parity.first_divergence is None
    assert "every layer agrees within its noise up to fc, the last that can be compared" in said(parity)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, x = with_statistics(Branches()).train(), torch.randn(2, 3, 6, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = break_layer(export_onnx(model, x, tmp_path / "m.onnx", fold=False).path, "stem")
    assert verify_onnx(model, path, x).first_divergence == "stem"
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
