"""Every model of torchvision and timm: how to make it, and what to feed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import regnet
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from zoo.verdicts import Call, Subject

BATCH = 2
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 384, 448, 512)
CLIPS = ((8, 64), (16, 112), (16, 224))
DROPS = ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {})
"""What timm's constructors take, the most demanding first: dropout is to keep its meaning."""


def names() -> list[str]:
    """``library:model`` for all; those without BatchNorm are told apart when they are built.

    torchvision's quantizable models are its float models over again, until they are quantized.
    """
    vision = [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    return [f"torchvision:{name}" for name in vision] + [f"timm:{name}" for name in timm.list_models()]


def subject(name: str) -> Subject:
    library, _, model = name.partition(":")
    if library == "timm":
        return Subject(name, partial(_timm, model), _timm_calls)
    return Subject(name, partial(_torchvision, model), partial(_torchvision_calls, _task(model)))


def _timm(name: str) -> nn.Module:
    for drops in DROPS[:-1]:
        try:
            return timm.create_model(name, pretrained=False, **drops)
        except (TypeError, AssertionError):  # the constructor has no such argument
            continue
    return timm.create_model(name, pretrained=False)


def _timm_calls(model: nn.Module) -> Iterator[tuple[str, Call]]:
    """Multiples of 32 up to the size the model was made for, that alone where no other is allowed."""
    config: Any = getattr(model, "pretrained_cfg", None) or model.default_cfg
    channels, height, width = config["input_size"]
    least = config.get("min_input_size") or (channels, 0, 0)
    if not config.get("fixed_input_size"):
        for size in SIZES:
            if max(least[1:]) <= size < min(height, width):
                yield f"{size}", ((_image(channels, size, size),), {})
    yield f"{height}", ((_image(channels, height, width),), {})


def _task(name: str) -> str:
    """The module of torchvision.models that it is from: detection, segmentation, video, ..."""
    return torchvision.models.get_model_builder(name).__module__.split(".")[2]


def _torchvision(name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if _task(name) in ("detection", "segmentation"):
        options["weights_backbone"] = None
    with _regnet_widths_on_cpu() if name.startswith("regnet") else nullcontext():
        model = builder(**options)
    for module in model.modules():
        if hasattr(module, "score_thresh"):
            module.score_thresh = 0.0  # a random network is sure of nothing, and nothing would be compared
        if hasattr(module, "detections_per_img"):
            module.detections_per_img = 3  # but little, for each costs a head's forward
        if isinstance(module, RegionProposalNetwork):
            module._post_nms_top_n = {"training": 10, "testing": 10}
    return model


def _regnet_widths_on_cpu() -> Any:
    """RegNet computes its widths with tensors and reads them, which meta has no values for."""
    original = regnet.BlockParams.from_init_params

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return original(*args, **kwargs)

    return mock.patch.object(regnet.BlockParams, "from_init_params", on_cpu)


def _torchvision_calls(task: str, model: nn.Module) -> Iterator[tuple[str, Call]]:
    if task == "video":
        for frames, size in CLIPS:
            yield f"{frames}x{size}", ((_image(3, frames, size, size),), {})
        return
    make: Callable[[nn.Module, int], Call] = {"detection": _detection, "optical_flow": _flow}.get(
        task, _single
    )
    for size in SIZES:
        yield f"{size}", make(model, size)


def _single(model: nn.Module, size: int) -> Call:
    return (_image(3, size, size),), {}


def _flow(model: nn.Module, size: int) -> Call:
    return (_image(3, size, size), _image(3, size, size)), {"num_flow_updates": 2}


def _detection(model: nn.Module, size: int) -> Call:
    """Two images, each with one box, and all that any of the models asks of a target."""
    for transform in model.modules():
        if isinstance(transform, GeneralizedRCNNTransform) and transform.fixed_size is None:
            transform.min_size, transform.max_size = (size,), size
    edge = size / 2
    target = {
        "boxes": torch.tensor([[4.0, 4.0, edge, edge]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, size, size, dtype=torch.uint8),
        "keypoints": torch.tensor([[[edge / 2, edge / 2, 1.0]] * 17]),
    }
    images = [torch.rand(3, size, size) for _ in range(BATCH)]
    return (images, [target] * BATCH), {}


def _image(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)
