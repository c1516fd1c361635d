"""The example arguments of a model: their tensors and their batch axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from renormify import errors

__all__ = ["as_arguments", "batch_size", "has_batch", "leaf_names", "map_tensors", "tensors_of", "unwrapped"]


def as_arguments(args: Any) -> tuple[Any, ...]:
    """Return the positional arguments of forward: a tensor, a list or a dict becomes a tuple of one.

    Raises:
        errors.InputError: there is no tensor in ``args``.
    """
    arguments = args if isinstance(args, tuple) else (args,)
    if not tensors_of(arguments):
        raise errors.InputError(
            f"expected an example input, a tensor or a tuple of tensors (got {type(args).__name__})"
        )
    return arguments


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in ``tree``, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Apply ``function`` to each tensor of ``arguments`` and leave everything else."""
    mapped: tuple[Any, ...] = pytree.tree_map_only(Tensor, function, arguments)
    return mapped


def leaf_names(tree: Any) -> list[str]:
    """Return a name for each leaf, from the keys and fields that lead to it: "boxes", "0_scores", or ""."""
    return ["_".join(_key_of(key) for key in path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _key_of(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))))


def batch_size(arguments: tuple[Any, ...]) -> int | None:
    """Return the first dimension of the first tensor that has one: the batch."""
    return next((tensor.shape[0] for tensor in tensors_of(arguments) if tensor.ndim > 0), None)


def has_batch(tensor: Tensor, size: int | None) -> bool:
    """Tell whether the first dimension of ``tensor`` is the batch of ``size`` rows."""
    return tensor.ndim > 0 and tensor.shape[0] == size


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and ``torch.compile``.

    They compute what it computes; their forwards take ``*args``, whose batch torch.export cannot name.
    """
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        # The class of compiled modules is private, and importing it is slow.
        inside = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inside, torch.nn.Module):
            return model
        model = inside
