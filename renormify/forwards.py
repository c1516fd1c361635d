"""A module's own forward, rewritten: where it calls batch_norm on running statistics, it is Batch Renorm.

The forward is traced as the module trains, every submodule a leaf, and its graph rewritten. In evaluation the
module's Python runs as it did. What a graph holds fixed (the attributes that were read, optional arguments,
whether gradients are on) is compared at each call, and the forward is traced anew where it has changed.
Modules that are alike share a trace.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn

from renormify.calls import NormCall, norm_calls
from renormify.errors import UnsupportedModelError, one_line
from renormify.tracing import Trace, modes, trace_forward

__all__ = ["Rewrite", "TrainingForward", "calls_in_forward", "traces_kept"]

Rewrite = Callable[[fx.Graph, NormCall], None]
"""Replaces one call in a graph."""

_PLAIN = (type(None), bool, int, float, str)
_Constants = tuple[tuple[str, Any], ...]
_Key = tuple[Any, ...]


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
        # By what a call holds fixed: the record of the last trace, and its function.
        self._traced: dict[_Key, tuple[_Record, Callable[..., Any]]] = {}

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
            _bring_up_to_date(self, module, inputs, constants)
            _fixed(module, self._traced[_key(constants)][0].trace.read)  # for the compiler to watch
        else:
            self.bring_up_to_date(module, inputs, constants)
        return self._traced[_key(constants)][1]

    def bring_up_to_date(self, module: nn.Module, inputs: tuple[str, ...], constants: _Constants) -> None:
        """Traces the forward, unless that was done and nothing has changed since."""
        key = _key(constants)
        if key in self._traced and self._traced[key][0].is_true_of(module):
            return
        try:
            record = _record(module, self.forward, inputs, constants)
        except Exception as error:  # a forward may raise anything when it meets a proxy
            raise UnsupportedModelError(
                f"the forward of {type(module).__name__} calls batch_norm and cannot be traced with the "
                f"arguments {', '.join(inputs)} ({one_line(error)}); make it call a layer"
            ) from error
        self._traced[key] = record, record.function(self.rewrite, self.left)

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
    return modes(), tuple((name, type(value), value) for name, value in constants)


@dataclass(frozen=True, eq=False)
class _Record:
    """A trace, what it is a trace of, and the functions made of it."""

    key: _Key
    names: tuple[object, ...]
    trace: Trace
    fixed: list[Any]
    functions: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def is_true_of(self, module: nn.Module) -> bool:
        """Whether a module of the same key has what the graph holds fixed."""
        return self.fixed == _fixed(module, self.trace.read)

    def function(self, rewrite: Rewrite, left: frozenset[int]) -> Callable[..., Any]:
        """The graph with its calls rewritten, but for some, as a function of the module and the inputs."""
        if (rewrite, left) not in self.functions:
            graph = copy.deepcopy(self.trace.graph)
            for number, call in enumerate(norm_calls(graph)):
                if number not in left:
                    rewrite(graph, call)
            code = graph.python_code("self")
            namespace = dict(code.globals)
            exec(code.src, namespace)
            self.functions[rewrite, left] = namespace["forward"]
        return self.functions[rewrite, left]


_records: WeakSet[_Record] = WeakSet()  # which modules that are alike share, as long as one of them lives
_kept: ContextVar[list[_Record] | None] = ContextVar("_kept", default=None)
_lock = threading.RLock()


@contextmanager
def traces_kept() -> Iterator[None]:
    """Within this, traces are shared before a module has them too."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def _record(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: tuple[str, ...],
    constants: _Constants,
    training: bool = True,
) -> _Record:
    """A trace of the module's forward, made now or before of a module like it."""
    key = (type(module), forward, inputs, training, *_key(constants))
    names = _names(module)
    with _lock:
        for record in _records:
            if record.key == key and record.names == names and record.is_true_of(module):
                return record
        trace = trace_forward(module, forward, inputs, dict(constants), training)
        record = _Record(key, names, trace, _fixed(module, trace.read))
        _records.add(record)
    if (kept := _kept.get()) is not None:
        kept.append(record)
    return record


def _names(module: nn.Module) -> tuple[object, ...]:
    """The name that a graph uses of each tensor and module registered: of one under two names, the first.

    A module with tensors that are not registered is like no other: a forward may decide by their values.
    """
    registered: Any = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
        module.named_modules(remove_duplicate=False),
    )
    first: dict[int, str] = {}
    unregistered = (object() for value in vars(module).values() if isinstance(value, Tensor))
    return *(first.setdefault(id(value), name) for name, value in registered), *unregistered


def _fixed(module: nn.Module, read: tuple[str, ...]) -> list[Any]:
    """What a graph of the module's forward may hold fixed: attributes that it read, and what is absent."""
    own, cls = vars(module), type(module)
    found = [_content(own[name] if name in own else getattr(cls, name, None)) for name in read]
    for part in module.modules():
        if part is not module:  # what is read of its parts is not known
            found += [(name, value) for name, value in vars(part).items() if _is_plain(value)]
        for registered in (part._parameters, part._buffers, part._modules):
            found += [name for name, value in registered.items() if value is None]
    return found


def _content(value: Any, depth: int = 3) -> Any:
    """A value to compare by what is in it, where it may be changed in place."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if depth and type(value) in (tuple, list, set):
        return [_content(item, depth - 1) for item in value]
    if depth and type(value) is dict:
        return [(key, _content(item, depth - 1)) for key, item in value.items()]
    if depth and type(type(value)) is type and hasattr(value, "__dict__") and not callable(value):
        return [type(value), *((name, _content(item, depth - 1)) for name, item in vars(value).items())]
    return value if type(value).__hash__ is not None else type(value)  # a function, a class, a module


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], _Constants]:
    """The names of the arguments that have no default, and the defaults of the others."""
    _, *parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise UnsupportedModelError("takes any number of arguments")
    required = tuple(p.name for p in parameters if p.default is p.empty)
    return required, tuple((p.name, p.default) for p in parameters if p.name not in required)


def calls_in_forward(
    module: nn.Module, forward: Callable[..., Any], training: bool = True
) -> tuple[tuple[NormCall, ...], str]:
    """The calls of batch_norm that a module's own forward makes in a mode, or why they are not known."""
    try:
        required, defaults = _parameters(forward)
        return tuple(norm_calls(_record(module, forward, required, defaults, training).trace.graph)), ""
    except Exception as error:  # a forward may raise anything when it meets a proxy
        return (), one_line(error)
