"""Which value of an ONNX file is the output of which torch module, and how they hang together.

torch's exporter writes into each node the modules that it came from. The one value by which a module is left
is its output. Of a module that is called again, the first call bears its path, the next "path:1", "path:2".
Folding moves values: behind a Conv that a norm was folded into stands the norm's output, and between a norm
and the layer behind it that took it up nothing is comparable. What is not certain is left out.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

__all__ = ["Layer", "calls_of", "frontier", "label", "layers_of"]

_SCOPES, _FOLDED = "pkg.torch.onnx.name_scopes", "renormify.folded_from"
_END = 2**62


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward.

    Attributes:
        path: of the module.
        order: when it ended, among all calls.
        source: the call whose output it was given untouched as its first argument, or "".
        affine: whether the module, having none inside it, has parameters or buffers and no weight of a rank
            above 1, as a norm: without a node of its own in the file it was folded.
    """

    path: str
    order: int
    source: str
    affine: bool


@dataclass(frozen=True)
class Layer:
    """A module and the value in the file that is its output.

    Attributes:
        name: the module's path, and which of its calls.
        value: the name of the value.
        merged: modules that are one with it in the file.
        reach: the indices of the layers that are first met on the ways from here; very large for an output.
    """

    name: str
    value: str
    merged: tuple[str, ...]
    reach: frozenset[int]


def label(path: str, number: int) -> str:
    """Return the name of a call of a module, the first of which is number 0."""
    return f"{path}:{number}" if number else path


def calls_of(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Call]:
    """Run the model and return, by label, the calls of modules that return one tensor."""
    calls: dict[str, list[Call | None]] = {}
    ended = 0

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            nonlocal ended
            ended += 1
            first = given[0] if given and isinstance(given[0], Tensor) else None
            source, version = getattr(first, "_renormify_source", ("", -1))
            if first is None or version != first._version:  # an operation in place came between
                source = ""
            ranks = [tensor.ndim for tensor in (*module.parameters(), *module.buffers())]
            affine = not any(module.children()) and max(ranks, default=2) < 2
            plain = isinstance(output, Tensor)
            found = calls.setdefault(name, [])
            if plain:
                output._renormify_source = (label(name, len(found)), output._version)
            found.append(Call(name, ended, source, affine) if plain else None)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return {
        label(name, number): call
        for name, found in calls.items()
        for number, call in enumerate(found)
        if call is not None and None not in found
    }


def layers_of(graph: ir.Graph, calls: dict[str, Call]) -> list[Layer]:
    """Return the layers that can be compared, in the file's order; where the file names none, there is none.

    Args:
        graph: the file's.
        calls: of the modules, from ``calls_of``.
    """
    scopes = {node: _scopes(node) for node in graph}
    number_of_calls = Counter(call.path for call in calls.values())
    values: dict[str, ir.Value] = {}
    labels: dict[tuple[str, ir.Node], str] = {}
    for name in dict.fromkeys(scope for path in scopes.values() for scope in path):
        nodes = [node for node, path in scopes.items() if name in path]
        for number, part in enumerate(_parts(nodes, number_of_calls[name])):
            labels |= {(name, node): label(name, number) for node in part}
            exits = _exits(graph, part)
            if len(exits) == 1:
                values[label(name, number)] = exits[0]
    merged: dict[str, tuple[str, ...]] = {}
    for node, path in scopes.items():
        host = labels.get((path[-1], node), "") if path else ""
        for name in sorted(_folded(node), key=lambda folded: calls[folded].order if folded in calls else 0):
            _move(host, name, calls, values, merged)
    seen = {scope for path in scopes.values() for scope in path}
    folded = {name for node in graph for name in _folded(node)}
    for name, call in calls.items():  # another tool folded it and does not say so
        if not call.affine or name in folded:
            continue
        if call.path not in seen:
            _move(call.source, name, calls, values, merged)
        elif name not in values:  # in one call or another
            values.pop(call.source, None)
    return _connected(graph, values, merged)


def frontier(layers: Sequence[Layer], last: int) -> list[int]:
    """Return those of the layers up to ``last`` that something behind it is made from."""
    return [index for index in range(last + 1) if max(layers[index].reach, default=-1) > last]


def _scopes(node: ir.Node) -> list[str]:
    try:
        *scopes, _ = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    except (ValueError, SyntaxError, TypeError):
        return []
    return [str(scope) for scope in scopes if scope]


def _folded(node: ir.Node) -> list[str]:
    try:
        return [str(name) for name in json.loads(node.metadata_props.get(_FOLDED, "[]"))]
    except ValueError:
        return []


def _parts(nodes: list[ir.Node], number: int) -> list[list[ir.Node]]:
    """Return the nodes of each call of a module, or none where that is not certain.

    Calls follow each other in the file, and one is made of the same operators as the next.
    """
    if number == 0 or len(nodes) % number:
        return []
    size = len(nodes) // number
    parts = [nodes[start : start + size] for start in range(0, len(nodes), size)] if size else []
    kinds = {tuple(node.op_type for node in part) for part in parts}
    return parts if len(kinds) == 1 else []


def _exits(graph: ir.Graph, nodes: list[ir.Node]) -> list[ir.Value]:
    """Return the values that these nodes make and others use."""
    inside = set(nodes)
    return [
        value
        for node in nodes
        for value in node.outputs
        if value in graph.outputs or any(user not in inside for user in value.consumers())
    ]


def _move(
    host: str,
    folded: str,
    calls: dict[str, Call],
    values: dict[str, ir.Value],
    merged: dict[str, tuple[str, ...]],
) -> None:
    """Account for a module that was folded into ``host``: the host's value may now be its output."""
    # A host that took up several norms stands by now for the last of them.
    host = next((name for name, others in merged.items() if host in others and name in values), host)
    into, taken = calls.get(host), calls.get(folded)
    if into is not None and taken is not None and taken.source == host:
        value = values.pop(host, None)
        if value is not None:
            values[folded] = value
            merged[folded] = (*merged.pop(host, ()), host)
        return
    # Folded over some distance: in between the file has other values than the model.
    orders = [call.order if call is not None else None for call in (into, taken)]
    low = min((order for order in orders if order is not None), default=0) if None not in orders else 0
    high = max((order for order in orders if order is not None), default=_END) if None not in orders else _END
    forward = into is not None and taken is not None and taken.order < into.order
    for name in [*values]:
        if low <= calls[name].order <= high and not (forward and name == host):
            del values[name]


def _connected(
    graph: ir.Graph, values: dict[str, ir.Value], merged: dict[str, tuple[str, ...]]
) -> list[Layer]:
    """Put the layers into the file's order and tell what each leads to."""
    names: dict[ir.Value, str] = {}
    for name, value in values.items():  # of several modules with one output, the innermost
        if value not in names or len(name) > len(names[value]):
            names[value] = name
    order = [value for node in graph for value in node.outputs if value in names]
    index = {value: position for position, value in enumerate(order)}
    reach: dict[ir.Value, frozenset[int]] = {}
    for node in reversed(list(graph)):
        for value in node.outputs:
            met: set[int] = {_END} if value in graph.outputs else set()
            for user in value.consumers():
                if user.graph is not graph:  # in a branch or a loop: what that makes is not followed
                    met.add(_END)
                    continue
                for output in user.outputs:
                    met |= {index[output]} if output in index else reach.get(output, frozenset())
            reach[value] = frozenset(met)
    return [
        Layer(names[value], value.name, merged.get(names[value], ()), reach[value])
        for value in order
        if value.name
    ]
