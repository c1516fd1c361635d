"""Reading and writing ONNX files: one clear error on the way in, all or nothing on the way out."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from renormify import errors
from renormify.outputs import check_output, staged

__all__ = ["check_destination", "external_files", "read_model", "write_model"]

# A protobuf message ends at 2 GiB; the graph itself needs some of that.
LARGEST_MESSAGE = 2**31 - 2**26


def read_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file, its external data included, into memory.

    Raises:
        errors.CheckpointError: the file is missing, or is not an ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise errors.CheckpointError(f"no ONNX file at {path}: check the path")
    try:
        model = ir.load(path, format="protobuf")
        ir.external_data.load_to_model(model)
        is_model = bool(model.opset_imports)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise types of their own on a damaged file
        raise errors.CheckpointError(
            f"{path} cannot be read as an ONNX model: {errors.one_line(error)}"
        ) from error
    if not is_model:
        raise errors.CheckpointError(f"{path} is not an ONNX model: it names no opset")
    return model


def external_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the files beside an ONNX file that hold its weights.

    Raises:
        errors.CheckpointError: the file is not an ONNX model.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, whose module differs between its implementations
        raise errors.CheckpointError(
            f"{path} cannot be read as an ONNX model: {errors.one_line(error)}"
        ) from error
    held = (
        tensor.const_value
        for graph in ir.from_proto(model).graphs()
        for tensor in graph.initializers.values()
    )
    places = {str(tensor.location) for tensor in held if isinstance(tensor, ir.ExternalTensor)}
    return tuple(Path(path).parent / place for place in sorted(places))


def check_destination(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a Path if a file can be written there, before any work is done.

    Raises:
        errors.OutputError: its folder does not exist, or it is a folder itself.
    """
    return check_output(Path(path), force=True)


def write_model(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Check the model with onnx.checker and write it, whole or not at all; a file of that name is replaced.

    Weights of about 2 GB and more go into ``<name>.data`` beside the file.

    Raises:
        errors.OutputError: the folder does not exist or cannot be written to.
        errors.ExportError: onnx.checker rejects the model.
    """
    path = Path(path)
    weights = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    with staged(path, force=True) as place:
        ir.save(
            model,
            place,
            format="protobuf",
            external_data=f"{path.name}.data" if size > LARGEST_MESSAGE else None,
        )
        try:
            onnx.checker.check_model(str(place))
        except onnx.checker.ValidationError as error:
            raise errors.ExportError(
                f"onnx.checker rejects what {path} would be: {errors.one_line(error)}"
            ) from error
