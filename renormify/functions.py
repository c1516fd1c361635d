"""Functional calls of batch_norm in a model: what becomes of those in a forward, and of those in a graph."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from renormify.calls import NormCall, norm_calls
from renormify.errors import InputError, UnsupportedModelError
from renormify.functional import batch_renorm, is_proxy
from renormify.graphs import call_module, layer_of
from renormify.interception import CallsRenormalised, TrainingForward, is_rewritten
from renormify.layers import Limited, is_batch_renorm, kept_whole
from renormify.rules import convert_layer
from renormify.settings import Settings
from renormify.sites import Site

__all__ = [
    "BatchRenormCall",
    "calls_renorm",
    "check_restorable",
    "convert_forward",
    "convert_graph",
    "restore_forward",
]


def convert_forward(
    module: nn.Module, sites: Iterable[Site], left: Iterable[Site], settings: Settings
) -> None:
    """Converts calls in a module's own forward. It keeps its class, and gets ``r_max`` and ``d_max``.

    Args:
        module: whose class has the forward.
        sites: those of its calls that are to be converted.
        left: those that stay.
        settings: for all that are converted.

    Raises:
        InputError: where calls on the same statistics are in both.
    """
    chosen = tuple(_statistics(sites))
    torn = [site.name for site in left if site.calls[0].trains and {*_statistics([site])} & {*chosen}]
    if torn:
        raise InputError(
            f"the calls of {type(module).__name__} on the same statistics must be converted together: "
            f"expected the filter to take {torn[0] or 'the first'} too, or none"
        )
    staying = frozenset(_statistics(left)).difference(chosen)
    calls = CallsRenormalised(settings.momentum, settings.stat, settings.include_frozen, chosen, staying)
    limits = {"r_max": float(settings.r_max), "d_max": float(settings.d_max), "calls_batch_renorm": True}
    vars(module).update(limits, forward=functools.partial(TrainingForward(type(module), calls), module))


def _statistics(sites: Iterable[Site]) -> Iterator[str]:
    """The names of the running means."""
    means = (call.arguments["running_mean"] for site in sites for call in site.calls)
    return (str(mean.target) for mean in means if isinstance(mean, fx.Node))


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


class BatchRenormCall(Limited):
    """The same, of Batch Renorm, with the limits."""

    def __init__(self, call: NormCall, settings: Settings, device: torch.device | None) -> None:
        super().__init__()
        self.init_limits(settings.r_max, settings.d_max, device)
        self.stat = settings.stat
        self.eps, self.recorded_momentum = call.arguments["eps"], call.arguments["momentum"]
        self.momentum = self.recorded_momentum if settings.momentum == "keep" else settings.momentum

    def forward(
        self, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """As :func:`renormify.functional.batch_renorm`."""
        if is_proxy(input):
            return kept_whole(self, input, mean, var, weight, bias)
        state = (mean, var, weight, bias)
        return batch_renorm(
            input, *state, self.training, self.momentum, self.eps, **self.limits(), stat=self.stat
        )

    def extra_repr(self) -> str:
        """The settings."""
        names = ("eps", "momentum", "r_max", "d_max", "stat")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class CallHolder(nn.Module):
    """What a graph keeps of a module whose calls were rewritten; their limits are its own."""

    def _calls(self) -> list[BatchRenormCall]:
        return [child for child in self.children() if isinstance(child, BatchRenormCall)]

    @property
    def r_max(self) -> float:
        """That of the calls."""
        return CallHolder._calls(self)[0].r_max

    @r_max.setter
    def r_max(self, value: float) -> None:
        for call in CallHolder._calls(self):
            call.r_max = value

    @property
    def d_max(self) -> float:
        """That of the calls."""
        return CallHolder._calls(self)[0].d_max

    @d_max.setter
    def d_max(self, value: float) -> None:
        for call in CallHolder._calls(self):
            call.d_max = value


class CallGraphModule(CallHolder, fx.GraphModule):
    """A GraphModule with such calls of its own."""

    def __reduce__(self) -> Any:
        return _loaded, tuple(super().__reduce__()[:2])


def _loaded(build: Any, arguments: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = build(*arguments)
    _share_limits(module)
    return module


def _share_limits(owner: nn.Module) -> None:
    if type(owner) is nn.Module:
        owner.__class__ = CallHolder
    elif isinstance(owner, fx.GraphModule) and not isinstance(owner, CallHolder):
        _set_graph_class(owner, CallGraphModule)


def _keep_limits(owner: nn.Module) -> None:
    """Undoes :func:`_share_limits`."""
    if isinstance(owner, CallGraphModule):
        _set_graph_class(owner, fx.GraphModule)
    elif isinstance(owner, CallHolder):
        owner.__class__ = nn.Module  # type: ignore[assignment]


def _set_graph_class(module: fx.GraphModule, kind: type[fx.GraphModule]) -> None:
    """Gives a GraphModule a class of its own, as each has one, that derives from ``kind``."""
    module.__class__ = type(kind.__new__(kind))
    module.recompile()


def convert_graph(module: fx.GraphModule, sites: Iterable[Site], path: str, settings: Settings) -> None:
    """Rewrites calls in the graph of a GraphModule, or of the copy of one, that lies under ``path``.

    Where the state of a call lies as that of a BatchNorm layer does, a layer takes its place; else a
    :class:`BatchRenormCall` does, below the module in whose forward the call was recorded. Its limits can be
    read and set on that module too.
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
        device = next((tensor.device for tensor in module.buffers()), None)
        module.add_submodule(place, BatchRenormCall(call, settings, device).train(module.training))
        _share_limits(module.get_submodule(owner))
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


def calls_renorm(module: nn.Module) -> bool:
    """Whether the module is a functional call that was converted, or has some in its own forward."""
    return isinstance(module, BatchRenormCall) or is_rewritten(module)


def check_restorable(module: nn.Module) -> None:
    """Looks whether :func:`restore_forward` will find what was put there.

    Raises:
        UnsupportedModelError: where somebody has put another forward in front of ours.
    """
    if "calls_batch_renorm" in vars(module) and not is_rewritten(module):
        raise UnsupportedModelError(
            f"the forward of {type(module).__name__} was wrapped after conversion; unwrap it first"
        )


def restore_forward(module: nn.Module) -> bool:
    """Undoes :func:`convert_forward` and the calls of :func:`convert_graph`; whether there was any."""
    if is_rewritten(module):
        for name in ("forward", "r_max", "d_max", "calls_batch_renorm"):
            del vars(module)[name]
        return True
    calls = {name: call for name, call in module.named_children() if isinstance(call, BatchRenormCall)}
    for name, call in calls.items():
        restored = BatchNormCall(call.recorded_momentum, call.eps)
        module.add_module(name, restored.train(call.training))
    if calls:
        _keep_limits(module)
    return bool(calls)
