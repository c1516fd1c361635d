"""Calls of batch_norm in a graph, rewritten into Batch Renorm, and back."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from renormify.calls import NormCall
from renormify.functional import batch_renorm
from renormify.settings import Momentum

__all__ = ["FunctionRewrite", "LayerRewrite", "call_layer", "layer_of", "problem_of", "restore_calls"]


def problem_of(call: NormCall) -> str | None:
    """Why a call cannot be rewritten, or None."""
    for name in ("running_mean", "running_var"):
        statistics = call.arguments[name]
        if not isinstance(statistics, fx.Node) or statistics.op not in ("get_attr", "placeholder"):
            return "its running statistics are computed in the forward, as for instance norm"
    if not call.single and any(_index(user) in (1, 2) and user.users for user in call.node.users):
        return "the statistics of the batch that it returns are used"
    return None


@dataclass(frozen=True)
class LayerRewrite:
    """Within a norm layer's own forward: the call on its own state becomes its Batch Renorm."""

    def __call__(self, graph: fx.Graph, call: NormCall) -> None:
        """Replaces the call; the layer counts its batches itself."""
        if problem_of(call) or not call.trains or not is_own(call):
            return
        arguments = tuple(call.arguments[name] for name in ("input", "weight", "bias"))
        with graph.inserting_before(call.node):
            _replace(call, graph.create_node("call_module", "renormalise", arguments))
        _forget_count(graph, "num_batches_tracked")


def is_own(call: NormCall) -> bool:
    """Whether the running statistics are those of the module whose forward was traced."""
    return all(call.arguments[name].target == name for name in ("running_mean", "running_var"))


@dataclass(frozen=True)
class FunctionRewrite:
    """Anywhere else: the call becomes one of batch_renorm, with limits that are attributes of a module.

    Attributes:
        momentum: see :class:`renormify.settings.Settings`.
        stat: likewise.
        include_frozen: whether a call with ``training=False`` becomes one that trains.
        owner: the path of the module that bears the limits and the mode, in what the graph belongs to.
    """

    momentum: Momentum
    stat: str
    include_frozen: bool
    owner: str = ""

    def __call__(self, graph: fx.Graph, call: NormCall) -> None:
        """Replaces the call, whose own literals for mode and momentum do not hold any more."""
        if problem_of(call) or not (call.trains or self.include_frozen):
            return
        given = call.arguments
        momentum = given["momentum"] if self.momentum == "keep" else self.momentum
        with graph.inserting_before(call.node):
            training, r_max, d_max = (
                graph.create_node("get_attr", f"{self.owner}.{name}".lstrip("."))
                for name in ("training", "r_max", "d_max")
            )
            tensors = (given[name] for name in ("input", "running_mean", "running_var", "weight", "bias"))
            replacement = graph.call_function(
                batch_renorm,
                (*tensors, training, momentum, given["eps"]),
                {"r_max": r_max, "d_max": d_max, "stat": self.stat},
            )
        replacement.meta = {**call.node.meta, "momentum": given["momentum"]}
        _replace(call, replacement)


_STATE = ("weight", "bias", "running_mean", "running_var")
_DIMENSIONS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def layer_of(module: fx.GraphModule, call: NormCall) -> tuple[str, type[nn.Module]] | None:
    """The path under which a call's state lies as a BatchNorm layer's does, and that layer's class."""
    state = {name: call.arguments[name] for name in _STATE if call.arguments[name] is not None}
    place = str(state["running_mean"].target).rpartition(".")[0]
    for name, node in state.items():
        if not isinstance(node, fx.Node) or node.op != "get_attr" or node.target != f"{place}.{name}":
            return None
    value = getattr(call.arguments["input"], "meta", {}).get("val")
    if not isinstance(value, Tensor) or value.dim() not in _DIMENSIONS:
        return None
    holder = module.get_submodule(place)
    return (place, _DIMENSIONS[value.dim()]) if type(holder) is nn.Module else None


def call_layer(module: fx.GraphModule, call: NormCall, place: str) -> None:
    """Puts a call of the layer in the place of one of the function."""
    with module.graph.inserting_before(call.node):
        replacement = module.graph.call_module(place, (call.arguments["input"],))
    replacement.meta = dict(call.node.meta)
    _replace(call, replacement)
    _forget_count(module.graph, f"{place}.num_batches_tracked")


def _replace(call: NormCall, replacement: fx.Node) -> None:
    graph = call.node.graph
    if call.single:
        call.node.replace_all_uses_with(replacement)
    for user in list(call.node.users):  # of the results of an operator that gives several
        if _index(user) == 0:
            user.replace_all_uses_with(replacement)
        for mover in list(user.users):  # what moved the running statistics: copy_(running_mean, getitem)
            graph.erase_node(mover)
        graph.erase_node(user)
    graph.erase_node(call.node)


def _index(node: fx.Node) -> Any:
    return node.args[1] if node.target is operator.getitem else None


_aten = torch.ops.aten
_COUNTING = ("add_", operator.iadd, operator.add, _aten.add_.Tensor, _aten.add.Tensor, _aten.copy_.default)


def _forget_count(graph: fx.Graph, target: str) -> None:
    """Removes what counts the batches: the layer counts those that move its statistics."""
    for node in [node for node in graph.nodes if node.op == "get_attr" and node.target == target]:
        counting = [user for user in node.users if user.target in _COUNTING]
        keeping = [user for count in counting for user in count.users if _keeps(user, target)]
        for user in (*keeping, *reversed(counting)):  # the copy back of a sum comes behind the sum
            if not user.users:
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _keeps(node: fx.Node, attribute: str) -> bool:
    return bool(node.target == "__setattr__" and node.args[0] == attribute)


def restore_calls(module: fx.GraphModule) -> bool:
    """Turns the calls of batch_renorm in a graph back into calls of batch_norm that follow the mode."""
    renorms = [node for node in module.graph.nodes if node.target is batch_renorm]
    for node in renorms:
        with module.graph.inserting_before(node):
            *tensors, training, momentum, eps = node.args
            arguments = (*tensors, training, node.meta.get("momentum", momentum), eps)
            restored = module.graph.call_function(F.batch_norm, arguments)
        restored.meta = dict(node.meta)
        node.replace_all_uses_with(restored)
        module.graph.erase_node(node)
        for limit in node.kwargs.values():
            if isinstance(limit, fx.Node) and not limit.users:
                bearer, _, name = str(limit.target).rpartition(".")
                module.get_submodule(bearer).__dict__.pop(name, None)
                module.graph.erase_node(limit)
    module.recompile()
    return bool(renorms)
