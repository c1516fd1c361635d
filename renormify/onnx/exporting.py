"""From a torch model to an ONNX file: torch's own exporter, a clean graph, the inference affine folded."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import OutputFixPass
from torch.utils import _pytree as pytree

from renormify import errors
from renormify.modes import evaluating
from renormify.onnx.cleaning import clean
from renormify.onnx.examples import (
    as_arguments,
    batch_size,
    has_batch,
    leaf_names,
    map_tensors,
    tensors_of,
    unwrapped,
)
from renormify.onnx.files import check_destination, write_model
from renormify.onnx.folding import Fold, fold_graph
from renormify.onnx.opsets import LOWEST_OPSET, lower, newest_opset
from renormify.onnx.reordering import reorder

__all__ = ["Export", "export_onnx"]

# The opsets that torch's exporter writes by itself; from there the finished model is converted. Asked for a
# newer one, it may leave newer operators in a model that says it is of opset 18.
EXPORTED_OPSETS = (18, 23)
BATCH = "batch"
_FIXED_BATCH = (
    "; in Python, export_onnx(..., dynamic_batch=False) exports it for the example's batch size alone"
)


@dataclass(frozen=True)
class Export:
    """What ``export_onnx`` returns.

    Attributes:
        path: the file.
        opset: the opset the file is in.
        fold: what became of each BatchNormalization, or None for ``fold=False``.
    """

    path: Path
    opset: int
    fold: Fold | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "path": str(self.path),
            "opset": self.opset,
            "fold": None if self.fold is None else self.fold.to_dict(),
        }


def export_onnx(
    model: torch.nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    fold: bool = True,
    opset_version: int | None = None,
) -> Export:
    """Export a model to ONNX as it evaluates, its BatchNorm and Batch Renorm folded into what comes before.

    The model is exported in evaluation mode; each submodule's own training flag comes back afterwards. A file
    of that name is replaced, and only by a whole one.

    Args:
        model: the model; of a DataParallel or compiled one, the module inside is exported.
        args: an example input: a tensor, or the tuple of forward's positional arguments, which may hold
            tensors in dicts and lists. The first dimension of the first tensor is the batch; of the other
            tensors, those whose first dimension has the same size have a batch too, and all others are taken
            as they are. So choose a batch whose size no other first dimension has by chance, a table's say.
            Otherwise one row serves as well as any.
        path: the file to write.
        dynamic_batch: whether the file takes every batch size, or only the example's.
        fold: whether to fold BatchNormalization into its neighbours (see ``fold_onnx``), and to write what
            computes the same in another order that costs less: average pooling before a pointwise Conv,
            Relu before max pooling, one Concat for a Concat of Concats.
        opset_version: the ONNX opset, from 13 to the newest that the installed onnx knows, or None for the
            one that torch's exporter prefers. Below 18 the file gets the IR version of that opset's time too.

    Raises:
        errors.InputError: ``model`` is no module, ``args`` hold no tensor, or there is no such opset.
        errors.OutputError: the folder of ``path`` does not exist.
        errors.ExportError: torch cannot export the model, or not with a dynamic batch, or not in that opset.
    """
    if not isinstance(model, torch.nn.Module):
        raise errors.InputError(f"expected a torch.nn.Module to export (got {type(model).__name__})")
    if opset_version is not None and not LOWEST_OPSET <= opset_version <= newest_opset():
        raise errors.InputError(
            f"expected an opset from {LOWEST_OPSET} to {newest_opset()}, the newest that the installed onnx "
            f"knows (got {opset_version})"
        )
    model = unwrapped(model)
    arguments = as_arguments(args)
    destination = check_destination(path)
    with evaluating(model):
        exported = _export(model, arguments, dynamic_batch=dynamic_batch, opset_version=opset_version)
    names = [value.name for value in exported.graph.outputs]
    clean(exported)
    sites = fold_graph(exported) if fold else None
    if fold:
        reorder(exported)
    OutputFixPass()(exported)
    _restore_names(exported, names)
    exported = _in_opset(exported, opset_version)
    write_model(exported, destination)
    return Export(
        destination,
        exported.opset_imports[""],
        None if sites is None else Fold(ir.to_proto(exported), sites),
    )


def _export(
    model: torch.nn.Module, arguments: tuple[Any, ...], *, dynamic_batch: bool, opset_version: int | None
) -> ir.Model:
    """Run torch's exporter without its optimizer, quietly, and name what it left unnamed."""
    size = batch_size(arguments) if dynamic_batch else None
    lowest, highest = EXPORTED_OPSETS
    opset = None if opset_version is None else min(max(opset_version, lowest), highest)
    shapes, given = None, arguments
    if size is not None:
        dynamic = torch.export.Dim.DYNAMIC
        shapes = map_tensors(lambda tensor: {0: dynamic} if has_batch(tensor, size) else None, arguments)
        # torch.export takes a size of 1 for a constant, and broadcasts along it.
        if size == 1:
            arguments = map_tensors(
                lambda tensor: torch.cat([tensor, tensor]) if has_batch(tensor, 1) else tensor, arguments
            )
    try:
        program = _run_exporter(model, arguments, shapes, opset)
    except Exception as error:  # whatever the user's forward and three layers of exporter may raise
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps it in pages of advice
            cause = cause.__cause__
        advice = _FIXED_BATCH if shapes is not None and _exports(model, given, opset) else ""
        raise errors.ExportError(
            f"torch.onnx.export cannot export {type(model).__name__}: {errors.one_line(cause)}{advice}"
        ) from error
    exported: ir.Model = program.model
    if size is not None:
        batched = [has_batch(tensor, batch_size(arguments)) for tensor in tensors_of(arguments)]
        _name_batch(exported, batched, type(model).__name__)
    if program.exported_program is not None:
        _name_outputs(exported, program.exported_program)
    return exported


def _run_exporter(
    model: torch.nn.Module, arguments: tuple[Any, ...], shapes: Any, opset: int | None
) -> torch.onnx.ONNXProgram:
    with _quiet():
        program = torch.onnx.export(
            model,
            # A last argument that is a dict would be taken for keyword arguments, but for the empty one.
            (*arguments, {}),
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=shapes,
            opset_version=opset,
        )
    assert program is not None  # dynamo=True always returns one
    return program


def _exports(model: torch.nn.Module, arguments: tuple[Any, ...], opset: int | None) -> bool:
    """Tell whether the exporter takes the model with the example's own batch size."""
    try:
        _run_exporter(model, arguments, None, opset)
    except Exception:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter logs, prints and warns of for the time of the export.

    torch logs pages about a model that it cannot export; what matters of them is in the exception.
    """
    roots = ("torch", "onnxscript", "onnx_ir")
    for root in roots:
        logging.getLogger(root)
    # torch's loggers have levels of their own, and handlers that hold the stderr they were made with.
    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in roots and not logger.disabled
    ]
    levels = {logger: logger.level for logger in loggers if logger.name in roots}
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        # pytree and torch.export warn about their own internals, and each release about others.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", module=r"(torch|onnxscript|onnx_ir|onnx|copyreg)(\.|$)")
        try:
            for logger in loggers:
                logger.disabled = True
            for logger in levels:
                logger.setLevel(logging.CRITICAL)  # for those that the export itself makes
            yield
        finally:
            for logger in loggers:
                logger.disabled = False
            for logger, level in levels.items():
                logger.setLevel(level)


def _name_batch(model: ir.Model, batched: list[bool], name: str) -> None:
    """Call the batch "batch" throughout; an input that lost it means that the model baked its batch in."""
    if len(batched) != len(model.graph.inputs):
        return  # an argument that forward does not use is left out: which one, the graph does not say
    symbols = set()
    for value, has in zip(model.graph.inputs, batched, strict=True):
        if not has:
            continue
        dimension = None if value.shape is None else value.shape[0]
        if isinstance(dimension, int):
            raise errors.ExportError(
                f"{name} works only at batch size {dimension} (input {value.name!r}): make its forward take "
                f"the batch from the input's shape{_FIXED_BATCH}"
            )
        symbols.add(str(dimension))
    if len(symbols) != 1:
        return  # two batches that need not agree keep two names
    (symbol,) = symbols
    for graph in model.graphs():
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and not value.shape.frozen:
                for axis, dimension in enumerate(value.shape):
                    if str(dimension) == symbol:
                        value.shape[axis] = BATCH


def _name_outputs(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Give the outputs the names that the model's own structure has for them, not "getitem_3"."""
    kinds = program.graph_signature.output_specs
    tensors = [
        index
        for index, spec in enumerate(kinds)
        if isinstance(spec.arg, torch.export.graph_signature.TensorArgument)
    ]
    spec = program.call_spec.out_spec
    if spec is None or len(tensors) != len(model.graph.outputs) or spec.num_leaves != len(kinds):
        return
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    found = leaf_names(tree)
    taken = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    names = []
    for index in tensors:
        name = found[index]
        names.append(name if name and not name[0].isdigit() else "_".join(filter(None, ("output", name))))
    if len(set(names)) != len(names) or taken & set(names):
        return
    outputs = dict.fromkeys(model.graph.outputs)
    if len(outputs) != len(names):
        return  # one value returned twice has one name
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if value.name in names and value not in outputs:
                    value.name = f"{value.name}_inner"
    for value, name in zip(outputs, names, strict=True):
        if value.producer() is not None:
            value.name = name


def _restore_names(model: ir.Model, names: list[str | None]) -> None:
    """Give the outputs their names again: of two that turned out to be the same, one had got another."""
    used = {value.name for node in model.graph for value in node.outputs}
    for value, name in zip(model.graph.outputs, names, strict=True):
        if value.producer() is not None and name not in used:
            used ^= {value.name, name}
            value.name = name


def _in_opset(model: ir.Model, opset_version: int | None) -> ir.Model:
    """Return ``model`` in the opset asked for.

    Raises:
        errors.ExportError: that opset has no form for one of the operators.
    """
    written = model.opset_imports[""]
    if opset_version is None or written == opset_version:
        return model
    if opset_version < written:
        lowered = lower(model, opset_version)
        if isinstance(lowered, ir.Model):
            return lowered
        reason = lowered.reason
    else:
        try:
            return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), opset_version))
        except Exception as error:  # the converter raises RuntimeError and its own ConvertError
            # It puts a line of its C++ in front.
            reason = errors.one_line(str(error).rpartition("` failed: ")[2]) or type(error).__name__
    raise errors.ExportError(
        f"the model cannot be written in opset {opset_version}: {reason}; opset_version={written} needs no "
        "conversion"
    )
