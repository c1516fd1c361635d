"""What a norm layer is, and the FX tracer of a single forward, which leaves no trace in the module."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from renormify.layers import is_batch_renorm

__all__ = ["Trace", "class_name", "generators_restored", "is_norm", "modes", "trace_forward"]


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
        self._modes, self._hooks = modes(), _hooks_on_what_is_saved()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Records a node, unless in a context that the graph would not hold."""
        if modes() != self._modes:
            raise fx.proxy.TraceError("it switches gradients or autocast")
        if _hooks_on_what_is_saved() is not self._hooks:
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
        return "normalise" if mod is self.root else super().path_of_module(mod)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """As all are."""
        return True


def modes() -> tuple[bool, ...]:
    """Whether gradients and autocast are on, which a forward may ask."""
    return torch.is_grad_enabled(), *map(torch.is_autocast_enabled, ("cpu", "cuda"))


def _hooks_on_what_is_saved() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _set_attribute(self: nn.Module, name: str, value: Any) -> None:
    """Records what a forward keeps, so that the graph keeps it too."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_module", "__setattr__", (name, value), {})
    elif value is not getattr(self, name, self) and not (
        type(value) in _PLAIN and value == getattr(self, name)
    ):
        raise fx.proxy.TraceError(f"it sets self.{name}")
    nn.Module.__setattr__(self, name, value)


_PLAIN = (type(None), bool, int, float, str)


class Trace(NamedTuple):
    """The graph of a forward, and the names of the module's attributes that were read on the way."""

    graph: fx.Graph
    read: tuple[str, ...]


_patched = threading.RLock()  # FX exchanges methods of nn.Module while it traces


def trace_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: tuple[str, ...],
    constants: dict[str, Any],
    training: bool = True,
) -> Trace:
    """The graph of a module's own forward in training, or in evaluation.

    The module is afterwards as it was: what the forward sets is set on a stand-in that shares its tensors and
    submodules.

    Args:
        module: whose attributes the forward reads.
        forward: a function of the module and its arguments.
        inputs: the names of those arguments that become placeholders.
        constants: the values of all others.
        training: the mode.

    Raises:
        Exception: whatever a forward may raise when it meets a proxy.
    """
    read: dict[str, None] = {}

    def note(self: nn.Module, name: str) -> Any:
        read[name] = None
        return super(kind, self).__getattribute__(name)

    namespace: dict[str, Any] = {"original": forward, "constants": constants}
    named = ", ".join(f"{name}={name}" for name in inputs)
    exec(f"def forward(self, {', '.join(inputs)}): return original(self, {named}, **constants)", namespace)
    own = {"forward": namespace["forward"], "__setattr__": _set_attribute, "__getattribute__": note}
    kind: Any = type(type(module).__name__, (_Unannounced, type(module)), own)
    stand_in: nn.Module = kind.__new__(kind)
    stand_in.__dict__.update({**vars(module), "training": training, "_forward_hooks": OrderedDict()})
    stand_in.__dict__.pop("forward", None)
    if isinstance(module, _NormBase):
        # One decides by the number of dimensions, the other by a count of batches; neither is known here.
        stand_in.__dict__["_check_input_dim"] = lambda input: None
        stand_in.__dict__["momentum"] = 0.1 if module.momentum is None else module.momentum
    for _ in range(1 if threading.active_count() == 1 else 10):  # another thread may draw in the meantime
        with (
            _patched,
            warnings.catch_warnings(),
            _attributes_restored(stand_in),
            generators_restored(module) as drawn,
        ):
            warnings.simplefilter("ignore")
            graph = _ForwardTracer().trace(stand_in)
            if not drawn():
                return Trace(graph, tuple(name for name in read if name not in _OF_TORCH))
    raise fx.proxy.TraceError("it draws random numbers, which a graph would hold fixed")


class _Unannounced:
    """Keeps a class derived from a user's from what their ``__init_subclass__`` does."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


_OF_TORCH = frozenset({*vars(nn.Module()), *dir(nn.Module)} - {"training"})


_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


@contextmanager
def generators_restored(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives every random number generator that the model may draw from its state again.

    Yields:
        A function that tells whether one of the host's was drawn from.
    """
    numpy = sys.modules.get("numpy")
    python, torchs = random.getstate(), torch.get_rng_state()
    numpys: Any = () if numpy is None else numpy.random.get_state()

    def drawn() -> bool:
        if random.getstate() != python or not torch.equal(torch.get_rng_state(), torchs):
            return True
        return numpy is not None and not all(map(numpy.array_equal, numpy.random.get_state(), numpys))

    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield drawn
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpys)


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """A forward may keep what it computed; a proxy kept so would break the model.

    Raises:
        TraceError: where the graph would not keep it, being in no attribute of the model itself.
    """
    own = {id(vars(model)), *map(id, (model._buffers, model._parameters, model._modules))}
    undo = [_snapshot(vars(module), own) for module in model.modules()]
    registered = {name for names in (model._buffers, model._parameters, model._modules) for name in names}
    changed = False
    try:
        yield
        changed = registered != {
            name for names in (model._buffers, model._parameters, model._modules) for name in names
        }
    finally:
        changed |= sum(restore() for restore in undo) > 0  # each of them
    if changed:
        raise fx.proxy.TraceError("it keeps what it computes")


def _snapshot(container: Any, own: set[int]) -> Callable[[], bool]:
    """A function that gives a container, and the containers and tensors in it, their content again.

    It returns whether anything had changed, but for the containers whose changes are recorded.
    """
    values = container.values() if isinstance(container, dict) else container
    inner = [_snapshot(value, own) for value in values if type(value) in _CONTAINERS]
    tensors = [
        (t, t._version, t.detach().clone()) for t in values if type(t) is Tensor and not t.is_inference()
    ]
    content = dict(container) if isinstance(container, dict) else list(container)

    def restore() -> bool:
        now = dict(container) if isinstance(container, dict) else list(container)
        changed = not _is_same(now, content)
        if changed:  # another thread may be reading it
            container.clear()
            container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        changed &= id(container) not in own
        changed |= sum(undo() for undo in inner) > 0
        for tensor, version, value in tensors:
            if tensor._version != version:
                tensor.detach().copy_(value)
                changed = True
        return changed

    return restore


def _is_same(a: Any, b: Any) -> bool:
    """Whether two contents are the same objects; comparing tensors would compute."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
