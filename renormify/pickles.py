"""What ``torch.save`` wrote, read without running what is in it."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from renormify.errors import CheckpointError, UnsafeCheckpointError, one_line

__all__ = ["check_archive", "is_archive", "read_torch"]

_SCANNED = 2**22  # bytes of a pickle that are looked through for what it would run
_PACKED = 8  # how many times its own size a zip archive may unpack to; torch itself does not compress
_PLAIN = ("torch.", "collections.OrderedDict")


def read_torch(path: Path, *, trust_pickle: bool = False) -> Any:
    """Reads what ``torch.save`` wrote, whatever it is.

    Args:
        path: the file.
        trust_pickle: whether code that the file names may run. Without it, nothing of that kind is loaded.

    Raises:
        CheckpointError: the file is damaged, or unpacks to far more than its size.
        UnsafeCheckpointError: reading all of it would run code.
    """
    is_zip = is_archive(path)
    if is_zip:
        check_archive(path)
    try:
        with warnings.catch_warnings():
            # torch warns of what makes a file unusual; whether it can be used is said here.
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"map_location": "cpu", "weights_only": not trust_pickle}
            if path.name.endswith(".safetensors"):  # by a path, torch would go by the name, not the content
                with path.open("rb") as file:
                    return torch.load(file, **options)
            return torch.load(path, mmap=is_zip, **options)
    except Exception as error:  # a damaged file can make the readers raise anything
        if trust_pickle:
            raise CheckpointError(f"{path} could not be loaded: {one_line(error)}") from error
        raise _refusal(path, error) from error


def is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive does, which is what torch goes by."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_archive(path: Path) -> None:
    """Refuses a zip archive that says it unpacks to far more than it is.

    Raises:
        CheckpointError: it is such a one, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        size = path.stat().st_size
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, truncated or not a checkpoint: {one_line(error)}"
        ) from error
    if unpacked > _PACKED * size:
        raise CheckpointError(
            f"{path} has {size:,} bytes and says that it unpacks to {unpacked:,}; torch.save does not "
            "compress, so it is damaged or made to fill the memory"
        )


def _refusal(path: Path, error: Exception) -> CheckpointError:
    names = _globals_in(path)
    blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
    foreign = [name for name in names if not name.startswith(_PLAIN)]
    unsafe = isinstance(error, pickle.UnpicklingError) and (blocked is not None or bool(foreign))
    if unsafe and any(name.startswith("torch.nn.modules.") for name in names):
        return UnsafeCheckpointError(
            f"{path} holds a whole pickled model, which runs code on loading; nothing was loaded. Best ask "
            "its author for model.state_dict() alone; where you trust the file, add --trust-pickle"
        )
    if unsafe:
        name = (blocked.group(1) if blocked else foreign[0])[:100]
        return UnsafeCheckpointError(
            f"{path} would run code on loading ({name}); nothing was loaded. Ask its author for the state "
            "dict alone, best as safetensors; where you trust the file, add --trust-pickle"
        )
    if "TorchScript" in str(error):
        return CheckpointError(
            f"{path} is a TorchScript program; expected a state dict (save model.state_dict())"
        )
    return CheckpointError(f"{path} is damaged, truncated or not a checkpoint: {one_line(error)}")


def _globals_in(path: Path) -> list[str]:
    """The globals that the pickles in a file name; read, never executed."""
    try:
        if is_archive(path):
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
