"""Calls of batch_norm in the nodes of a graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

__all__ = [
    "NORM_FUNCTIONS",
    "NormCall",
    "arguments_of",
    "calls_any",
    "gives_statistics",
    "index_of",
    "norm_calls",
    "number_of_results",
    "operator_name",
    "unknown_calls",
]

_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_FIXED = tuple(name for name in _ATEN if name != "training")
_aten = torch.ops.aten

# The functions, with the names of their arguments. Where training is not among them, it is in the name.
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _ATEN,
    torch.native_batch_norm: _ATEN,
    torch.cudnn_batch_norm: _ATEN,
    torch.miopen_batch_norm: _ATEN,
    torch._native_batch_norm_legit: _ATEN,
    torch._batch_norm_impl_index: _ATEN,
    _aten._batch_norm_impl_index.default: _ATEN,
    _aten.batch_norm.default: _ATEN,
    _aten.native_batch_norm.default: _ATEN,
    _aten.cudnn_batch_norm.default: _ATEN,
    _aten.miopen_batch_norm.default: _ATEN,
    _aten._native_batch_norm_legit.default: _ATEN,
    _aten._native_batch_norm_legit_functional.default: _ATEN,
    _aten._native_batch_norm_legit_no_training.default: _FIXED,
    _aten._batch_norm_with_update.default: _FIXED,
    _aten._batch_norm_with_update_functional.default: _FIXED,
    _aten._batch_norm_no_update.default: _FIXED,
}
_EVALUATING = (_aten._native_batch_norm_legit_no_training.default, _aten._batch_norm_no_update.default)
_FUNCTIONAL = (
    _aten._native_batch_norm_legit_functional.default,
    _aten._batch_norm_with_update_functional.default,
)
# A function of torch gives as many results as the operator of its name.
_RESULTS = {
    function: len(getattr(_aten, function.__name__.removesuffix(".default")).default._schema.returns)
    for function in _ARGUMENTS
}
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


@dataclass(frozen=True)
class NormCall:
    """One call of batch_norm in a graph."""

    node: fx.Node

    @property
    def arguments(self) -> dict[str, Any]:
        """By their names in :func:`torch.nn.functional.batch_norm`; each a node, or a constant.

        Read anew each time: rewriting one call exchanges the input of the next.
        """
        arguments = arguments_of(self.node.target, self.node.args, self.node.kwargs)
        for name in ("running_mean", "running_var"):
            arguments[name] = _origin(arguments.get(name))
        return arguments

    @property
    def single(self) -> bool:
        """Whether the call gives its output alone, rather than the first of several."""
        return number_of_results(self.node.target) == 1

    @property
    def trains(self) -> bool:
        """Whether the call, as it was recorded, normalises by the batch."""
        return self.arguments["training"] is not False


def arguments_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by their names in :func:`torch.nn.functional.batch_norm`."""
    target = _overload(function)
    names = _ARGUMENTS[target]
    given = zip(names, args, strict=False)  # a further argument chooses a kernel
    arguments = {**_DEFAULTS, **dict(given), **kwargs}
    if "training" not in names:
        arguments["training"] = target not in _EVALUATING
    return arguments


def number_of_results(function: Any) -> int:
    """How many one of the functions gives."""
    return _RESULTS[_overload(function)]


def gives_statistics(function: Any) -> bool:
    """Whether it moves no statistics itself: the last two of its results are what they move to."""
    return _overload(function) in _FUNCTIONAL


def index_of(node: fx.Node) -> Any:
    """Which result of an operator a node takes."""
    return node.args[1] if node.target is operator.getitem else None


def _origin(statistics: Any) -> Any:
    """Where the statistics came from that an operator without side effects has moved."""
    while isinstance(statistics, fx.Node) and index_of(statistics) in (3, 4):
        mover: Any = statistics.args[0]
        if _overload(mover.target) not in _ARGUMENTS:
            break
        names = _ARGUMENTS[_overload(mover.target)]
        statistics = mover.args[names.index("running_mean" if index_of(statistics) == 3 else "running_var")]
    return statistics


def norm_calls(graph: fx.Graph) -> Iterator[NormCall]:
    """The calls that use running statistics; without them it is weight standardisation or instance norm.

    They may be replaced one by one.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and _overload(node.target) in _ARGUMENTS:
            call = NormCall(node)
            if call.arguments["running_mean"] is not None:
                yield call


def calls_any(graph: fx.Graph) -> bool:
    """Whether any node is a call of batch_norm, with running statistics or without."""
    return any(node.op == "call_function" and _overload(node.target) in _ARGUMENTS for node in graph.nodes)


def _overload(target: Any) -> Any:
    """The operator that a packet of overloads stands for; each of these has but the one."""
    return getattr(target, "default", None) if isinstance(target, torch._ops.OpOverloadPacket) else target


def unknown_calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of operators that are batch_norm by their name, and of no kind that is known here."""
    for node in graph.nodes:
        name = operator_name(node).lower()
        known = _overload(node.target) in _ARGUMENTS or "backward" in name
        if node.op == "call_function" and "batch_norm" in name and not known:
            yield node


def operator_name(node: fx.Node) -> str:
    """What the function that a node calls is named."""
    return str(getattr(node.target, "__name__", node.target))


# The same functions as a forward may name them.
NORM_FUNCTIONS = frozenset({*_ARGUMENTS, *(getattr(op, "overloadpacket", op) for op in _ARGUMENTS)})
