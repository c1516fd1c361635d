"""Folding of inference affines on the ONNX graph, with an account of every site."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from renormify import errors
from renormify.onnx.constants import ConstantStore, Refusal, is_constant, is_standard
from renormify.onnx.files import check_destination, read_model, write_model
from renormify.onnx.leftovers import FORMS, MERGED, rewrite_leftover
from renormify.onnx.routes import plan_backward, plan_forward
from renormify.onnx.runs import Run, find_run, is_batch_norm
from renormify.onnx.surgery import Applied, apply, drop_identities, module_path, replace_run

__all__ = ["Fold", "FoldSite", "fold_graph", "fold_onnx"]

# Before it, Mul and Add broadcast by attributes of their own.
LOWEST_OPSET = 7
IR_OF_FREE_INITIALIZERS = 4
_WORTH_INLINING = ("BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class FoldSite:
    """One affine of the file: a BatchNormalization, or a chain of constant Mul, Div, Add, Sub by channel.

    Attributes:
        name: the module's path in the torch model where the file tells it, else the node's own name; of
            several with one name, the further ones are "name:1", "name:2".
        action: "folded", "rewritten" or "kept".
        into: the operators that have taken it in, or the form it was rewritten to; None where it was kept.
        reason: why it was not folded, in words; empty where it was.
        kind: "BatchNormalization" or "chain".
        copied: bytes by which its fold makes the file larger, for weights that others still use as they were.
        rounding: for float16 and bfloat16, the largest error of the weights it was folded into or rewritten
            to, relative to the largest weight of their row; None for float32 and float64.
    """

    name: str
    action: Literal["folded", "rewritten", "kept"]
    into: str | None
    reason: str
    kind: Literal["BatchNormalization", "chain"] = "BatchNormalization"
    copied: int = 0
    rounding: float | None = None


@dataclass(frozen=True)
class Fold:
    """What ``fold_onnx`` returns.

    Attributes:
        model: the folded model, weights included; what was given is untouched.
        sites: one entry for each BatchNormalization and each chain, in graph order.
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
        kept = sum(site.action == "kept" and site.kind == "BatchNormalization" for site in self.sites)
        # Of several norms that became one, the first is kept; arithmetic that became one is one more.
        return kept + sum(site.into == MERGED and site.kind == "chain" for site in self.sites)

    @property
    def copied(self) -> int:
        """By how many bytes the file grows, for weights that were shared and are not any more."""
        return sum(site.copied for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the sites and their count as plain data; the model is left out."""
        return {
            "batch_norm_nodes": self.batch_norm_nodes,
            "copied": self.copied,
            "sites": [asdict(site) for site in self.sites],
        }


def fold_onnx(
    model_or_path: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    path: str | os.PathLike[str] | None = None,
    *,
    leftover: str = "auto",
) -> Fold:
    """Fold each inference BatchNormalization, and each affine like it, into its neighbours.

    Conv, ConvTranspose, Gemm and MatMul take it in, those before it and those behind it, also through
    operators that commute with it: shapes, pooling, Concat. The algebra is done in float64 and stored once in
    the weight's own type. A weight with other users is copied for this one. Any ONNX file will do, ours or
    not; what does not fold stays true and says why.

    Args:
        model_or_path: a file, a ModelProto or an onnx_ir Model; it is not changed.
        path: where to write the folded file, or None to write none.
        leftover: what becomes of an affine that does not fold: "bn" leaves it, "affine" writes Mul and Add,
            "conv" a depthwise 1x1 Conv; "auto" writes what onnxruntime runs fastest: the Conv on images (rank
            4), where it fuses with the ReLU behind it, one BatchNormalization elsewhere.

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


def fold_graph(model: ir.Model, *, leftover: str = "auto", most: int | None = None) -> tuple[FoldSite, ...]:
    """Fold ``model`` in place and return its sites: ``fold_onnx`` for a model that is held already.

    Args:
        model: the model.
        leftover: as in ``fold_onnx``.
        most: after how many sites to leave off, or None for all of them.
    """
    # A function cannot see the main graph's weights, and its callers may each bring their own. One that has
    # nothing to fold stays: a runtime may know it by its name.
    passes.InlinePass(lambda function: _may_fold(function) and _of_one_opset(function, model))(model)
    drop_identities(model)
    if any(output.shape is None for node in model.graph.all_nodes() for output in node.outputs):
        passes.ShapeInferencePass()(model)
    folder = _Folder(model, leftover)
    for node in list(model.graph.all_nodes()):
        if most is not None and folder.count >= most:
            break
        if node.graph is not None:  # an earlier one may have taken it along
            folder.visit(node)
    for function in model.functions.values():
        folder.leave(function)
    sites = folder.finish()
    if folder.constants.used or any(site.action != "kept" for site in sites):
        passes.RemoveUnusedNodesPass()(model)
        # Before it, each initializer had to be an input as well; the new ones are not.
        model.ir_version = max(model.ir_version, IR_OF_FREE_INITIALIZERS)
    return sites


def _may_fold(function: ir.Function) -> bool:
    return any(is_standard(node) and node.op_type in _WORTH_INLINING for node in function.all_nodes())


def _of_one_opset(function: ir.Function, model: ir.Model) -> bool:
    known = model.opset_imports
    return all(known.get(domain, version) == version for domain, version in function.opset_imports.items())


@dataclass(frozen=True)
class _Rest:
    """A run that did not fold: its first node, where its sites are in the account, and why."""

    first: ir.Node
    places: tuple[int, ...]
    reason: str


class _Folder:
    """One folding of one model: the account so far, and what is left to be rewritten at the end."""

    def __init__(self, model: ir.Model, leftover: str) -> None:
        self.constants = ConstantStore(model)
        self._opset = model.graph.opset_imports.get("", 0)
        self._leftover = leftover
        self._seen: Counter[str] = Counter()
        self._visited: set[ir.Node] = set()
        self._sites: list[FoldSite] = []
        self._rests: list[_Rest] = []

    @property
    def count(self) -> int:
        """How many sites have been met so far."""
        return len(self._sites)

    def visit(self, node: ir.Node) -> None:
        """Fold the run that begins with ``node``, if there is one, and account for it."""
        if node in self._visited:
            return
        run = find_run(node)
        if self._opset < LOWEST_OPSET:
            run = Refusal(f"opset {self._opset} is older than {LOWEST_OPSET}")
        if isinstance(run, Refusal):
            if is_batch_norm(node):
                self._sites.append(FoldSite(self._name(node), "kept", None, run.reason))
            return
        self._visited.update(run.nodes)
        if not run.is_site:
            return
        kind: Literal["BatchNormalization", "chain"] = "BatchNormalization" if run.norms else "chain"
        names = [self._name(part) for part in run.norms or run.nodes[:1]]
        outcome = _fold(run, names, self.constants)
        if isinstance(outcome, Refusal):
            start = len(self._sites)
            self._sites += [FoldSite(name, "kept", None, outcome.reason, kind) for name in names]
            self._rests.append(_Rest(run.nodes[0], tuple(range(start, len(self._sites))), outcome.reason))
            return
        for index, name in enumerate(names):
            copied = 0 if index else outcome.copied
            self._sites.append(FoldSite(name, "folded", outcome.into, "", kind, copied, outcome.rounding))

    def leave(self, function: ir.Function) -> None:
        """Account for the norms of a function that could not be opened."""
        for node in function.all_nodes():
            if is_batch_norm(node):
                reason = f"the function {function.name} is of another opset than the graph"
                self._sites.append(FoldSite(self._name(node), "kept", None, reason))

    def finish(self) -> tuple[FoldSite, ...]:
        """Write what did not fold in the form that was asked for; return the account."""
        for rest in self._rests:
            run = find_run(rest.first)  # read again: another site may have gone into it
            if isinstance(run, Refusal):  # and made a map of biases of it
                continue
            written = rewrite_leftover(run, self._leftover, self.constants)
            if not isinstance(written, Refusal):
                replace_run(run, written.nodes)
            for place in rest.places:
                site = self._sites[place]
                if isinstance(written, Refusal):
                    reason = "; ".join(filter(None, (rest.reason, written.reason)))
                    self._sites[place] = FoldSite(site.name, "kept", None, reason, site.kind)
                    continue
                stays = written.form == MERGED and site.kind != "chain" and place == rest.places[0]
                self._sites[place] = FoldSite(
                    site.name,
                    "kept" if stays else "rewritten",
                    None if stays else written.form,
                    rest.reason,
                    site.kind,
                    rounding=written.rounding,
                )
        return tuple(self._sites)

    def _name(self, node: ir.Node) -> str:
        name = module_path(node) or node.name or node.outputs[0].name or node.op_type
        self._seen[name] += 1
        return f"{name}:{self._seen[name] - 1}" if self._seen[name] > 1 else name


def _fold(run: Run, names: list[str], constants: ConstantStore) -> Applied | Refusal:
    """Place a run in what comes before it, else in what comes behind it."""
    if not run.norms and _ends_a_normalisation(run):
        return Refusal(
            "it ends a normalisation over the input's own statistics, which runtimes fuse as a whole"
        )
    graph = run.nodes[0].graph
    assert graph is not None  # it was reached through its graph
    edits = plan_backward(run.x, run.affine, graph)
    before = edits if isinstance(edits, Refusal) else apply(edits, run, names, constants)
    if not isinstance(before, Refusal):
        return before
    edits = plan_forward(run.nodes[-1].outputs[0], run.affine, graph)
    behind = edits if isinstance(edits, Refusal) else apply(edits, run, names, constants)
    if not isinstance(behind, Refusal):
        return behind
    return Refusal(f"before it, {before.reason}; behind it, {behind.reason}")


def _ends_a_normalisation(run: Run) -> bool:
    """Tell whether what is scaled was divided by something computed: the end of a LayerNorm, written out."""
    producer = run.x.producer()
    if producer is None or producer.op_type not in ("Div", "Mul"):
        return False
    return not any(value is None or is_constant(value) for value in producer.inputs)
