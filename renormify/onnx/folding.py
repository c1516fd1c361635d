"""Folding of inference BatchNormalization on the ONNX graph, with an account of every site."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from renormify import errors
from renormify.onnx.absorption import absorb, module_path, replace_output
from renormify.onnx.constants import ConstantStore, read_constant
from renormify.onnx.files import check_destination, read_model, write_model
from renormify.onnx.leftovers import FORMS, rewrite_leftover
from renormify.onnx.patterns import Affine, Float64, Refusal

__all__ = ["Fold", "FoldSite", "fold_graph", "fold_onnx"]


@dataclass(frozen=True)
class FoldSite:
    """One BatchNormalization of the file.

    Attributes:
        name: the module's path in the torch model where the file tells it, else the node's own name; of
            several with one name, the further ones are "name:1", "name:2".
        action: "folded", "rewritten" or "kept".
        into: the operator that has taken it in, or the form it was rewritten to; None where it was kept.
        reason: why it was not folded, in words; empty where it was.
    """

    name: str
    action: Literal["folded", "rewritten", "kept"]
    into: str | None
    reason: str


@dataclass(frozen=True)
class Fold:
    """What ``fold_onnx`` returns.

    Attributes:
        model: the folded model, weights included; what was given is untouched.
        sites: one entry for each BatchNormalization, in graph order.
    """

    model: onnx.ModelProto
    sites: tuple[FoldSite, ...]

    @property
    def folded(self) -> tuple[str, ...]:
        """The names of the sites that were folded."""
        return tuple(site.name for site in self.sites if site.action == "folded")

    @property
    def batch_norm_nodes(self) -> int:
        """How many BatchNormalization nodes are left."""
        return sum(site.action == "kept" for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the sites and their count as plain data; the model is left out."""
        return {
            "batch_norm_nodes": self.batch_norm_nodes,
            "sites": [asdict(site) for site in self.sites],
        }


def fold_onnx(
    model_or_path: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    path: str | os.PathLike[str] | None = None,
    *,
    leftover: str = "auto",
) -> Fold:
    """Fold each inference BatchNormalization into the operator before it.

    Conv, ConvTranspose, Gemm and MatMul take it in, also through a constant Add between. The algebra is done
    in float64 and stored once in the weight's own type. A weight with other users is copied for this one. Any
    ONNX file will do, ours or not; what does not fold stays true and says why.

    Args:
        model_or_path: a file, a ModelProto or an onnx_ir Model; it is not changed.
        path: where to write the folded file, or None to write none.
        leftover: what becomes of a BatchNormalization that does not fold: "bn" leaves it, "affine" writes Mul
            and Add, "conv" a depthwise 1x1 Conv; "auto" writes the Conv on images (rank 4), where onnxruntime
            fuses it with the ReLU behind it, and Mul and Add elsewhere.

    Raises:
        errors.InputError: an unknown ``leftover``, or a model of another type.
        errors.CheckpointError: a file that is missing or not an ONNX model.
        errors.OutputError: the folder of ``path`` does not exist.
        errors.ExportError: onnx.checker rejects the result.
    """
    if leftover not in FORMS:
        raise errors.InputError(f"expected leftover to be one of {', '.join(FORMS)} (got {leftover!r})")
    if path is not None:
        check_destination(path)
    if isinstance(model_or_path, ir.Model):
        model = model_or_path.clone()
    elif isinstance(model_or_path, onnx.ModelProto):
        # onnx_ir reads from the message itself, and names its tensors there.
        copied = onnx.ModelProto()
        copied.CopyFrom(model_or_path)
        model = ir.from_proto(copied)
    elif isinstance(model_or_path, (str, os.PathLike)):
        model = read_model(model_or_path)
    else:
        raise errors.InputError(
            f"expected a path, an onnx.ModelProto or an onnx_ir.Model (got {type(model_or_path).__name__})"
        )
    sites = fold_graph(model, leftover=leftover)
    if path is not None:
        write_model(model, path)
    return Fold(ir.to_proto(model), sites)


def fold_graph(model: ir.Model, *, leftover: str = "auto") -> tuple[FoldSite, ...]:
    """Fold ``model`` in place and return its sites: ``fold_onnx`` for a model that is held already."""
    if any(_is_batch_norm(node) for function in model.functions.values() for node in function.all_nodes()):
        # A function cannot see the main graph's weights, and its callers may each bring their own.
        passes.InlinePass()(model)
    passes.IdentityEliminationPass()(model)
    if any(_lacks_rank(node) for node in model.graph.all_nodes()):
        passes.ShapeInferencePass()(model)
    constants = ConstantStore(model)
    seen: Counter[str] = Counter()
    sites = []
    for node in [node for node in model.graph.all_nodes() if _is_batch_norm(node)]:
        name = module_path(node) or node.name or node.outputs[0].name or "BatchNormalization"
        further = f"{name}:{seen[name]}" if seen[name] else name
        seen[name] += 1
        sites.append(_treat(node, further, constants, leftover))
    if any(site.action != "kept" for site in sites):
        passes.RemoveUnusedNodesPass()(model)
    return tuple(sites)


def _is_batch_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx")


def _lacks_rank(node: ir.Node) -> bool:
    if not _is_batch_norm(node):
        return False
    return any(value is not None and value.shape is None for value in _upstream(node.inputs[0]))


def _upstream(value: ir.Value | None) -> Iterator[ir.Value | None]:
    yield value
    if value is not None and (node := value.producer()) is not None:
        yield from node.inputs


def _treat(node: ir.Node, name: str, constants: ConstantStore, leftover: str) -> FoldSite:
    affine = _read_affine(node)
    if isinstance(affine, Refusal):
        return FoldSite(name, "kept", None, affine.reason)
    outcome = absorb(node, name, affine, constants)
    if isinstance(outcome, str):
        return FoldSite(name, "folded", outcome, "")
    if leftover == "bn":
        return FoldSite(name, "kept", None, outcome.reason)
    rewritten = rewrite_leftover(node, affine, leftover, constants)
    if isinstance(rewritten, Refusal):
        return FoldSite(name, "kept", None, f"{outcome.reason}; {rewritten.reason}")
    nodes, form = rewritten
    graph = node.graph
    assert graph is not None  # it was reached through its graph
    for new in nodes:
        new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, nodes)
    replace_output(node, nodes[-1])
    return FoldSite(name, "rewritten", form, outcome.reason)


def _read_affine(node: ir.Node) -> Affine | Refusal:
    """Return what an inference BatchNormalization computes, or why it is not one."""
    version = node.version or (node.graph.opset_imports.get("") if node.graph is not None else None) or 14
    if node.attributes.get_int("training_mode", 0):
        return Refusal("it normalises by the statistics of its batch (training_mode=1)")
    if version < 7 and not node.attributes.get_int("is_test", 0):
        return Refusal("it normalises by the statistics of its batch (is_test=0)")
    if not node.attributes.get_int("spatial", 1):
        return Refusal("it has statistics for each position, not for each channel (spatial=0)")
    if any(output.name and (output.uses() or output.is_graph_output()) for output in node.outputs[1:]):
        return Refusal("its batch statistics are used as outputs")
    arrays: list[Float64] = []
    for value, what in zip(
        node.inputs[1:5], ("its scale", "its bias", "its mean", "its variance"), strict=True
    ):
        array = read_constant(value, what)
        if isinstance(array, Refusal):
            return array
        arrays.append(array)
    gamma, beta, mean, variance = arrays
    eps = node.attributes.get_float("epsilon", 1e-5)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + eps)
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Refusal("its scale or shift is not finite in some channel")
    return Affine(scale, shift)
