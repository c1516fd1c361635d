"""The FX tracer whose leaves are norm layers, and a way to use it that leaves no trace in the model."""

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
from torch.nn.modules.batchnorm import _BatchNorm

from renormify.layers import is_batch_renorm

__all__ = ["NormTracer", "generators_restored", "is_norm", "trace"]


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


class NormTracer(fx.Tracer):
    """Records each norm layer as one node, whatever package its class comes from.

    Buffers are recorded too, so that a forward which counts its calls in one counts none of ours.
    """

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """As torch's, with norm layers beside the modules of torch.nn."""
        return is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph | None:
    """The graph of the model's forward in its present mode, or None where Python cannot be traced.

    The model is afterwards as it was: no attribute or random number generator has moved, no hook has fired.
    """
    with warnings.catch_warnings(), _attributes_restored(model), generators_restored(model):
        warnings.simplefilter("ignore")
        for module in model.modules():  # a hook that collects features would collect proxies
            for name in _HOOKS:
                module.__dict__[name] = OrderedDict()
        try:
            return NormTracer().trace(model)
        except Exception:  # a forward may raise anything when it meets a proxy
            return None


_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_forward_hooks", "_forward_pre_hooks")))
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
