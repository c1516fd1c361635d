"""What ``torch.save`` wrote, read without running what is in it."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from renormify.errors import CheckpointError, UnsafeCheckpointError, one_line

__all__ = ["check_archive", "is_archive", "read_torch", "stand_ins"]

_SCANNED = 2**22  # bytes of a pickle that are looked through for what it would run
_PACKED = 8  # how many times its own size a zip archive may unpack to; torch itself does not compress
_PLAIN = ("torch.", "collections.OrderedDict")
# What people's tools save beside the weights: settings, paths, times, best scores. Nothing of it is needed.
_BESIDE = (
    *("addict.", "argparse.Namespace", "collections.", "datetime.", "easydict.", "lightning."),
    *("lightning_fabric.", "ml_collections.", "numpy.", "omegaconf.", "pathlib.", "pytorch_lightning."),
    *("typing.Any", "yacs.", "builtins.dict", "builtins.float", "builtins.int", "builtins.list"),
)
_READABLE = (2, 3)  # the protocols of pickle that torch reads without running code


class _Forgetful:
    """Is made in place of an array or a number of NumPy, and keeps nothing of it."""

    def __init__(self, *_: object, **__: object) -> None:
        """Forgets the arguments."""

    def __setstate__(self, state: object) -> None:
        """Forgets it."""


class _Mapping:
    """Makes a mapping in place of any other object, since torch fills no other kind."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_torch(path: Path, *, trust_pickle: bool = False) -> Any:
    """Reads what ``torch.save`` wrote, whatever it is.

    Without trust, what stands beside the weights comes as something else: see :func:`stand_ins`.

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
            with torch.serialization.safe_globals([] if trust_pickle else stand_ins(path)):
                # By a path, torch would go by the name and not the content, and takes no name but a text.
                if path.name.endswith(".safetensors") or not _is_text(path):
                    with path.open("rb") as file:
                        return torch.load(file, **options)
                return torch.load(path, mmap=is_zip, **options)
    except Exception as error:  # a damaged file can make the readers raise anything
        if trust_pickle:
            raise CheckpointError(f"{path} could not be loaded: {one_line(error)}") from error
        raise _refusal(path, error) from error


def stand_ins(path: Path) -> list[Any]:
    """For each name of what stands beside weights in a file's pickles, what is called in its place.

    The class of that name is never looked up, so its package need not be here and none of it runs.

    Returns:
        Pairs as ``torch.serialization.safe_globals`` takes them.
    """
    found = set(_globals_in(path))
    names = sorted(name for name in found if name.startswith(_BESIDE) and not name.startswith(_PLAIN))
    return [(_Forgetful if name.startswith("numpy.") else _Mapping, name) for name in names]


def _is_text(path: Path) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    foreign = [name for name in names if not name.startswith((*_PLAIN, *_BESIDE))]
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
    protocol = _protocol(path)
    if names and protocol is not None and protocol not in _READABLE:
        return UnsafeCheckpointError(
            f"{path} is a pickle of protocol {protocol}, of which torch cannot tell that it runs no code; "
            "nothing was loaded. Save it without pickle_protocol, best as safetensors; where you trust it, "
            "add --trust-pickle"
        )
    return CheckpointError(f"{path} is damaged, truncated or not a checkpoint: {_plainly(error)}")


def _plainly(error: Exception) -> str:
    """What torch has to say, without its advice on switching safety off."""
    found = re.search(r"WeightsUnpickler error:(.*?)(Check the documentation|$)", str(error), re.DOTALL)
    return one_line(error if found is None else f"{type(error).__name__}: {found.group(1)}")


def _globals_in(path: Path) -> list[str]:
    """The globals that the pickles in a file name; read, never executed."""
    return list(_scan(io.BytesIO(_start(path))))


def _protocol(path: Path) -> int | None:
    """The protocol that a file's pickle announces."""
    start = _start(path)[:2]
    return start[1] if len(start) == 2 and start[:1] == pickle.PROTO else None


def _start(path: Path) -> bytes:
    """The first bytes of a file's pickle."""
    try:
        if is_archive(path):
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(member) as file:
                    return file.read(_SCANNED)
        with path.open("rb") as raw:
            return raw.read(_SCANNED)
    except Exception:  # the file is damaged, and zipfile may raise anything too
        return b""


def _scan(file: io.BytesIO) -> Iterator[str]:
    texts: list[str] = []  # what was pushed last, and what is no text as an empty one
    try:
        while True:  # torch's older format is several pickles, one after another
            memo: dict[Any, str] = {}
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    yield re.sub("^__builtin__[.]", "builtins.", str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
                    yield ".".join(texts[-2:])
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = texts[-1] if texts else ""
                    continue
                elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                    memo[argument] = texts[-1] if texts else ""
                    continue
                elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                    argument = memo.get(argument, "")
                texts.append(argument if isinstance(argument, str) else "")
                del texts[:-2]
    except Exception:  # the end of the pickles, or of what is sound in them
        return
