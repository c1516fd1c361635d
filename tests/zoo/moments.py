"""How a training step must move the statistics of a layer: the paper's rule, in float64.

Source: S. Ioffe, arXiv 1702.03275, Algorithm 1, whose state is (mu, sigma) with eps inside sigma. What each
layer was given is seen by hooks, before the layer runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of a float32 mean or deviation, as a share of the values that went into it."""


@dataclass(frozen=True)
class Batch:
    """The statistics of one input of a layer, over all but its channels; float64."""

    mean: Tensor
    var: Tensor  # biased
    count: int

    @property
    def unbiased(self) -> Tensor:
        return self.var * (self.count / (self.count - 1))

    @property
    def finite(self) -> bool:
        return bool(self.mean.isfinite().all() and self.var.isfinite().all())


@dataclass(frozen=True)
class State:
    """The running statistics of a layer; float64."""

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, state_dict: dict[str, Tensor], path: str) -> State:
        prefix = f"{path}." if path else ""
        return cls(*(state_dict[f"{prefix}{name}"].double() for name in ("running_mean", "running_var")))


def batch_of(input: Tensor) -> Batch:
    values = input.detach().double().transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(values, 1, correction=0)
    return Batch(mean, var, values.shape[1])


@contextmanager
def recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Batch]]]:
    """The batches that each layer is given inside the context, in order, by the layer's path."""
    batches: dict[str, list[Batch]] = {}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else next(iter(kwargs.values()))
            batches.setdefault(name, []).append(batch_of(input))

        return hook

    handles = [m.register_forward_pre_hook(record(name), with_kwargs=True) for name, m in layers.items()]
    try:
        yield batches
    finally:
        for handle in handles:
            handle.remove()


def renorm_rule(state: State, batches: list[Batch], eps: float, alpha: float) -> State:
    """mu += alpha (mu_B - mu), sigma += alpha (sigma_B - sigma)."""
    mean, sigma = state.mean, (state.var + eps).sqrt()
    for batch in batches:
        mean = mean + alpha * (batch.mean - mean)
        sigma = sigma + alpha * ((batch.var + eps).sqrt() - sigma)
    return State(mean, sigma**2 - eps)


def batchnorm_rule(state: State, batches: list[Batch], alpha: float) -> State:
    """What torch's BatchNorm does: the unbiased variance is averaged."""
    mean, var = state.mean, state.var
    for batch in batches:
        mean, var = mean + alpha * (batch.mean - mean), var + alpha * (batch.unbiased - var)
    return State(mean, var)


def deviation(found: State, due: State, before: State, batches: list[Batch], eps: float) -> float:
    """The largest distance of found from due, in units of what float32 rounding explains; 1 is the limit."""
    sigma, due_sigma = (found.var + eps).sqrt(), (due.var + eps).sqrt()
    size = before.mean.abs() + (before.var + eps).sqrt()
    for batch in batches:
        size = size + batch.mean.abs() + (batch.var + eps).sqrt()
    distance = torch.maximum((found.mean - due.mean).abs(), (sigma - due_sigma).abs())
    return float((distance / (ROUNDING * size)).nan_to_num(torch.inf).max())


def can_tell(
    before: State, batches: list[Batch], eps: float, alpha: float, own_momentum: float | None
) -> bool:
    """Whether these batches tell the paper's rule from BatchNorm's, with either momentum."""
    ours = renorm_rule(before, batches, eps, alpha)
    momenta = [momentum for momentum in (own_momentum, alpha) if momentum is not None]
    return all(
        deviation(ours, batchnorm_rule(before, batches, momentum), before, batches, eps) > 1
        for momentum in momenta
    )


def complaint(
    found: State, before: State, batches: list[Batch], eps: float, alpha: float, own_momentum: float | None
) -> tuple[str, float]:
    """What is wrong with how a layer moved, empty where it obeyed the paper's rule; and its deviation."""
    away = deviation(found, renorm_rule(before, batches, eps, alpha), before, batches, eps)
    if away <= 1:
        return "", away
    if not batches:
        return "moved their statistics without any input", away
    if torch.equal(found.mean, before.mean) and torch.equal(found.var, before.var):
        return "did not move their statistics", away
    for momentum in (own_momentum, alpha):
        if momentum is not None:
            due = batchnorm_rule(before, batches, momentum)
            if deviation(found, due, before, batches, eps) <= 1:
                return f"moved their statistics by BatchNorm's rule, with momentum {momentum:g}", away
    return "moved their statistics neither by Batch Renorm's rule nor by BatchNorm's", away
