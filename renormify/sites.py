"""Every BatchNorm in a model, and what it is."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import InterpreterModuleDispatcher
from torch.nn.modules.batchnorm import _NormBase

from renormify.calls import NormCall, norm_calls, operator_name, unknown_calls
from renormify.forwards import Found, calls_in_forward
from renormify.graphs import problem_of
from renormify.interception import is_rewritten
from renormify.layers import Limited, Renormalised
from renormify.references import calls_batch_norm, method_that_calls
from renormify.registry import rule_for
from renormify.tracing import class_name, is_norm

__all__ = ["Site", "find_sites"]


@dataclass(frozen=True)
class Site:
    """One place where a model normalises by batch or running statistics.

    Attributes:
        name: the path of the module, "" for the root; the first one, if it has several. Of a functional call,
            the path of the module whose forward makes it, and from the second call on its number behind a
            colon.
        kind: the name of the module's class, or ``batch_norm()`` for a functional call.
        channels: how many, or None where the site does not tell.
        module: the module that normalises, or whose forward calls the function.
        path: the path of that module, or of the GraphModule whose graph holds the call.
        owner: the path of the module in whose forward a call was made, as far as it is still there.
        number: of a functional call, which it is among those of the forward.
        calls: the functional call, as often as a graph holds it; empty for a module.
        problem: why the site cannot be anything but skipped, or None.
    """

    name: str
    kind: str
    channels: int | None
    module: nn.Module = field(repr=False, compare=False)
    path: str = field(repr=False, compare=False)
    owner: str = field(default="", repr=False, compare=False)
    number: int = field(default=0, repr=False, compare=False)
    calls: tuple[NormCall, ...] = field(default=(), repr=False, compare=False)
    problem: str | None = field(default=None, repr=False, compare=False)


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Finds every BatchNorm of a model, in the order of its module tree.

    Norm layers are found in the tree. Functional calls are found in the graph of each GraphModule, and in
    each forward whose code names the function, by tracing that forward alone.
    """
    modules = dict(model.named_modules())
    order = {path: position for position, path in enumerate(modules)}
    known = set(modules.values())
    sites = [site for path, module in modules.items() for site in _sites(path, module, known)]
    return tuple(sorted(sites, key=lambda site: order.get(site.owner or site.path, order[site.path])))


def _sites(path: str, module: nn.Module, known: Collection[nn.Module]) -> Iterator[Site]:
    if _is_layer(module) or rule_for(module) is not None:
        yield Site(path, class_name(module), _channels(getattr(module, "running_var", None)), module, path)
    elif isinstance(module, Limited):
        return  # a call that was converted
    elif isinstance(module, fx.GraphModule):
        yield from _sites_in_graph(path, module)
    elif isinstance(module, InterpreterModuleDispatcher):  # of several calls, whose state is one
        yield from _sites_interpreted(path, module._call_modules[0])
    elif isinstance(vars(module).get("graph"), fx.Graph):
        yield from _sites_interpreted(path, module)
    elif isinstance(module, torch.jit.ScriptModule):
        if calls_batch_norm(module):
            yield Site(path, _CALL, None, module, path, problem="it is scripted; convert what it came from")
    elif calls_batch_norm(module):
        yield from _sites_in_forward(path, module)
    else:
        yield from _sites_beside(path, module, known)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a norm that is converted as such, not by the call in its forward."""
    if not is_norm(module) or isinstance(module, (_NormBase, Renormalised, torch.jit.ScriptModule)):
        return is_norm(module)
    return "frozen" in class_name(module).lower() or not calls_batch_norm(module)


def _sites_in_forward(path: str, module: nn.Module) -> Iterator[Site]:
    """The calls in a forward whose code names batch_norm, or the one reason why they are not known."""
    forward = type(module).forward
    replaced = "forward" in vars(module) and not is_rewritten(module)
    found = Found() if replaced else calls_in_forward(module, forward)
    for number, call in enumerate(found.calls):
        name = f"{path}:{number}" if number else path
        problem = problem_of(call) or _problem_of_place(call, module)
        channels = _channels_of(call, module)
        yield Site(name, _CALL, channels, module, path, path, number, (call,), problem)
    if found.calls or not _may_have_statistics(module):
        return  # or it standardises its weights
    if replaced:
        problem = "its forward was replaced on the instance"
    elif found.problem:
        problem = f"its forward calls batch_norm and cannot be traced ({found.problem}); make it call a layer"
    elif (evaluating := calls_in_forward(module, forward, training=False)).calls:
        problem = "it calls batch_norm in evaluation alone, as far as a trace came"
    elif found.any or evaluating.any:
        return  # without statistics
    else:
        problem = "its code calls batch_norm where no trace came, as for an argument; make it call a layer"
    yield Site(path, _CALL, None, module, path, problem=problem)


def _problem_of_place(call: NormCall, module: nn.Module) -> str | None:
    statistics = call.arguments["running_mean"]
    if statistics.op == "get_attr" and _channels_of(call, module) is None:
        return "its running statistics lie where no name leads; register them as buffers"
    return None


def _sites_beside(path: str, module: nn.Module, known: Collection[nn.Module]) -> Iterator[Site]:
    """What normalises and is not reached by names and forwards."""
    for name, value in vars(module).items():
        held = value.items() if type(value) is dict else enumerate(value) if type(value) in _LISTS else ()
        for key, part in held:
            inner = part.named_modules() if isinstance(part, nn.Module) and part not in known else ()
            for within, norm in inner:
                if is_norm(norm):
                    place = f"{path}.{name}[{key!r}].{within}".strip(".")
                    problem = "it is in no ModuleList or ModuleDict, and so no part of the model; use one"
                    yield Site(place, class_name(norm), None, norm, path, problem=problem)
    method = method_that_calls(module)
    if method is not None and _may_have_statistics(module):
        problem = f"its method {method} calls batch_norm, not its forward; make it call a layer"
        yield Site(path, _CALL, None, module, path, problem=problem)


_LISTS = (list, tuple)


def _may_have_statistics(module: nn.Module) -> bool:
    """Whether there are tensors that may be running statistics: buffers, unregistered ones, or arguments."""
    _, *arguments = inspect.signature(type(module).forward).parameters.values()
    if len(arguments) > 2 or any(argument.kind is argument.VAR_POSITIONAL for argument in arguments):
        return True
    values = list(chain.from_iterable(vars(part).values() for part in module.modules()))
    values += [item for value in values if type(value) in _LISTS for item in value]
    return any(isinstance(value, torch.Tensor) for value in chain(module.buffers(), values))


def _sites_in_graph(path: str, module: fx.GraphModule) -> Iterator[Site]:
    """The calls of a graph, under the path of the module in whose forward each was recorded.

    A module that is called twice makes the same calls again; they are one site.
    """
    found: dict[tuple[str, int], list[NormCall]] = {}
    count: Counter[str] = Counter()
    for call in norm_calls(module.graph):
        invocation, inner = _innermost_module(call.node)
        found.setdefault((inner, count[invocation]), []).append(call)
        count[invocation] += 1
    modules = dict(module.named_modules())
    for (inner, number), calls in found.items():
        owner = ".".join(filter(None, (path, inner)))
        name = f"{owner}:{number}" if number else owner
        problem = next(filter(None, map(problem_of, calls)), None)
        bearer = modules.get(inner, module)
        channels = _channels_of(calls[0], module)
        yield Site(name, _CALL, channels, bearer, path, owner, number, tuple(calls), problem)
    for node in unknown_calls(module.graph):
        kind = f"{operator_name(node)}()"
        yield Site(path, kind, None, module, path, problem="an operator of unknown kind")


def _sites_interpreted(path: str, module: Any) -> Iterator[Site]:
    """The calls of a graph that a module interprets, as each part of what torch.export.unflatten() makes."""
    for number, call in enumerate(norm_calls(module.graph)):
        name = f"{path}:{number}" if number else path
        problem = (
            "a graph that its module interprets, as of unflatten(); convert the exported program instead"
        )
        yield Site(name, _CALL, _channels_of(call, module), module, path, path, number, problem=problem)


_CALL = "batch_norm()"


def _channels(statistics: object) -> int | None:
    if not isinstance(statistics, torch.Tensor) or nn.parameter.is_lazy(statistics):
        return None
    return statistics.numel()


def _channels_of(call: NormCall, module: nn.Module) -> int | None:
    try:
        return _channels(operator.attrgetter(str(call.arguments["running_var"].target))(module))
    except AttributeError:  # an argument of the forward, or computed in it
        return None


def _innermost_module(node: fx.Node) -> tuple[str, str]:
    """The invocation (a key of FX) and the path of the module in whose forward the node was recorded."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    invocation, (path, _) = list(stack.items())[-1]
    return invocation, path
