"""How a model is run, and how what it gives is compared."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.verdicts import Call

StateDict = dict[str, Tensor]


def step(model: nn.Module, call: Call) -> tuple[frozenset[str], bool]:
    """One forward and backward: which parameters got a gradient, and whether all is finite."""
    with torch.enable_grad():
        outputs = run(model, call, training=True, seed=1)
        loss = sum(out.float().square().mean() for out in outputs if out.requires_grad and out.numel())
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finite = all_finite(outputs) and all_finite(list(gradients.values()))
    model.zero_grad(set_to_none=True)
    return frozenset(gradients), finite


def forward(model: nn.Module, call: Call, *, training: bool, seed: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return run(model, call, training=training, seed=seed)


def run(model: nn.Module, call: Call, *, training: bool, seed: int) -> list[Tensor]:
    args, kwargs = tree_map_only(Tensor, torch.clone, call)
    model.train(training)
    seed_all(seed)
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def state_of(model: nn.Module) -> StateDict:
    """A copy of the state, with the versions of its modules, which some ask for when they load it."""
    state: StateDict = model.state_dict()
    for key, value in state.items():
        state[key] = value.clone()
    return state


def restore(model: nn.Module, state: StateDict) -> None:
    model.load_state_dict(state)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal, NaN where NaN."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(left, right, strict=True)
    )


def all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of the output it is in."""
    if [a.shape for a in left] != [b.shape for b in right]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(left, right, strict=True) if a.numel()]
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]
    return max((float(share.nan_to_num(math.inf)) for share in shares), default=0.0)
