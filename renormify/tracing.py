"""The FX tracer whose leaves are norm layers, and a way to use it that leaves no trace in the model."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from renormify.layers import is_batch_renorm

__all__ = ["NormTracer", "is_norm", "trace"]


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

    The model is afterwards as it was: no module, attribute or random number generator has moved.
    """
    with warnings.catch_warnings(), _attributes_restored(model), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            return NormTracer().trace(model)
        except Exception:  # a forward may raise anything when it meets a proxy
            return None


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """A forward may keep what it computed (LeViT its biases); a proxy kept so would break the model."""
    before = [(module, _snapshot(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            for name, (value, content) in attributes.items():
                module.__dict__[name] = value
                if content is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of its content, where it is a plain container a forward may add to."""
    containers = (dict, OrderedDict, list, set)
    return {k: (v, v.copy() if type(v) in containers else None) for k, v in module.__dict__.items()}
