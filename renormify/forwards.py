"""The calls of batch_norm in a module's own forward, found by tracing it as it trains, or as it evaluates.

A trace only tells which calls there are, so that each can be reported, chosen and refused; it never runs (see
:mod:`renormify.interception`). Every submodule is a leaf. Within a conversion, modules that are alike are
traced once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from renormify.calls import NormCall, calls_any, norm_calls
from renormify.errors import UnsupportedModelError, one_line
from renormify.references import names_attribute
from renormify.tracing import trace_forward

__all__ = ["Found", "calls_in_forward", "traces_shared"]


class Found(NamedTuple):
    """What tracing a forward has found.

    Attributes:
        calls: those on running statistics.
        problem: why they are not known, or "".
        any: whether there was any call of batch_norm, on running statistics or without.
    """

    calls: tuple[NormCall, ...] = ()
    problem: str = ""
    any: bool = False


_shared: ContextVar[dict[Any, Found] | None] = ContextVar("_shared", default=None)


@contextmanager
def traces_shared() -> Iterator[None]:
    """Within this, modules that are alike share a trace; none of them is to go or to change meanwhile."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def calls_in_forward(module: nn.Module, forward: Callable[..., Any], training: bool = True) -> Found:
    """The calls of batch_norm that a module's own forward makes in a mode.

    It is traced as it is called with its required arguments alone.
    """
    shared = _shared.get()
    if shared is None:
        return _calls(module, forward, training)
    key = (type(module), forward, training, *_likeness(module))
    if key not in shared:
        shared[key] = _calls(module, forward, training)
    return shared[key]


def _calls(module: nn.Module, forward: Callable[..., Any], training: bool) -> Found:
    try:
        required, defaults = _parameters(forward)
        graph = trace_forward(module, forward, required, defaults, training)
    except Exception as error:  # a forward may raise anything when it meets a proxy
        return Found(problem=one_line(error))
    return Found(tuple(norm_calls(graph)), any=calls_any(graph))


def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the arguments that have no default, and the defaults of the others."""
    _, *parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise UnsupportedModelError("takes any number of arguments")
    required = tuple(p.name for p in parameters if p.default is p.empty)
    return required, {p.name: p.default for p in parameters if p.name not in required}


def _likeness(module: nn.Module) -> Iterator[object]:
    """What modules of a class have alike if their forwards do the same."""
    registered: Any = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
        module.named_modules(remove_duplicate=False),
    )
    without = _OF_TORCH if names_attribute(module, "num_features") else _OF_TORCH | {"num_features"}
    first: dict[int, str] = {}
    for name, value in registered:  # of one under two names, the first
        yield first.setdefault(id(value), name)
    for part in module.modules():
        yield type(part)
        for name, value in vars(part).items():
            if name not in without:
                yield name, _told(value)
        for held in (part._parameters, part._buffers, part._modules):
            yield tuple(name for name, value in held.items() if value is None)


# By which no forward of a norm decides what it calls.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, str)


def _told(value: object) -> object:
    """A value that can be told from others: what is not plain, by its identity."""
    if type(value) in _PLAIN:
        return type(value), value
    if type(value) is tuple:
        return tuple(map(_told, value))
    return id(value)
