"""What a norm layer is, and the FX tracer of a single forward, which leaves no trace in the module."""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from renormify.layers import is_batch_renorm

__all__ = ["class_name", "generators_restored", "is_norm", "trace_forward"]


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

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """As all are."""
        return True


def trace_forward(
    module: nn.Module, forward: Callable[..., Any], inputs: tuple[str, ...], constants: dict[str, Any]
) -> fx.Graph:
    """The graph of a module's own forward in training.

    The module is afterwards as it was: what the forward sets is set on a stand-in that shares its tensors and
    submodules.

    Args:
        module: whose attributes the forward reads.
        forward: a function of the module and its arguments.
        inputs: the names of those arguments that become placeholders.
        constants: the values of all others.

    Raises:
        Exception: whatever a forward may raise when it meets a proxy.
    """
    namespace: dict[str, Any] = {"original": forward, "constants": constants}
    named = ", ".join(f"{name}={name}" for name in inputs)
    exec(f"def forward(self, {', '.join(inputs)}): return original(self, {named}, **constants)", namespace)
    kind: Any = type(type(module).__name__, (type(module),), {"forward": namespace["forward"]})
    stand_in: nn.Module = kind.__new__(kind)
    stand_in.__dict__.update({**vars(module), "training": True, "_forward_hooks": OrderedDict()})
    stand_in.__dict__.pop("forward", None)
    if isinstance(module, _NormBase):
        # One decides by the number of dimensions, the other by a count of batches; neither is known here.
        stand_in.__dict__["_check_input_dim"] = lambda input: None
        stand_in.__dict__["momentum"] = 0.1 if module.momentum is None else module.momentum
    with warnings.catch_warnings(), _attributes_restored(stand_in), generators_restored(module):
        warnings.simplefilter("ignore")
        return _ForwardTracer().trace(stand_in)


_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


@contextmanager
def generators_restored(model: nn.Module) -> Iterator[None]:
    """Gives every random number generator that the model may draw from its state again."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.random.set_state(before[1])


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """A forward may keep what it computed (LeViT its biases); a proxy kept so would break the model."""
    undo = [_snapshot(vars(module)) for module in model.modules()]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _snapshot(container: Any) -> Callable[[], None]:
    """A function that gives a container, and the containers and tensors in it, their content again."""
    values = container.values() if isinstance(container, dict) else container
    inner = [_snapshot(value) for value in values if type(value) in _CONTAINERS]
    tensors = [
        (t, t._version, t.detach().clone()) for t in values if type(t) is Tensor and not t.is_inference()
    ]
    content = dict(container) if isinstance(container, dict) else list(container)

    def restore() -> None:
        container.clear()
        container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        for undo in inner:
            undo()
        for tensor, version, value in tensors:
            if tensor._version != version:
                tensor.detach().copy_(value)

    return restore
