"""Calls of batch_norm in a graph, rewritten into Batch Renorm."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from renormify.calls import NormCall, index_of
from renormify.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

__all__ = ["call_module", "is_own", "layer_of", "problem_of"]


_KNOWN_RESULTS = (0, 3, 4)  # the output, and the running statistics as they move


def problem_of(call: NormCall) -> str | None:
    """Why a call cannot be rewritten, or None."""
    for name in ("running_mean", "running_var"):
        statistics = call.arguments[name]
        if not isinstance(statistics, fx.Node) or statistics.op not in ("get_attr", "placeholder"):
            return "its running statistics are computed in the forward, as for instance norm"
    used = [] if call.single else [index_of(user) for user in call.node.users if user.users]
    if any(index not in _KNOWN_RESULTS for index in used):
        return "the statistics of the batch that it returns are used"
    return None


def is_own(call: NormCall) -> bool:
    """Whether the running statistics are those of the module whose forward was traced."""
    return all(call.arguments[name].target == name for name in ("running_mean", "running_var"))


_aten = torch.ops.aten
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
    free = type(holder) in (
        nn.Module,
        BatchRenorm1d,
        BatchRenorm2d,
        BatchRenorm3d,
    )  # or made of the same state
    return (place, _DIMENSIONS[value.dim()]) if free else None


def call_module(module: fx.GraphModule, call: NormCall, place: str, arguments: tuple[str, ...]) -> None:
    """Puts a call of a submodule in the place of one of the function."""
    with module.graph.inserting_before(call.node):
        replacement = module.graph.call_module(place, tuple(call.arguments[name] for name in arguments))
    outputs = [user for user in call.node.users if index_of(user) == 0]
    replacement.meta = dict((outputs or [call.node])[0].meta)
    _replace(call, replacement)
    _forget_count(module.graph, f"{place}.num_batches_tracked")


def _replace(call: NormCall, replacement: fx.Node) -> None:
    graph = call.node.graph
    if call.single:
        call.node.replace_all_uses_with(replacement)
    moved = {3: call.arguments["running_mean"], 4: call.arguments["running_var"]}
    for result in list(call.node.users):  # of an operator that gives several
        index = index_of(result)
        for user in list(result.users):
            if user.target is _aten.copy_.default and user.args[0] is moved.get(index):
                graph.erase_node(user)  # it moved the running statistics, as the replacement does
        result.replace_all_uses_with(moved.get(index, replacement))
        graph.erase_node(result)
    graph.erase_node(call.node)


_COUNTING = ("add_", operator.iadd, operator.add, _aten.add_.Tensor, _aten.add.Tensor, _aten.copy_.default)


def _forget_count(graph: fx.Graph, target: str) -> None:
    """Removes what counts the batches: the layer counts those that move its statistics."""
    for node in [node for node in graph.nodes if node.op == "get_attr" and node.target == target]:
        _erase_count(node)


def _erase_count(node: fx.Node) -> None:
    for user in reversed(list(node.users)):  # the copy back of a sum comes behind the sum
        if user.target in _COUNTING:
            _erase_count(user)
    if not node.users:
        node.graph.erase_node(node)
