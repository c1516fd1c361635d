"""Functional calls of batch_norm in a model: what becomes of those in a forward, and of those in a graph."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from renormify.calls import NormCall, norm_calls
from renormify.forwards import TrainingForward, calls_in_forward
from renormify.functional import batch_renorm
from renormify.graphs import FunctionRewrite, call_layer, layer_of, restore_calls
from renormify.layers import is_batch_renorm
from renormify.rules import convert_layer
from renormify.settings import Settings
from renormify.sites import Site

__all__ = ["calls_renorm", "convert_forward", "convert_graph", "restore_forward"]


def convert_forward(module: nn.Module, sites: Iterable[Site], settings: Settings) -> None:
    """Rewrites calls in a module's own forward. It keeps its class, and gets ``r_max`` and ``d_max``."""
    _bear_limits(module, settings)
    rewrite = FunctionRewrite(settings.momentum, settings.stat, settings.include_frozen)
    chosen = {site.number for site in sites}
    numbers = range(len(calls_in_forward(module, type(module).forward)[0]))
    forward = TrainingForward(type(module).forward, rewrite, frozenset(numbers) - chosen)
    forward.prepare(module)
    vars(module)["forward"] = functools.partial(forward, module)


def convert_graph(module: fx.GraphModule, sites: Iterable[Site], path: str, settings: Settings) -> None:
    """Rewrites calls in the graph of a GraphModule, or of the copy of one, that lies under ``path``.

    Where the state of a call lies as that of a BatchNorm layer does, a layer takes its place; else the
    function does, with limits on the module in whose forward the call was recorded.
    """
    owners = {call.node.name: site.owner for site in sites for call in site.calls}
    for call in [call for call in norm_calls(module.graph) if call.node.name in owners]:
        place = layer_of(module, call)
        if place is not None:
            _make_layer(module.get_submodule(place[0]), place[1], call, settings)
            call_layer(module, call, place[0])
            continue
        owner = owners[call.node.name].removeprefix(path).lstrip(".")
        owner = owner if owner in dict(module.named_modules()) else ""
        _bear_limits(module.get_submodule(owner), settings)
        FunctionRewrite(settings.momentum, settings.stat, True, owner)(module.graph, call)
    module.recompile()


def _bear_limits(module: nn.Module, settings: Settings) -> None:
    limits: Any = module
    limits.r_max, limits.d_max = float(settings.r_max), float(settings.d_max)


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
    """Whether the module's own forward, or its graph, holds functional calls that were converted."""
    if isinstance(module, fx.GraphModule):
        return any(node.target is batch_renorm for node in module.graph.nodes)
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and isinstance(forward.func, TrainingForward)


def restore_forward(module: nn.Module) -> bool:
    """Undoes :func:`convert_forward` and the functions of :func:`convert_graph`; whether there was any."""
    if isinstance(module, fx.GraphModule):
        return restore_calls(module)
    if not calls_renorm(module):
        return False
    for name in ("forward", "r_max", "d_max"):
        del vars(module)[name]
    return True
