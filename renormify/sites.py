"""Every BatchNorm in a model, and what it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from renormify.tracing import class_name, is_norm, trace

__all__ = ["Site", "find_sites"]

_FUNCTIONS = (F.batch_norm, torch.batch_norm, torch.ops.aten.batch_norm.default)


@dataclass(frozen=True)
class Site:
    """One place where a model normalises by batch or running statistics.

    Attributes:
        name: the path of the module, "" for the root; the first one, if it has several. Of a functional call,
            the path of the module whose forward makes it.
        kind: the name of the module's class, or ``batch_norm()`` for a functional call.
        channels: how many, or None where the site does not tell.
        module: the module that normalises, or whose forward calls the function.
    """

    name: str
    kind: str
    channels: int | None
    module: nn.Module = field(repr=False, compare=False)

    @property
    def is_call(self) -> bool:
        """Whether the site is a functional call rather than a module."""
        return self.kind == "batch_norm()"


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Finds every BatchNorm of a model, in the order of its module tree.

    A GraphModule is read as it is; another module is traced where that is possible. Modules that the graph
    does not reach (an auxiliary head in evaluation mode), or all of them where there is no graph, come from
    the module tree. Functional calls are seen in a graph alone.
    """
    modules = dict(model.named_modules())
    in_tree = [_site(name, module) for name, module in modules.items() if is_norm(module)]
    graph = model.graph if isinstance(model, fx.GraphModule) else trace(model)
    calls = [] if graph is None else list(_functional_calls(graph, modules))
    order = {id(module): position for position, module in enumerate(modules.values())}
    return tuple(sorted([*in_tree, *calls], key=lambda site: order[id(site.module)]))


def _site(name: str, module: nn.Module) -> Site:
    running_var = getattr(module, "running_var", None)
    if isinstance(running_var, torch.Tensor) and not nn.parameter.is_lazy(running_var):
        return Site(name, class_name(module), running_var.numel(), module)
    channels = getattr(module, "num_features", None) or None
    return Site(name, class_name(module), channels, module)


def _functional_calls(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[Site]:
    """The calls that use running statistics; without them it is weight standardisation or instance norm."""
    seen: set[str] = set()
    calls_of_invocation: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _FUNCTIONS or _running_mean(node) is None:
            continue
        invocation, path = _innermost_module(node)
        index = calls_of_invocation.get(invocation, 0)
        calls_of_invocation[invocation] = index + 1
        name = f"{path}:{index}" if index else path
        if name not in seen:  # a module called twice makes the same calls again
            seen.add(name)
            # A GraphModule does not keep a module without state; the call is its own then.
            yield Site(name, "batch_norm()", None, modules.get(path, modules[""]))


def _running_mean(node: fx.Node) -> Any:
    position = 1 if node.target is F.batch_norm else 3
    return node.kwargs.get("running_mean", node.args[position] if len(node.args) > position else None)


def _innermost_module(node: fx.Node) -> tuple[str, str]:
    """The invocation (a key of FX) and the path of the module in whose forward the node was recorded."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    invocation, (path, _) = list(stack.items())[-1]
    return invocation, path
