"""The ``.pt2`` files of ``torch.export``: their weights, read safely, and the programs, for who trusts them.

To load a program is to run code: torch evaluates the expressions in it and may unpickle its constants. The
weights are raw bytes beside a table, and need none of that.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from renormify.errors import CheckpointError, OutputError, UnsafeCheckpointError, one_line
from renormify.formats import OUR_KEY, Contents, parse_ours
from renormify.outputs import staged
from renormify.pickles import check_archive

__all__ = ["export_again", "load_program", "read_program", "save_program"]

_TABLE = "data/weights/model_weights_config.json"


def read_program(path: Path) -> Contents:
    """Reads the weights in a program's file, under the names that they had in the model.

    Raises:
        CheckpointError: the file is damaged.
        UnsafeCheckpointError: a weight is stored as a pickle.
    """
    check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith(_TABLE)).removesuffix(_TABLE)
            table = json.loads(archive.read(root + _TABLE))["config"]
            tensors = {key: _tensor(archive, root, key, entry) for key, entry in table.items()}
            extra = f"{root}extra/{OUR_KEY}"
            ours = parse_ours(archive.read(extra).decode()) if extra in archive.namelist() else {}
    except CheckpointError as error:
        raise type(error)(f"{path} {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is a damaged or unknown kind of .pt2 file: {one_line(error)}"
        ) from error
    return Contents(tensors, ours, (path,))


def load_program(path: Path, *, trust_pickle: bool) -> ExportedProgram:
    """Loads a program, which may run code of its author's.

    Raises:
        UnsafeCheckpointError: ``trust_pickle`` is not given.
        CheckpointError: torch cannot load it.
    """
    if not trust_pickle:
        raise UnsafeCheckpointError(
            f"{path} is a program of torch.export, and loading one may run code of its author's; nothing was "
            "loaded. Give --model for its weights alone, or where you trust the file, add --trust-pickle"
        )
    check_archive(path)
    try:
        return torch.export.load(path)
    except Exception as error:
        raise CheckpointError(f"{path} could not be loaded as a program: {one_line(error)}") from error


def export_again(program: ExportedProgram, converted: nn.Module) -> ExportedProgram:
    """The program of a converted model, in evaluation mode and with the original's dynamic dimensions.

    A program holds one mode, so Batch Renorm is in it as what it is in evaluation, normalisation by running
    statistics; :func:`renormify.convert` makes a model that trains of it again.

    Raises:
        CheckpointError: the program holds no example input, or torch cannot export the model.
    """
    if program.example_inputs is None:
        raise CheckpointError("the program holds no example input, without which it cannot be exported again")
    args, kwargs = program.example_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    dynamic = [
        {axis: Dim.AUTO for axis, size in enumerate(values[name].shape) if not isinstance(size, int)} or None
        if isinstance(leaf, Tensor)
        else None
        for leaf, name in zip(leaves, program.graph_signature.user_inputs, strict=True)
    ]
    own, named = pytree.tree_unflatten(dynamic, structure)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The graph's own forward takes its inputs by position; those by name come last.
            shapes = (*own, *named.values()) if any(dynamic) else None
            return torch.export.export(converted.eval(), args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise CheckpointError(f"the converted program cannot be exported: {one_line(error)}") from error


def save_program(
    path: Path,
    program: ExportedProgram,
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
    inputs: tuple[Path, ...] = (),
) -> None:
    """Writes a program: all of it or nothing.

    Raises:
        OutputError: the path cannot be written.
    """
    with staged(path, force=force, inputs=inputs) as target:
        try:
            torch.export.save(program, target, extra_files={OUR_KEY: json.dumps(metadata, allow_nan=False)})
        except OSError:
            raise
        except Exception as error:
            raise OutputError(f"cannot write {path}: {one_line(error)}") from error


def _tensor(archive: zipfile.ZipFile, root: str, key: str, entry: Mapping[str, Any]) -> Tensor:
    from torch._export.serde.schema import ScalarType
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    if entry["use_pickle"]:
        raise UnsafeCheckpointError(f"holds {key[:80]!r} as a pickle; nothing was loaded")
    meta = entry["tensor_meta"]
    dtype = _SERIALIZE_TO_TORCH_DTYPE[ScalarType(meta["dtype"])]
    shape = [size["as_int"] for size in meta["sizes"]]
    strides = [size["as_int"] for size in meta["strides"]]
    data = archive.read(f"{root}data/weights/{entry['path_name']}")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise CheckpointError(f"holds fewer bytes for {key[:80]!r} than its shape {shape} needs")
    if not data:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.as_strided(shape, strides, meta["storage_offset"]["as_int"])
