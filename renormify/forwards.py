"""A module's own forward, rewritten: where it calls batch_norm on running statistics, it is Batch Renorm.

The forward is traced as the module trains, every submodule a leaf, and its graph rewritten. In evaluation the
module's Python runs as it did. What a graph holds fixed (attributes that are plain values, optional
arguments) is compared at each call, and the forward is traced anew where it has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from renormify.calls import NormCall, norm_calls
from renormify.errors import UnsupportedModelError, one_line
from renormify.tracing import trace_forward

__all__ = ["Rewrite", "TrainingForward", "calls_in_forward"]

Rewrite = Callable[[fx.Graph, NormCall], None]
"""Replaces one call in a graph."""

_PLAIN = (type(None), bool, int, float, str)
_Constants = tuple[tuple[str, Any], ...]
_Key = tuple[tuple[str, type, Any], ...]


class TrainingForward:
    """A forward whose calls of batch_norm are rewritten while the module trains; the module comes first.

    Args:
        forward: the original, as a function of the module and its arguments.
        rewrite: what to make of each call; it can be pickled.
        left: the numbers of the calls that stay what they are.

    Raises:
        UnsupportedModelError: for a forward that takes any number of arguments.
    """

    def __init__(
        self, forward: Callable[..., Any], rewrite: Rewrite, left: frozenset[int] = frozenset()
    ) -> None:
        self.forward = forward
        self.rewrite = rewrite
        self.left = left
        self._required, self._defaults = _parameters(forward)
        # By the arguments held fixed, with their types: the function, and the attributes that it holds fixed.
        self._traced: dict[_Key, tuple[Callable[..., Any], list[Any]]] = {}

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of the forward in training; in evaluation, of the original."""
        if not module.training:
            return self.forward(module, *args, **kwargs)
        if kwargs or len(args) != len(self._required) or any(type(value) in _PLAIN for value in args):
            bound = inspect.signature(self.forward).bind(module, *args, **kwargs)
            bound.apply_defaults()
            given = dict(list(bound.arguments.items())[1:])
            inputs = {name: value for name, value in given.items() if type(value) not in _PLAIN}
            constants = {name: value for name, value in given.items() if name not in inputs}
            return self._function(module, tuple(inputs), tuple(constants.items()))(module, *inputs.values())
        return self._function(module, self._required, self._defaults)(module, *args)

    def prepare(self, module: nn.Module) -> None:
        """Traces the forward as it is called with its required arguments alone."""
        self._function(module, self._required, self._defaults)

    def _function(
        self, module: nn.Module, inputs: tuple[str, ...], constants: _Constants
    ) -> Callable[..., Any]:
        if torch.compiler.is_compiling():
            _attributes(module)  # for the compiler to watch
            _bring_up_to_date(self, module, inputs, constants)
        else:
            self.bring_up_to_date(module, inputs, constants)
        return self._traced[_key(constants)][0]

    def bring_up_to_date(self, module: nn.Module, inputs: tuple[str, ...], constants: _Constants) -> None:
        """Traces the forward, unless that was done and nothing has changed since."""
        attributes = _attributes(module)
        _, traced_with = self._traced.get(_key(constants), (None, None))
        if traced_with == attributes:
            return
        code = self._graph(module, inputs, constants).python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        self._traced[_key(constants)] = namespace["forward"], attributes

    def _graph(self, module: nn.Module, inputs: tuple[str, ...], constants: _Constants) -> fx.Graph:
        try:
            graph = trace_forward(module, self.forward, inputs, dict(constants))
        except Exception as error:  # a forward may raise anything when it meets a proxy
            raise UnsupportedModelError(
                f"the forward of {type(module).__name__} calls batch_norm and cannot be traced with the "
                f"arguments {', '.join(inputs)} ({one_line(error)}); make it call a layer"
            ) from error
        for number, call in enumerate(norm_calls(graph)):
            if number not in self.left:
                self.rewrite(graph, call)
        return graph

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingForward:
        return self  # it holds nothing of the module that it is called with

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_traced": {}}  # what exec made cannot be pickled; it is traced again


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _bring_up_to_date(
    forward: TrainingForward, module: nn.Module, inputs: tuple[str, ...], constants: _Constants
) -> bool:
    """While a compiler looks on, which cannot follow another tracer."""
    forward.bring_up_to_date(module, inputs, constants)
    return True


def _key(constants: _Constants) -> _Key:
    return tuple((name, type(value), value) for name, value in constants)


def _attributes(module: nn.Module) -> list[Any]:
    """What a graph of the module's forward may hold fixed: plain values, and what is absent."""
    found: list[Any] = []
    for part in module.modules():
        found += [(name, value) for name, value in vars(part).items() if _is_plain(value)]
        for registered in (part._parameters, part._buffers, part._modules):
            found += [name for name, value in registered.items() if value is None]
    return found


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], _Constants]:
    """The names of the arguments that have no default, and the defaults of the others."""
    _, *parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise UnsupportedModelError("takes any number of arguments")
    required = tuple(p.name for p in parameters if p.default is p.empty)
    return required, tuple((p.name, p.default) for p in parameters if p.name not in required)


def calls_in_forward(module: nn.Module, forward: Callable[..., Any]) -> tuple[tuple[NormCall, ...], str]:
    """The calls of batch_norm that a module's own forward makes in training, or why they are not known."""
    try:
        required, defaults = _parameters(forward)
        return tuple(norm_calls(trace_forward(module, forward, required, dict(defaults)))), ""
    except Exception as error:  # a forward may raise anything when it meets a proxy
        return (), one_line(error)
