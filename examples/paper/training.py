"""One run: build, train, and measure in all the ways that the tables need."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper.data import Data, Sampler, load
from paper.measuring import accuracy, tested
from paper.networks import build, for_training, without_microbatches
from paper.settings import MOVING, RENORM, Run
from renormify import ConstantSchedule, PaperSchedule, RenormScheduler, freeze_stats, recalibrate
from renormify.errors import InputError

WARM_UP = 20
PIXELS = 64  # of what the pretrained networks are given
# Mean and standard deviation that each is used to, grey.
SCALES = {"efficientnet_lite0": (0.498, 0.502), "mobilenet_v2": (0.449, 0.226)}

# While training from scratch goes on: the steps between two points of accuracy, and their validation images.
EVERY, WATCHED = 20, 1_000
# Unlabelled images that statistics are counted on, in batches of 64.
COUNTED = {"plain": 2_048, "pretrained": 256}


def perform(run: Run, folder: Path, *, afterwards: bool = True) -> dict[str, Any]:
    """Does a run.

    Args:
        run: what to do.
        folder: where the images are.
        afterwards: whether what moves is also tested with statistics counted anew after training.

    Returns:
        ``validation``, the final accuracy on validation images, 5,000 or, where a pretrained network's
        settings are chosen, 1,000; ``curve``, pairs of step and accuracy on some of them, of what is trained
        from scratch; ``train_loss``, the mean of the last twentieth; ``diverged``; ``seconds``; and what
        :func:`measuring.tested` finds. Accuracies are fractions.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    data = _data(folder, run.network)
    model = build(run)
    if run.recalibrate:
        model.load_state_dict(_statistics(run, model, data), strict=False)
    if run.norm in MOVING:
        model = for_training(model, run)
    if not run.from_scratch:
        model = model.to(memory_format=torch.channels_last)  # two thirds of the time
    result = _train(model, run, data)
    validation = data.validation if run.from_scratch else data.validation.first(1_000)
    result["validation"] = accuracy(model, validation)
    if run.test:
        unlabelled = _unlabelled(run, data) if afterwards else []
        result |= tested(model, run, data.test.first(run.test), unlabelled)
    return result | {"seconds": round(time.perf_counter() - begin, 1)}


def _kind(run: Run) -> str:
    return "plain" if run.from_scratch else "pretrained"


@functools.lru_cache(maxsize=3)
def _data(folder: Path, network: str) -> Data:
    if network in SCALES:
        return load(folder, size=PIXELS, channels=3, scale=SCALES[network])
    return load(folder)


def _unlabelled(run: Run, data: Data) -> list[Tensor]:
    return list(data.train.at(slice(COUNTED[_kind(run)]))[0].split(64))


_counted: dict[tuple[str, bool], dict[str, Tensor]] = {}


def _statistics(run: Run, model: nn.Module, data: Data) -> dict[str, Tensor]:
    """The model's running statistics counted anew; those of a pretrained one are the same in every run."""
    key = (run.network, run.norm == "br")  # whose variance is the biased one
    if run.from_scratch or key not in _counted:
        recalibrate(model, _unlabelled(run, data))
        _counted[key] = {
            name: buffer.clone() for name, buffer in model.named_buffers() if ".running_" in f".{name}"
        }
    return _counted[key]


def _train(model: nn.Module, run: Run, data: Data) -> dict[str, Any]:
    sampler = Sampler(data.train.labels, run.microbatch, run.labels, run.seed)
    optimizer = _optimizer(model, run)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_rate, run.steps))
    limits = RenormScheduler(model, _schedule(run)) if run.norm in RENORM else None
    watched = data.validation.first(WATCHED)
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    for step in range(1, run.steps + 1):
        if step == round(run.held * run.steps) + 1:
            try:
                hold(model, _unlabelled(run, data))
            except InputError:  # it has diverged
                losses.append(math.nan)
                break
        model.train()
        images, labels = data.train.at(sampler.step(run.batch))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if limits:
            limits.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if run.from_scratch and (step % EVERY == 0 or step == run.steps):
            curve.append((step, accuracy(model, watched)))
    last = losses[-max(1, run.steps // 20) :]
    return {"curve": curve, "train_loss": sum(last) / len(last), "diverged": not math.isfinite(losses[-1])}


def hold(model: nn.Module, unlabelled: list[Tensor]) -> None:
    """Counts the running statistics anew and holds them still, so that no microbatch is felt any more."""
    without_microbatches(model)
    recalibrate(model, unlabelled)
    freeze_stats(model)


def _optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    if run.from_scratch:
        return torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return torch.optim.AdamW(model.parameters(), lr=run.lr)


def _rate(steps: int, step: int) -> float:
    """A linear warm-up, then a cosine to 0."""
    return min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _schedule(run: Run) -> PaperSchedule | ConstantSchedule:
    if run.ramp:
        return PaperSchedule(r_max=run.r_max, d_max=run.d_max).scaled(run.steps)
    return ConstantSchedule(run.r_max, run.d_max)
