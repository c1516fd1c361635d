"""Exported programs: what ``torch.export`` recorded in one mode, given both again.

A program holds ATen operators, each with the mode of the export as a literal. The norms are served by the
pass of :mod:`renormify.rewriting`, as in any graph; here are the other operators that know the mode.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import chain, count
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from renormify.calls import norm_calls
from renormify.graphs import problem_of

__all__ = ["is_program_module", "make_trainable"]

_aten = torch.ops.aten
_FEATURES = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
_DROPOUTS: dict[Any, type[nn.Module]] = {
    _aten.dropout.default: nn.Dropout,
    _aten.native_dropout.default: nn.Dropout,
    _aten.feature_dropout.default: nn.Dropout2d,
    _aten.alpha_dropout.default: nn.AlphaDropout,
    _aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}
_INPLACE: dict[Any, Any] = {
    _aten.dropout_.default: _aten.dropout.default,
    _aten.feature_dropout_.default: _aten.feature_dropout.default,
    _aten.alpha_dropout_.default: _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout_.default: _aten.feature_alpha_dropout.default,
}
_RANDOM = ("bernoulli", "rand", "native_dropout", "rrelu", "exponential", "normal")


def is_program_module(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether a module is what ``ExportedProgram.module()`` gives, whose train() and eval() refuse."""
    return isinstance(module, fx.GraphModule) and {"train", "eval"} <= vars(module).keys()


def make_trainable(module: fx.GraphModule) -> tuple[str, ...]:
    """Gives the module of a program its train() and eval(), in place, and dropout that follows them.

    Returns:
        What does not follow the mode, a sentence each.
    """
    for name in ("train", "eval"):
        del vars(module)[name]
    module.train(module.training)  # one mode for all its modules
    graphs = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    for part in graphs:  # a block under no_grad has a graph of its own
        for node in list(part.graph.nodes):
            if node.op == "call_function":
                _restore_dropout(part, node)
        part.recompile()
    return tuple(dict.fromkeys(chain.from_iterable(map(_what_is_lost, graphs))))


def _restore_dropout(module: fx.GraphModule, node: fx.Node) -> None:
    kind = _DROPOUTS.get(_INPLACE.get(node.target, node.target))
    outputs = [user for user in node.users if user.target is operator.getitem]
    if kind is None or any(output.args[1] != 0 for output in outputs):
        return
    value = getattr(node.args[0], "meta", {}).get("val")
    if kind is nn.Dropout2d:
        kind = _FEATURES.get(value.dim() if isinstance(value, Tensor) else 4, nn.Dropout2d)
    dropout: nn.Module = kind(node.args[1], inplace=node.target in _INPLACE)
    name = next(name for name in map("dropout_{}".format, count()) if not hasattr(module, name))
    module.add_submodule(name, dropout.train(module.training))
    with module.graph.inserting_before(node):
        replacement = module.graph.call_module(name, (node.args[0],))
    replacement.meta = dict((outputs or [node])[0].meta)
    for replaced in outputs or [node]:
        replaced.replace_all_uses_with(replacement)
        module.graph.erase_node(replaced)
    if outputs:
        module.graph.erase_node(node)


def _what_is_lost(module: fx.GraphModule) -> Iterator[str]:
    graph = module.graph
    served = [call for call in norm_calls(graph) if problem_of(call) is None]
    if any(call.arguments["running_mean"].op == "placeholder" for call in served):
        yield "norms in a block of the program (no_grad, cond) bear its name, and count batches as recorded"
    operators = [node.target for node in graph.nodes if node.op == "call_function"]
    names = sorted({str(target).removeprefix("aten.").partition(".")[0] for target in operators})
    random = [name for name in names if name.rstrip("_").startswith(_RANDOM)]
    if random:
        yield f"{', '.join(random)}: recorded as random, and stays so in evaluation"
    if "_native_batch_norm_legit_no_training" in names:
        yield "the program is decomposed: dropout that was exported in evaluation is not in it any more"
