"""The sites of a model, counted without renormify: by a walk of its modules, and by the calls it makes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

STATISTICS = ("running_mean", "running_var")


def census(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that holds statistics of batches, or is a BatchNorm, once, by its first path."""
    return {name: module for name, module in model.named_modules() if _normalises(module)}


def _normalises(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return False
    held = all(module._buffers.get(name) is not None for name in STATISTICS)
    return held or isinstance(module, _BatchNorm)


class Calls(TorchFunctionMode):
    """Sees each call of batch_norm with running statistics, and says which module's they are."""

    def __init__(self, sites: dict[str, nn.Module]) -> None:
        super().__init__()
        self._owners = {id(site._buffers.get("running_mean")): name for name, site in sites.items()}
        self.strangers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, torch.batch_norm):
            position = 1 if func is F.batch_norm else 3
            mean = kwargs.get("running_mean", args[position] if len(args) > position else None)
            self.strangers += mean is not None and id(mean) not in self._owners
            if func is F.batch_norm:
                with torch._C.DisableTorchFunction():  # or torch.batch_norm inside it would count again
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
