"""Functional calls of batch_norm in a model: what becomes of those in a forward, and of those in a graph."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from renormify.calls import NormCall, norm_calls
from renormify.forwards import TrainingForward
from renormify.functional import batch_renorm
from renormify.graphs import FunctionRewrite, call_module, layer_of
from renormify.layers import is_batch_renorm
from renormify.rules import convert_layer
from renormify.settings import Settings
from renormify.sites import Site

__all__ = ["BatchRenormCall", "convert_forward", "convert_graph", "restore_forward"]


def _limits(settings: Settings) -> dict[str, Any]:
    """The attributes of a module that bears limits without being a layer."""
    return {
        "r_max": float(settings.r_max),
        "d_max": float(settings.d_max),
        "calls_batch_renorm": True,
    }


def convert_forward(module: nn.Module, settings: Settings) -> None:
    """Rewrites the calls in a module's own forward. It keeps its class, and gets ``r_max`` and ``d_max``."""
    vars(module).update(_limits(settings))
    rewrite = FunctionRewrite(settings.momentum, settings.stat, settings.include_frozen)
    forward = TrainingForward(type(module).forward, rewrite)
    forward.prepare(module)
    vars(module)["forward"] = functools.partial(forward, module)


class BatchNormCall(nn.Module):
    """A functional call in a graph, as a module without state, which follows the mode.

    The statistics come as arguments, for they lie wherever the graph has them.
    """

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """As :func:`torch.nn.functional.batch_norm`."""
        return F.batch_norm(input, mean, var, weight, bias, self.training, self.momentum, self.eps)


class BatchRenormCall(nn.Module):
    """The same, of Batch Renorm, with the limits."""

    r_max: float
    d_max: float

    def __init__(self, call: NormCall, settings: Settings) -> None:
        super().__init__()
        vars(self).update(_limits(settings))
        self.stat = settings.stat
        self.eps, self.recorded_momentum = call.arguments["eps"], call.arguments["momentum"]
        self.momentum = self.recorded_momentum if settings.momentum == "keep" else settings.momentum

    def forward(
        self, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """As :func:`renormify.functional.batch_renorm`."""
        limits: Any = {"r_max": self.r_max, "d_max": self.d_max, "stat": self.stat}
        state = (mean, var, weight, bias)
        return batch_renorm(input, *state, self.training, self.momentum, self.eps, **limits)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("eps", "momentum", "r_max", "d_max", "stat")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def convert_graph(module: fx.GraphModule, sites: Iterable[Site], path: str, settings: Settings) -> None:
    """Rewrites calls in the graph of a GraphModule, or of the copy of one, that lies under ``path``.

    Where the state of a call lies as that of a BatchNorm layer does, a layer takes its place; else a
    :class:`BatchRenormCall` does, below the module in whose forward the call was recorded.
    """
    owners = {call.node.name: site.owner for site in sites for call in site.calls}
    for call in norm_calls(module.graph):
        if call.node.name not in owners:
            continue
        layer = layer_of(module, call)
        if layer is not None:
            _make_layer(module.get_submodule(layer[0]), layer[1], call, settings)
            call_module(module, call, layer[0], ("input",))
            continue
        owner = owners[call.node.name].removeprefix(path).lstrip(".")
        owner = owner if owner in dict(module.named_modules()) else ""
        place = _free_name(module, f"{owner}.batch_renorm".lstrip("."))
        module.add_submodule(place, BatchRenormCall(call, settings).train(module.training))
        call_module(module, call, place, ("input", "running_mean", "running_var", "weight", "bias"))
    module.recompile()


def _free_name(module: fx.GraphModule, wanted: str) -> str:
    taken = dict(module.named_modules())
    return next(name for name in (wanted, *(f"{wanted}_{i}" for i in range(len(taken)))) if name not in taken)


def _make_layer(holder: Any, kind: type[nn.Module], call: NormCall, settings: Settings) -> None:
    """Makes the layer that a graph's state was taken from, of the module that holds it now."""
    if is_batch_renorm(holder):
        return  # by another call
    holder.__class__ = kind
    for name in ("weight", "bias"):
        if not hasattr(holder, name):
            holder.register_parameter(name, None)
    if not hasattr(holder, "num_batches_tracked"):
        holder.register_buffer("num_batches_tracked", None)
    holder.num_features = holder.running_mean.numel()
    holder.eps, holder.momentum = call.arguments["eps"], call.arguments["momentum"]
    holder.affine, holder.track_running_stats = holder.weight is not None, True
    convert_layer(holder, settings)


def restore_forward(module: nn.Module) -> bool:
    """Undoes :func:`convert_forward` and the calls of :func:`convert_graph`; whether there was any."""
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and isinstance(forward.func, TrainingForward):
        for name in ("forward", *_limits(Settings())):
            del vars(module)[name]
        return True
    calls = {name: call for name, call in module.named_children() if isinstance(call, BatchRenormCall)}
    for name, call in calls.items():
        restored = BatchNormCall(call.recorded_momentum, call.eps)
        module.add_module(name, restored.train(call.training))
    return bool(calls)
