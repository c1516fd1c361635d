"""Where a forward runs again for backward, the second run must repeat the first.

Activation checkpointing computes a segment again when the running statistics have moved already. Had the
second run its own r and d, the gradient would belong to another function; and it would move the statistics
twice. So a layer's run inside a segment leaves a record with that segment, and the n-th run of the layer in a
replay takes the n-th record. torch does not tell a module which segment it runs in; the Python stack does.

A compiler recomputes likewise, what it does not save; see :func:`kept_minimum`.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from renormify.kernels import Record

__all__ = ["find_record", "kept_minimum", "may_be_replayed", "remember", "unseen_by_policies"]


@dataclass
class _Segment:
    """The records of each layer (by the id of its running mean), and how many a backward has replayed."""

    records: dict[int, list[Record]] = field(default_factory=lambda: defaultdict(list))
    replayed: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))


_segments: WeakKeyDictionary[Any, _Segment] = WeakKeyDictionary()  # a segment goes when its backward is over


def may_be_replayed() -> bool:
    """Whether this forward can be one of those that checkpointing runs again.

    It runs them without gradient (reentrant) or with hooks on what is saved for backward (otherwise).
    """
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def remember(running_mean: Tensor, record: Record) -> None:
    """Leaves the record with every segment that is running."""
    running, _ = _segments_on_the_stack()
    _leave(running_mean, record, running)


def find_record(running_mean: Tensor) -> Record | None:
    """The record of the run that this one repeats, or None for a first run."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    running, replayed = _segments_on_the_stack()
    segment = _segments.get(replayed) if replayed is not None else None
    if segment is None:
        return None
    records, run = segment.records[id(running_mean)], segment.replayed[task, id(running_mean)]
    if run >= len(records):
        return None
    segment.replayed[task, id(running_mean)] += 1
    # A segment inside of the replayed one is a new one now, and will be replayed itself.
    _leave(running_mean, records[run], running)
    return records[run]


def _leave(running_mean: Tensor, record: Record, running: list[Any]) -> None:
    for key in running:
        _segments.setdefault(key, _Segment()).records[id(running_mean)].append(record)


_FORWARD = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD = checkpoint.CheckpointFunction.backward.__code__
_CALL = checkpoint._checkpoint_impl.__code__


def _segments_on_the_stack() -> tuple[list[Any], Any]:
    """The segments whose first run the caller is in, up to one that is being replayed, and that one or None.

    A segment is known by the object that torch makes for each call of ``checkpoint``: the context of its
    autograd Function (reentrant), or its ``_CheckpointFrame``, which its hooks hold.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    held = None if hooks is None else _frame_of(hooks[0])
    running: list[Any] = [] if held is None else [held]
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        code = caller.f_code
        if code is _FORWARD:
            running.append(caller.f_locals["ctx"])
        elif code is _BACKWARD:
            return running, caller.f_locals["ctx"]
        elif code is _CALL:
            own = caller.f_locals["gen"].gi_frame.f_locals["new_frame"] if "gen" in caller.f_locals else held
            running += [own] if own is not held else []
        elif code.co_name == "unpack_hook" and code.co_filename == checkpoint.__file__:
            return running, caller.f_locals["frame"]
        caller = caller.f_back
    return running, None


def _frame_of(hook: Any) -> Any:
    """What a hook of checkpoint holds as its ``frame``; None for any other."""
    if getattr(getattr(hook, "__code__", None), "co_filename", None) != checkpoint.__file__:
        return None
    return inspect.getclosurevars(hook).nonlocals.get("frame")


@contextmanager
def unseen_by_policies() -> Iterator[None]:
    """Hides what is computed here from selective checkpointing, which expects it in the replay too."""
    selective = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    if any(isinstance(mode, selective) for mode in _get_current_dispatch_mode_stack()):
        with _disable_current_modes():
            yield
    else:
        yield


def kept_minimum(value: Tensor, limit: float | Tensor) -> Tensor:
    """The smaller of two, marked in a graph under compilation as one to be saved for backward.

    The compiler would otherwise compute r and d again in backward, from running statistics that have moved.
    """
    limit = torch.as_tensor(limit, dtype=value.dtype, device=value.device)
    return torch.ops.renormify.kept_minimum(value, limit)  # type: ignore[no-any-return]


def _kept_minimum(value: Tensor, limit: Tensor) -> Tensor:
    smaller = torch.minimum(value, limit)
    tracing = get_proxy_mode()  # this runs while the compiler traces; its newest such node is the one
    if tracing is not None:
        minima = (node for node in reversed(tracing.tracer.graph.nodes) if node.target is _MINIMUM)
        next(minima).meta["recompute"] = checkpoint.CheckpointPolicy.MUST_SAVE
    return smaller


_MINIMUM = torch.ops.aten.minimum.default
_library: Any = torch.library.Library("renormify", "DEF")  # type: ignore[no-untyped-call]
_library.define("kept_minimum(Tensor value, Tensor limit) -> Tensor")
_library.impl("kept_minimum", _kept_minimum, "CompositeImplicitAutograd")
