"""Calls of batch_norm: in the nodes of a graph, and in the code of a forward that was not traced yet."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = [
    "NormCall",
    "calls_batch_norm",
    "calls_super_forward",
    "index_of",
    "norm_calls",
    "operator_name",
    "unknown_calls",
]

_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_FIXED = tuple(name for name in _ATEN if name != "training")
_aten = torch.ops.aten

# The functions, with the names of their arguments. Where training is not among them, it is in the name.
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _ATEN,
    torch.native_batch_norm: _ATEN,
    _aten.batch_norm.default: _ATEN,
    _aten.native_batch_norm.default: _ATEN,
    _aten.cudnn_batch_norm.default: _ATEN,
    _aten.miopen_batch_norm.default: _ATEN,
    _aten._native_batch_norm_legit.default: _ATEN,
    _aten._native_batch_norm_legit_functional.default: _ATEN,
    _aten._native_batch_norm_legit_no_training.default: _FIXED,
    _aten._batch_norm_with_update.default: _FIXED,
    _aten._batch_norm_with_update_functional.default: _FIXED,
    _aten._batch_norm_no_update.default: _FIXED,
}
_EVALUATING = (_aten._native_batch_norm_legit_no_training.default, _aten._batch_norm_no_update.default)
_SINGLE = (F.batch_norm, torch.batch_norm, _aten.batch_norm.default)
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


@dataclass(frozen=True)
class NormCall:
    """One call of batch_norm in a graph."""

    node: fx.Node

    @property
    def arguments(self) -> dict[str, Any]:
        """By their names in :func:`torch.nn.functional.batch_norm`; each a node, or a constant.

        Read anew each time: rewriting one call exchanges the input of the next.
        """
        target = _overload(self.node.target)
        names = _ARGUMENTS[target]
        given = zip(names, self.node.args, strict=False)  # a further argument chooses a kernel
        arguments = {**_DEFAULTS, **dict(given), **self.node.kwargs}
        if "training" not in names:
            arguments["training"] = target not in _EVALUATING
        for name in ("running_mean", "running_var"):
            arguments[name] = _origin(arguments.get(name))
        return arguments

    @property
    def single(self) -> bool:
        """Whether the call gives its output alone, rather than the first of several."""
        return _overload(self.node.target) in _SINGLE

    @property
    def trains(self) -> bool:
        """Whether the call, as it was recorded, normalises by the batch."""
        return self.arguments["training"] is not False


def index_of(node: fx.Node) -> Any:
    """Which result of an operator a node takes."""
    return node.args[1] if node.target is operator.getitem else None


def _origin(statistics: Any) -> Any:
    """Where the statistics came from that an operator without side effects has moved."""
    while isinstance(statistics, fx.Node) and index_of(statistics) in (3, 4):
        mover: Any = statistics.args[0]
        if _overload(mover.target) not in _ARGUMENTS:
            break
        names = _ARGUMENTS[_overload(mover.target)]
        statistics = mover.args[names.index("running_mean" if index_of(statistics) == 3 else "running_var")]
    return statistics


def norm_calls(graph: fx.Graph) -> Iterator[NormCall]:
    """The calls that use running statistics; without them it is weight standardisation or instance norm.

    They may be replaced one by one.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and _overload(node.target) in _ARGUMENTS:
            call = NormCall(node)
            if call.arguments["running_mean"] is not None:
                yield call


def _overload(target: Any) -> Any:
    """The operator that a packet of overloads stands for; each of these has but the one."""
    return getattr(target, "default", None) if isinstance(target, torch._ops.OpOverloadPacket) else target


def unknown_calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of operators that are batch_norm by their name, and of no kind that is known here."""
    for node in graph.nodes:
        name = operator_name(node).lower()
        known = _overload(node.target) in _ARGUMENTS or "backward" in name
        if node.op == "call_function" and "batch_norm" in name and not known:
            yield node


def operator_name(node: fx.Node) -> str:
    """What the function that a node calls is named."""
    return str(getattr(node.target, "__name__", node.target))


# The same functions as a forward may name them.
_CALLABLES = {*_ARGUMENTS, *(getattr(op, "overloadpacket", op) for op in _ARGUMENTS)}


def calls_batch_norm(module: nn.Module) -> bool:
    """Whether the module's own forward names batch_norm, itself or in functions that it calls.

    Read from the code, which is there also where the forward cannot be traced. Code of torch is not entered.
    """
    return any(target in _CALLABLES for target in _named_functions(module) if _is_hashable(target))


def calls_super_forward(module: nn.Module) -> bool:
    """Whether every forward before that of torch.nn leaves the normalising to the class it derives from."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn."):
            return True
        names = {name for code in _codes(vars(cls).get("forward")) for name in code.co_names}
        if "forward" in vars(cls) and not {"super", "forward"} <= names:
            return False
    return True


def _is_hashable(thing: object) -> bool:
    return getattr(type(thing), "__hash__", None) is not None


def _codes(function: Any) -> Iterator[CodeType]:
    code = getattr(function, "__code__", None)
    stack = [] if code is None else [code]
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _named_functions(module: nn.Module) -> Iterator[Any]:
    """Every function that the forward names, and those that these name, each once."""
    seen: set[int] = set()
    stack: list[Any] = [type(module).forward]
    while stack:
        function = stack.pop()
        if isinstance(function, functools.partial):
            function = function.func
        if isinstance(function, MethodType):
            function = function.__func__
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        if isinstance(function, FunctionType) and not str(function.__module__).startswith("torch."):
            stack += (function.__defaults__ or ()) + tuple((function.__kwdefaults__ or {}).values())
            for code in _codes(function):
                stack += _names(code, function, module)
                if "super" in code.co_names:
                    stack += _inherited(code.co_names, module)


def _names(code: CodeType, function: FunctionType, module: nn.Module) -> Iterator[Any]:
    """What chains of names such as ``F.batch_norm`` or ``self.norm`` stand for, as far as they are known."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    outer = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    own = code.co_varnames[0] if code.co_argcount else None
    value: Any = None
    for instruction in dis.get_instructions(code):
        name, operation = instruction.argval, instruction.opname
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(name)
        elif operation in ("LOAD_DEREF", "LOAD_CLOSURE"):
            value = outer.get(name)
        elif operation.startswith("LOAD_FAST"):
            value = module if name == own else None
        elif operation in ("LOAD_ATTR", "LOAD_METHOD") and value is not None:
            value = _attribute(value, name)
        else:
            continue
        if callable(value):
            yield value


def _inherited(names: tuple[str, ...], module: nn.Module) -> Iterator[Any]:
    """What ``super()`` may find under some names: all that the module's class and its ancestors have."""
    for cls in type(module).__mro__:
        yield from (vars(cls)[name] for name in names if name in vars(cls))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name of an enclosing function that was not bound yet
        return False


def _attribute(value: Any, name: str) -> Any:
    """Of a Python module, an operator's namespace or the module itself; others may compute when asked."""
    if isinstance(value, nn.Module):
        found = value.__dict__.get(name, getattr(type(value), name, None))
        return None if isinstance(found, property) else found
    if isinstance(value, (ModuleType, torch._ops.OpOverloadPacket)):
        return getattr(value, name, None)
    if isinstance(value, type) and issubclass(value, nn.Module):
        return inspect.getattr_static(value, name, None)
    return None
