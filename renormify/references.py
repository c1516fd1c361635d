"""What the code of a forward names, read without running it, which serves where it cannot be traced too."""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from renormify.calls import NORM_FUNCTIONS

__all__ = [
    "calls_batch_norm",
    "calls_super_forward",
    "method_misled_by_super",
    "method_that_calls",
    "names_attribute",
]


def calls_batch_norm(module: nn.Module) -> bool:
    """Whether the module's own forward names batch_norm, itself or in functions that it calls.

    Code of torch is not entered; neither are the forwards of submodules.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return _is_scripted_batch_norm(getattr(module, "graph", ""))
    return any(map(_is_batch_norm, _named_functions(module)))


def method_that_calls(module: nn.Module) -> str | None:
    """The name of a method of the module's class that calls batch_norm by its name, if there is one."""
    for name, method in _methods(module):
        named = any("batch_norm" in code.co_names for code in _codes(method))
        if named and any(_is_batch_norm(found.value) for found in _Reader(method, module).names()):
            return name
    return None


def names_attribute(module: nn.Module, name: str) -> bool:
    """Whether a method of the module's class names an attribute, its own or another's."""
    return any(name in code.co_names for _, method in _methods(module) for code in _codes(method))


def _methods(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """Those of the module's class and its ancestors, without torch's."""
    for cls in type(module).__mro__:
        if not _is_of_torch(cls):
            yield from ((name, value) for name, value in vars(cls).items() if isinstance(value, FunctionType))


def calls_super_forward(module: nn.Module) -> bool:
    """Whether every forward before that of torch.nn leaves the normalising to the class it derives from."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn."):
            return True
        names = {name for code in _codes(vars(cls).get("forward")) for name in code.co_names}
        if "forward" in vars(cls) and not {"super", "forward"} <= names:
            return False
    return True


def method_misled_by_super(module: nn.Module) -> str | None:
    """The name of a method whose super() means something else in a class derived anew, if there is one.

    That of ``super(self.__class__, self)`` finds the method itself, that of ``super(nn.BatchNorm2d, self)``
    a class which is no ancestor any more.
    """
    methods = ((name, method) for name, method in _methods(module) if name != "__init__")
    return next((name for name, method in methods if _Reader(method, module).misleads_super()), None)


def _is_of_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.")


def _is_batch_norm(function: Any) -> bool:
    if isinstance(function, torch.jit.ScriptFunction):
        return _is_scripted_batch_norm(function.inlined_graph)
    return getattr(type(function), "__hash__", None) is not None and function in NORM_FUNCTIONS


def _is_scripted_batch_norm(graph: object) -> bool:
    return any(mark in str(graph) for mark in ("batch_norm(", 'Constant[name="batch_norm"]'))


def _codes(function: Any) -> Iterator[CodeType]:
    code = getattr(function, "__code__", None)
    stack = [] if code is None else [code]
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


class _Named(NamedTuple):
    """A value that a forward names, and the object that it was found on, which may be its ``self``."""

    value: Any
    owner: Any


def _named_functions(module: nn.Module) -> Iterator[Any]:
    """Every function that the forward names, and those that these name, each once."""
    seen: set[tuple[int, int]] = set()
    stack = [_Named(vars(module).get("forward", type(module).forward), module)]
    stack += [_Named(type(module).forward, module)]
    while stack:
        function, owner = _unwrapped(*stack.pop())
        if (id(function), id(owner)) in seen:
            continue
        seen.add((id(function), id(owner)))
        yield function
        if isinstance(function, FunctionType) and not _is_of_a_library(function):
            defaults = (function.__defaults__ or ()) + tuple((function.__kwdefaults__ or {}).values())
            stack += [_Named(value, owner) for value in defaults]
            stack += _Reader(function, owner).names()
            if any("super" in code.co_names for code in _codes(function)):
                stack += _inherited(function, owner)


def _is_of_a_library(function: FunctionType) -> bool:
    """Whether it is code of torch, of NumPy or of Python, none of which calls batch_norm for a forward."""
    package = str(function.__module__).partition(".")[0]
    if package in sys.stdlib_module_names:  # unless it is a user's of the same name
        return function.__code__.co_filename.startswith(_OF_PYTHON)
    return package in ("torch", "numpy")


_OF_PYTHON = (sysconfig.get_path("stdlib"), "<frozen")


_ENTERED_OTHERWISE = (
    type,
    nn.Module,
    torch.jit.ScriptFunction,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)


def _unwrapped(value: Any, owner: Any) -> _Named:
    """The function within what wraps it; of an object that can be called, its method."""
    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, MethodType):
            value, owner = value.__func__, value.__self__
        elif isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        else:
            break
    if isinstance(value, _ENTERED_OTHERWISE):
        return _Named(value, owner)
    called = inspect.getattr_static(type(value), "__call__", None)
    return _Named(called, value) if isinstance(called, FunctionType) else _Named(value, owner)


class _Reader:
    """Reads the code of a function, and of those in it: what chains of names such as ``F.relu`` stand for.

    Args:
        function: whose code is read; it is not run.
        owner: its first argument, if it is a method; taken to be that of functions called by their name too.
    """

    def __init__(self, function: FunctionType, owner: Any) -> None:
        self.function, self.owner = function, owner
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        self.known = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        if function.__code__.co_argcount:
            self.known[function.__code__.co_varnames[0]] = owner

    def names(self) -> Iterator[_Named]:
        """Everything that can be called, as far as it is known."""
        for code in _codes(self.function):
            value: Any = None
            for instruction in dis.get_instructions(code):
                name, operation = instruction.argval, instruction.opname
                if operation.startswith(("STORE_FAST", "STORE_DEREF")):
                    if value is not None:
                        self.known[name] = _bound(name, value)
                    continue
                if not operation.startswith(_READING):
                    continue
                holder, value = value, self._read(operation, name, value)
                is_method = operation.startswith(_ATTRIBUTE) and not isinstance(holder, (ModuleType, type))
                owner = holder if is_method else self.owner
                yield from _held(value, owner)

    def misleads_super(self) -> bool:
        """Whether super() is given ``self.__class__``, ``type(self)``, or a BatchNorm of torch."""
        for code in _codes(self.function):
            loaded: list[tuple[str, Any]] | None = None  # since super() was named, until it is called
            for instruction in dis.get_instructions(code):
                name, operation = instruction.argval, instruction.opname
                if operation.startswith("LOAD_GLOBAL") and name == "super":
                    loaded = []
                elif loaded is not None and operation.startswith(_READING) and "SUPER" not in operation:
                    loaded.append((operation, name))
                elif loaded is not None and operation.startswith(_CALLING):
                    if self._is_misleading(loaded):
                        return True
                    loaded = None
        return False

    def _is_misleading(self, loaded: list[tuple[str, Any]]) -> bool:
        value: Any = None
        for operation, name in loaded[:-1]:
            if (name == "__class__" and operation.startswith(_ATTRIBUTE)) or name == "type":
                return True
            value = self._read(operation, name, value)
        return isinstance(value, type) and issubclass(value, _BatchNorm) and _is_of_torch(value)

    def _read(self, operation: str, name: Any, value: Any) -> Any:
        """What an instruction puts on the stack, upon ``value``."""
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self.function.__globals__.get(name, getattr(builtins, name, None))
        if operation.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
            return self.known.get(name)
        if operation == "IMPORT_NAME":
            package = self.function.__globals__.get("__package__") or ""
            return sys.modules.get(name) or sys.modules.get(f"{package}.{name}".strip("."))
        if operation == "IMPORT_FROM":  # of ``import a.b as c`` it takes one after the other
            return getattr(value, name, value)
        if operation == "LOAD_CONST":  # as in getattr(F, "batch_norm")
            return _attribute(value, name) if isinstance(name, str) else value
        return _attribute(value, name) if operation.startswith(_ATTRIBUTE) else None


def _held(value: Any, owner: Any, depth: int = 2) -> Iterator[_Named]:
    """What can be called: a value, or what lies in a container; of a class, its instances too."""
    if isinstance(value, (dict, list, tuple)):
        for one in (value.values() if isinstance(value, dict) else value) if depth else ():
            yield from _held(one, owner, depth - 1)
    elif callable(value) or type(value) in _WRAPPERS:
        yield _Named(value, owner)
        if isinstance(value, type) and not issubclass(value, nn.Module):
            called = inspect.getattr_static(value, "__call__", None)
            yield from (_Named(called, value),) if isinstance(called, FunctionType) else ()


def _bound(name: str, value: Any) -> Any:
    """What a local name stands for; ``import a.b`` binds ``a``."""
    within = isinstance(value, ModuleType) and value.__name__.startswith(f"{name}.")
    return sys.modules.get(name) if within else value


_WRAPPERS = (staticmethod, classmethod, property)
_READING = ("LOAD_", "IMPORT_")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_CALLING = ("PRECALL", "CALL", "LOAD_SUPER")


def _inherited(function: FunctionType, owner: Any) -> Iterator[_Named]:
    """What ``super()`` may find under some names: all that the owner's class and its ancestors have."""
    names = {name for code in _codes(function) for name in code.co_names}
    for cls in type(owner).__mro__:
        yield from (_Named(vars(cls)[name], owner) for name in names if name in vars(cls))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name of an enclosing function that was not bound yet
        return False


def _attribute(value: Any, name: str) -> Any:
    """An attribute of whatever has it without computing; submodules' own forwards are not asked for."""
    if (
        value is None
        or isinstance(value, torch.Tensor)
        or (isinstance(value, nn.Module) and name == "forward")
    ):
        return None
    if name == "__class__":
        return type(value)
    if isinstance(value, (ModuleType, torch._ops.OpOverloadPacket)):
        return getattr(value, name, None)
    if isinstance(value, nn.Module) and name in value._modules:
        return value._modules[name]
    if isinstance(value, type) and issubclass(value, torch.autograd.Function) and name == "apply":
        name = "forward"
    return inspect.getattr_static(value, name, None)
