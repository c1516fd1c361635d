"""What a model was, to go back to when changing it in place fails half-way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import fx, nn

__all__ = ["undone_upon_error"]


@contextmanager
def undone_upon_error(model: nn.Module, changing: Iterable[nn.Module]) -> Iterator[None]:
    """Gives modules their class, attributes, graph and places in the model again if the body raises.

    The values of tensors are not kept: nothing that is undone here changes them.

    Args:
        model: in which modules may be exchanged.
        changing: those that may be changed; of a GraphModule, all that is below it too.
    """
    within = chain.from_iterable(module.modules() for module in model.modules() if _has_graph(module))
    undo = [_snapshot(module) for module in dict.fromkeys((*changing, *within))]
    undo += [_content(module._modules) for module in model.modules() if module._modules]
    try:
        yield
    except BaseException:
        for restore in undo:
            restore()
        raise


def _has_graph(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule)


def _snapshot(module: nn.Module) -> Callable[[], None]:
    kind, attributes = type(module), dict(vars(module))
    undo = [_content(held) for held in map(attributes.get, _REGISTERED) if held is not None]
    graph = copy.deepcopy(module.graph) if _has_graph(module) else None

    def restore() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(attributes)
        for restore_content in undo:
            restore_content()
        if graph is not None:
            module.graph = graph  # which compiles it

    return restore


def _content(held: Any) -> Callable[[], None]:
    before = copy.copy(held)

    def restore() -> None:
        held.clear()
        held.update(before)

    return restore


_REGISTERED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
