"""The formats of checkpoints: which one a file or folder is, and how to read safetensors."""

from __future__ import annotations

import codecs
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renormify.errors import CheckpointError, one_line
from renormify.pickles import is_archive, read_torch, stand_ins
from renormify.sources import nearest

__all__ = [
    "DISTRIBUTED",
    "DTYPES",
    "INDEX",
    "OUR_KEY",
    "PROGRAM",
    "SAFETENSORS",
    "TORCH",
    "Contents",
    "Span",
    "find_spans",
    "locate",
    "parse_ours",
    "read_safetensors",
    "read_torch",
    "recognise",
    "stand_ins",
]

SAFETENSORS, TORCH, INDEX, DISTRIBUTED, PROGRAM = "safetensors", "torch", "index", "distributed", "program"
OUR_KEY = "renormify"  # under it a checkpoint says what renormify knows of it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What people's tools call the weights in a folder, in the order in which it is looked for.
_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class Span(NamedTuple):
    """Which bytes of a file are a tensor's values, in its order and dtype."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Contents:
    """What a reader found.

    Attributes:
        tensors: by their keys; where ``read`` is given, on the meta device: dtype and shape alone.
        ours: what renormify wrote of the checkpoint, or nothing; not checked.
        read: reads one tensor by its key, so that no more than one need be in memory.
        files: every file that is read.
        spans: where the values of tensors lie that a file holds as they are.
        notes: what the user should know of how it was read, a sentence each.
    """

    tensors: Mapping[str, Any]
    ours: Any
    files: tuple[Path, ...]
    read: Callable[[str], Tensor] | None = None
    spans: Mapping[str, Span] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def locate(path: Path) -> Path:
    """The checkpoint that a path means: itself, or in a folder the file that holds or lists its weights.

    A folder that ``torch.distributed.checkpoint`` wrote is a checkpoint itself.

    Raises:
        CheckpointError: it is a folder without a checkpoint in it, or with several.
    """
    try:
        if path.name == ".metadata" and path.is_file():
            return path.parent
        if not path.is_dir() or (path / ".metadata").is_file():
            return path
        for name in _IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        indexes = sorted(path.glob("*.index.json"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(indexes) == 1:
        return indexes[0]
    raise CheckpointError(
        f"{path} is a folder without {_IN_FOLDERS[1]}, an index of shards or the .metadata of "
        "torch.distributed.checkpoint; expected a checkpoint file (to convert each file in it, give -o a "
        "folder)"
    )


def recognise(path: Path) -> str:
    """Tells by its content, not by its suffix, which format a checkpoint is.

    Raises:
        CheckpointError: it is missing, not readable, or of no format that can be read.
    """
    try:
        if path.is_dir():
            return DISTRIBUTED
        if not path.exists():
            if path.is_symlink():
                raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which does not exist")
            near = nearest(path.name, _siblings(path), files=True)
            raise CheckpointError(f"no such file: {path}{near}")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; expected a checkpoint file")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; expected a checkpoint")
    if start[8:9] == b"{" and not _is_text(start[:8]):  # eight bytes of length, then a JSON header
        return SAFETENSORS
    if start.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle of protocol 2 or later
        return PROGRAM if is_archive(path) and _is_program(path) else TORCH
    if start.lstrip()[:1] == b"{" and path.suffix == ".json":
        return INDEX
    raise CheckpointError(f"{path} is {_guess(start)}; expected safetensors or a file that torch.save wrote")


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("models/model.json") for name in archive.namelist())
    except Exception:  # a damaged archive; its reader says so
        return False


def _guess(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file itself (run: git lfs pull)"
    if start.lstrip()[:1] == b"<":
        return "a web page, perhaps a failed download"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes it"
    return "a text file" if _is_text(start) else "not a checkpoint"


def _is_text(start: bytes) -> bool:
    try:
        # A decoder that expects more, since the last character may be cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\n\r\f" for character in text)


def _siblings(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Reads the tensors, mapped into memory, and what stands under our own key in the header.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise CheckpointError(
            f"{path} is a damaged or truncated safetensors file: {one_line(error)}"
        ) from error
    return tensors, parse_ours(metadata.get(OUR_KEY, "{}"))


def find_spans(path: Path) -> dict[str, Span]:
    """Where the values lie in a safetensors file that was found sound."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            key: Span(
                path,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for key, entry in header.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is a damaged or truncated safetensors file: {one_line(error)}"
        ) from error


def parse_ours(text: str) -> Any:
    """What renormify wrote of a checkpoint; nothing where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}
