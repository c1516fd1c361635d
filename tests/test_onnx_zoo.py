"""Files and networks of others: nothing is left that could fold, and they still do their work."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_graphs import count
from torch import nn

from renormify.onnx import Fold, export_onnx, fold_onnx, verify_onnx


def package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is missing; `make test` installs it"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)


def site_packages() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def ocr_file(name: str) -> Path:
    return package_file("rapidocr_onnxruntime", "models", name)


@pytest.mark.parametrize(
    ("name", "sites", "shape"),
    [
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", 35, (2, 3, 48, 192)),
        ("ch_PP-OCRv4_det_infer.onnx", 3, (1, 3, 96, 160)),
        ("ch_PP-OCRv4_rec_infer.onnx", 6, (2, 3, 48, 160)),
    ],
)
def test_the_files_of_rapidocr(name: str, sites: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    original = ocr_file(name)
    before = original.read_bytes()
    fold = fold_onnx(original, tmp_path / name, leftover="bn")
    assert original.read_bytes() == before
    norms = [site for site in fold.sites if site.kind == "BatchNormalization"]
    assert [site.action for site in norms] == ["folded"] * sites
    assert count(fold.model) == 0
    x = np.random.default_rng(0).normal(0, 0.5, shape).astype(np.float32)
    for expected, output in zip(run(original, x), run(tmp_path / name, x), strict=True):
        # Of a probability, which a sigmoid or a softmax gives with the precision of 1.
        np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5)


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, {session.get_inputs()[0].name: x})]


def test_text_lines_are_still_told_from_those_upside_down(tmp_path: Path) -> None:
    x = np.stack([line(index, turned) for turned in (False, True) for index in range(50)])
    labels = np.repeat([0, 1], 50)
    name = "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    fold_onnx(ocr_file(name), tmp_path / name)
    for path in (ocr_file(name), tmp_path / name):
        assert (run(path, x)[0].argmax(1) == labels).mean() == 1.0


def line(index: int, turned: bool) -> np.ndarray:
    """A rendered line of text as the network wants it: cut out, 48 pixels high, 192 wide, from -1 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    words = ("Batch", "Renorm", "folds", "into", "the", "weights", "Quick", "foxes", "jump", "Today", "Ready")
    rng = np.random.default_rng(index)
    text, font = " ".join(rng.choice(words, 3)), ImageFont.load_default(size=40)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    image = Image.new("L", (right - left + 8, bottom - top + 8), 255)
    ImageDraw.Draw(image).text((4 - left, 4 - top), text, fill=0, font=font)
    image = image.rotate(180) if turned else image
    width = min(192, image.width * 48 // image.height)
    pixels = np.zeros((48, 192), np.float32)
    pixels[:, :width] = np.asarray(image.resize((width, 48)), np.float32) / 127.5 - 1.0
    return np.broadcast_to(pixels, (3, 48, 192))


def with_statistics(model: nn.Module) -> nn.Module:
    """Norms as training leaves them; the default ones hide errors."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3.0)
            nn.init.normal_(module.weight, 0, 1)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def exported(model: nn.Module, x: torch.Tensor, path: Path) -> Fold:
    fold = export_onnx(model, x, path).fold
    assert fold is not None
    parity = verify_onnx(model, path, x)
    assert parity.passed, parity
    return fold


def perceptron() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(2, 6)


def generator() -> tuple[nn.Module, torch.Tensor]:
    layers: list[nn.Module] = []
    for before, after, stride in ((16, 12, 1), (12, 8, 2), (8, 4, 2)):
        layers += [nn.ConvTranspose2d(before, after, 4, stride, stride - 1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh()), torch.randn(2, 16, 1, 1)


def shuffle_net() -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    return torchvision.models.shufflenet_v2_x0_5(weights=None), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("make", [perceptron, generator, shuffle_net])
def test_nothing_is_left(make: Callable[[], tuple[nn.Module, torch.Tensor]], tmp_path: Path) -> None:
    model, x = make()
    fold = exported(with_statistics(model), x, tmp_path / "m.onnx")
    assert {site.action for site in fold.sites} == {"folded"}
    assert not any(count(fold.model, kind) for kind in ("BatchNormalization", "Mul", "Add"))


class PreActivation(nn.Module):
    """Two blocks of a pre-activation ResNet, and the norm before its head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.last = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in (0, 2):
            y = x
            for index in (block, block + 1):
                y = self.convs[index](torch.relu(self.norms[index](y)))
            x = x + y
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def test_what_a_pre_activation_network_keeps_is_explained(tmp_path: Path) -> None:
    fold = exported(with_statistics(PreActivation()), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    actions = {site.name: (site.action, site.reason) for site in fold.sites}
    assert {name for name, (action, _) in actions.items() if action == "folded"} == {"norms.1", "norms.3"}
    relu = "behind it, Relu does not commute with a shift"
    assert actions["norms.0"][1] == f"before it, the output of Conv has other users; {relu}"
    assert actions["norms.2"][1] == f"before it, the output of Add has other users; {relu}"
    assert actions["last"][1] == f"before it, beyond Add, the output of Add has other users; {relu}"


def test_what_torchcrepe_keeps_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package itself imports torchaudio; its network needs one number of it.
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    folder = site_packages() / "torchcrepe"
    spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True, map_location="cpu"))
    model.eval()
    # onnxruntime's Sigmoid is off by an ulp of 1, torch's by one of its value; here most are near 0.
    fold = exported(model, torch.randn(2, 1024), tmp_path / "m.onnx")
    *padded, last = fold.sites
    assert (last.action, last.into) == ("folded", "Gemm classifier")  # through MaxPool, Transpose, Reshape
    assert len(padded) == 5
    for site in padded:
        assert site.reason == (
            "before it, Relu does not commute with a shift; behind it, beyond MaxPool, Conv pads with zeros, "
            "which the shift would have to change"
        )
