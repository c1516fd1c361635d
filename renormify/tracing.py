"""What a norm layer is, and the FX tracer of a single forward, which leaves no trace in the module."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from renormify.layers import is_batch_renorm

__all__ = [
    "class_name",
    "generators_restored",
    "hooks_on_what_is_saved",
    "is_norm",
    "trace_forward",
]


def class_name(module: nn.Module) -> str:
    """The name of the module's class; for a scripted module, of the class that was scripted."""
    return str(getattr(module, "original_name", type(module).__name__))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of any kind, or a Batch Renorm layer.

    Frozen variants derive from nn.Module alone, in every project that has one; they are known by their name
    and their buffers.
    """
    if isinstance(module, _BatchNorm) or is_batch_renorm(module):
        return True
    named = "batchnorm" in class_name(module).lower().replace("_", "")
    return named and getattr(module, "running_var", None) is not None


class _ForwardTracer(fx.Tracer):
    """Records one forward: every submodule is a leaf, and buffers are recorded like parameters.

    A forward that counts its calls in a buffer then counts none of ours.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._gradients, self._hooks = torch.is_grad_enabled(), hooks_on_what_is_saved()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Records a node, unless in what may be run a second time, when the forward is over."""
        if torch.is_grad_enabled() != self._gradients:
            raise fx.proxy.TraceError("it switches gradients, as reentrant checkpoints do")
        if hooks_on_what_is_saved() is not self._hooks:
            raise fx.proxy.TraceError("it checkpoints, or moves what is saved for backward")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Records a call; those of other threads, whose modules FX intercepts too, run as they would."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Records that a parameter or buffer is read, by this thread."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        """A norm layer that calls ``super().forward()`` calls itself, without its own forward."""
        return "super" if mod is self.root else super().path_of_module(mod)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """As all are."""
        return True


def hooks_on_what_is_saved() -> Any:
    """Those that now watch, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _keep(self: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of the stand-in alone, whatever the module has registered under that name."""
    vars(self)[name] = value


_patched = threading.RLock()  # FX exchanges methods of nn.Module while it traces


def trace_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: tuple[str, ...],
    constants: dict[str, Any],
    training: bool = True,
) -> fx.Graph:
    """The graph of a module's own forward in training, or in evaluation.

    The module, and what it refers to, is afterwards as it was: what the forward sets is set on a stand-in
    that shares its tensors and submodules.

    Args:
        module: whose attributes the forward reads.
        forward: a function of the module and its arguments.
        inputs: the names of those arguments that become placeholders.
        constants: the values of all others.
        training: the mode.

    Raises:
        Exception: whatever a forward may raise when it meets a proxy.
    """
    namespace: dict[str, Any] = {"__original__": forward, "__constants__": constants}
    named = ", ".join(f"{name}={name}" for name in inputs)
    call = f"__original__(self, {named}, **__constants__)"
    exec(f"def forward(self, {', '.join(inputs)}): return {call}", namespace)
    own = {"forward": namespace["forward"], "__setattr__": _keep}
    kind: Any = type(type(module).__name__, (_Unannounced, type(module)), own)
    stand_in: nn.Module = kind.__new__(kind)
    stand_in.__dict__.update({**vars(module), "training": training, "_forward_hooks": OrderedDict()})
    stand_in.__dict__.pop("forward", None)
    if isinstance(module, _NormBase):
        # One decides by the number of dimensions, the other by a count of batches; neither is known here.
        stand_in.__dict__["_check_input_dim"] = lambda input: None
        stand_in.__dict__["momentum"] = 0.1 if module.momentum is None else module.momentum
    touched = [vars(part) for part in module.modules()]
    registered = [*module.parameters(), *module.buffers()]
    with (
        _patched,
        warnings.catch_warnings(),
        _globals_restored(forward) as known,
        _content_restored([*touched, *known], but=registered),
        generators_restored(module),
    ):
        warnings.simplefilter("ignore")
        return _ForwardTracer().trace(stand_in)


class _Unannounced:
    """Keeps a class derived from a user's from what their ``__init_subclass__`` does."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


_CONTAINERS = (dict, list, set, deque)
_LOOKED_INTO = 1_000
"""Items; what a larger container holds is not looked into."""


@contextmanager
def generators_restored(model: nn.Module) -> Iterator[None]:
    """Gives every random number generator that the model may draw from its state again."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    numpys: Any = () if numpy is None else numpy.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpys)


@contextmanager
def _globals_restored(forward: Callable[..., Any]) -> Iterator[list[Any]]:
    """Gives the global names in the code of a forward what they stood for; yields that."""
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    before = {name: known[name] for name in getattr(code, "co_names", ()) if name in known}
    try:
        yield list(before.values())
    finally:
        known.update({name: value for name, value in before.items() if known[name] is not value})


@contextmanager
def _content_restored(values: list[Any], but: list[Tensor]) -> Iterator[None]:
    """Containers, plain objects and tensors have the content again that they had, all the way down.

    A forward may keep what it computed; a proxy kept so would break the model.

    Args:
        values: from which to go down.
        but: tensors that are none but proxies to the forward.
    """
    undo: list[Callable[[], object]] = []
    seen = set(map(id, but))
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is Tensor:
            undo.append(_tensor_restorer(value))
        elif (generator := _generator_restorer(value)) is not None:
            undo.append(generator)
        elif isinstance(value, _CONTAINERS):
            undo.append(_container_restorer(value))
            if len(value) <= _LOOKED_INTO:
                stack += value.values() if isinstance(value, dict) else value
        elif _is_plain_object(value):
            stack.append(vars(value))
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _is_plain_object(value: Any) -> bool:
    """Whether a value is of a class of somebody's own, and no module, function or class itself."""
    kind = type(value)
    foreign = kind.__module__.partition(".")[0] not in ("builtins", "torch", "numpy")
    return (
        foreign
        and hasattr(value, "__dict__")
        and not isinstance(value, (type, nn.Module, Tensor, ModuleType))
    )


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    if tensor.is_inference():
        return lambda: None
    version, value = tensor._version, tensor.detach().clone()

    def restore() -> None:
        if tensor._version != version:
            tensor.detach().copy_(value)

    return restore


def _generator_restorer(value: Any) -> Callable[[], object] | None:
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _container_restorer(container: Any) -> Callable[[], None]:
    base: Any = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    content = base(container)

    def restore() -> None:
        if not _is_same(container, content):  # another thread may be reading it
            base.clear(container)
            put_back = base.extend if base in (list, deque) else base.update
            put_back(container, content)

    return restore


def _is_same(a: Any, b: Any) -> bool:
    """Whether two contents are the same objects; comparing tensors would compute."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
