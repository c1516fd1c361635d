"""The formats of checkpoint files: which one a file is, and how to read it without running what is in it."""

from __future__ import annotations

import codecs
import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renormify.errors import CheckpointError, UnsafeCheckpointError, one_line
from renormify.sources import nearest

__all__ = ["OUR_KEY", "SAFETENSORS", "TORCH", "read_safetensors", "read_torch", "recognise"]

SAFETENSORS, TORCH = "safetensors", "torch"
OUR_KEY = "renormify"  # under it a checkpoint says what renormify knows of it
_SCANNED = 2**26  # bytes of a pickle that are looked through for what it would run


def recognise(path: Path) -> str:
    """Tells by its content, not by its suffix, which format a file is.

    Raises:
        CheckpointError: it is missing, not readable, or of no format that can be read.
    """
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; expected a checkpoint file")
        if not path.exists():
            near = nearest(path.name, _siblings(path))
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
        return TORCH
    raise CheckpointError(f"{path} is {_guess(start)}; expected safetensors or a file that torch.save wrote")


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
    try:
        ours = json.loads(metadata.get(OUR_KEY, "{}"))
    except (ValueError, RecursionError):
        ours = {}
    return tensors, ours


def read_torch(path: Path) -> Any:
    """Reads what ``torch.save`` wrote, whatever it is, as far as that runs no code.

    Raises:
        CheckpointError: the file is damaged.
        UnsafeCheckpointError: reading all of it would run code.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of what makes a file unusual; whether it can be used is said here.
            warnings.simplefilter("ignore")
            if path.name.endswith(
                ".safetensors"
            ):  # by a path, torch would go by the name and not the content
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can make the readers raise anything
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    names = _globals_in(path)
    blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
    foreign = [name for name in names if not name.startswith(("torch.", "collections.OrderedDict"))]
    unsafe = isinstance(error, pickle.UnpicklingError) and (blocked is not None or bool(foreign))
    if unsafe and any(name.startswith("torch.nn.modules.") for name in names):
        return UnsafeCheckpointError(
            f"{path} holds a whole pickled model, which runs code on loading; nothing was loaded. Where you "
            "trust it: torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth'), "
            "and give that file"
        )
    if unsafe:
        name = blocked.group(1) if blocked else foreign[0]
        return UnsafeCheckpointError(
            f"{path} would run code on loading ({name}); nothing was loaded. "
            "Ask its author for the state dict alone, best as safetensors"
        )
    if "TorchScript" in str(error):
        return CheckpointError(
            f"{path} is a TorchScript program; expected a state dict (save model.state_dict())"
        )
    return CheckpointError(f"{path} is damaged, truncated or not a checkpoint: {one_line(error)}")


def _globals_in(path: Path) -> list[str]:
    """The globals that the pickles in a file name; read, never executed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(member) as file:
                    start = file.read(_SCANNED)
        else:
            with path.open("rb") as raw:
                start = raw.read(_SCANNED)
    except Exception:  # the file is damaged, and zipfile may raise anything too
        return []
    return list(_scan(io.BytesIO(start)))


def _scan(file: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []
    try:
        while True:  # torch's older format is several pickles, one after another
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    yield ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # the end of the pickles, or of what is sound in them
        return
