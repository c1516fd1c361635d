"""What torch's exporter leaves behind, cleared away with onnxscript's own passes.

These are the passes of ``torch.onnx.export(optimize=True)`` but for the rules that fold BatchNormalization:
those fold in float32, and fold a training_mode=1 node as though it were in inference. What adds 0 or
multiplies by 1 goes by rules of our own, since onnxscript's take 1e-9 for a 0 as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from renormify.onnx.surgery import NAME_SCOPES, drop_identities

__all__ = ["clean"]


def _exactly(neutral: float) -> Callable[..., bool]:
    """Whether a constant is this very number, and so shaped that it cannot broadcast the other operand."""

    def check(_: Any, x: ir.Value, constant: ir.Value) -> bool:
        tensor = constant.const_value
        if tensor is None or tensor.size != 1 or (len(tensor.shape) and x.shape is None):
            return False
        rank = len(x.shape) if x.shape is not None else 0
        return len(tensor.shape) <= rank and float(tensor.numpy().item()) == neutral

    return check


def _dropped(pattern: Callable[..., Any], neutral: float) -> RewriteRule:
    return RewriteRule(pattern, lambda op, x, **_: op.Identity(x), _exactly(neutral))


_NEUTRAL = RewriteRuleSet(
    [
        _dropped(lambda op, x, constant: op.Add(x, constant), 0),
        _dropped(lambda op, x, constant: op.Mul(x, constant), 1),
        _dropped(lambda op, x, constant: op.Sub(x, constant), 0),
        _dropped(lambda op, x, constant: op.Div(x, constant), 1),
    ],
    commute=True,
)
_RULES = (
    *_NEUTRAL.rules,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


def clean(model: ir.Model) -> None:
    """Fold constants and drop what computes nothing, in place; BatchNormalization stays as it is."""
    passes.InlinePass()(model)
    for _ in range(2):  # a rule may leave constants to fold, as onnxscript's own optimizer knows
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewriter.rewrite(model, pattern_rewrite_rules=_RULES)
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    )(model)
    drop_identities(model)
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    _strip_metadata(model)


def _strip_metadata(model: ir.Model) -> None:
    """Keep the module paths alone of the exporter's notes: the rest names files on the user's disk."""
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            scopes = node.metadata_props.get(NAME_SCOPES)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[NAME_SCOPES] = scopes
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        graph.metadata_props.clear()
    model.metadata_props.clear()
