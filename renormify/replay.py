"""Activation checkpointing runs a forward twice; the second run must repeat the first.

In backward, checkpointing computes the forward again, when the running statistics have moved already. Had the
second run its own r and d, the gradient would belong to another function; and it would move the statistics
twice. So a forward that may be replayed leaves a record, and the replay finds it by the statistics of its
batch, which are the same. A record is not consumed: nested segments replay more than once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from renormify.errors import RenormifyWarning

__all__ = ["Record", "find_record", "may_be_replayed", "remember"]

_KEPT = 32
"""Records for each layer: how often it may run between a forward and its backward."""


@dataclass
class Record:
    """What a forward made of its batch: statistics, and the r and d that followed; each :math:`(C)`."""

    mean: Tensor
    var: Tensor
    r: Tensor
    d: Tensor
    replays: int = 0


_records: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by running_mean, so that they go when the layer goes


def may_be_replayed() -> bool:
    """Whether this forward is one of those that checkpointing runs again.

    It runs them without gradient (reentrant) or with hooks on what is saved for backward (otherwise).
    """
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def remember(running_mean: Tensor, record: Record) -> None:
    """Keeps the record of a forward that may be replayed.

    Outside of backward, a record that was replayed belongs to a backward that is over.
    """
    past: list[Record] = _records.get(running_mean, [])  # type: ignore[no-untyped-call]
    kept = [record for record in past if not record.replays]
    _records[running_mean] = [*kept[1 - _KEPT :], record]


def find_record(running_mean: Tensor, mean: Tensor, var: Tensor) -> Record | None:
    """The record of the forward that this one replays, or None for a first forward.

    A forward in backward that has no record at all is a first one (a hook may run a layer there).
    """
    if torch._C._current_graph_task_id() == -1 or running_mean not in _records:
        return None
    matching: list[Record] = [
        record for record in _records[running_mean] if _same(record.mean, mean) and _same(record.var, var)
    ]
    if not matching:
        warnings.warn(
            f"a Batch Renorm layer ran more than {_KEPT} times between a checkpointed forward and its "
            "backward, or is replayed after the next step; the gradient of this forward is not exact",
            RenormifyWarning,
            stacklevel=4,
        )
        return None
    # Of several forwards on one and the same batch, each is replayed in its turn.
    record = min(matching, key=lambda record: (not torch.equal(record.mean, mean), record.replays))
    record.replays += 1
    return record


def _same(recorded: Tensor, replayed: Tensor) -> bool:
    # To rounding and not to the bit: some kernels add in an order that changes from run to run.
    return torch.allclose(recorded, replayed, rtol=1e-5, atol=1e-8, equal_nan=True)
