"""Writing checkpoints: tensor by tensor, so that none but the one being written need be in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from renormify.errors import OutputError, RenormifyError, one_line
from renormify.formats import DTYPES, OUR_KEY, SAFETENSORS, TORCH, Span
from renormify.outputs import check_output, staged

__all__ = ["Progress", "Source", "check_checkpoint_output", "save_checkpoint", "silent"]

_SUFFIXES = {".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**24  # bytes written at once


class Source(Protocol):
    """Where tensors are that are not in memory."""

    def read(self, key: str) -> Tensor:
        """One tensor."""

    def span(self, key: str) -> Span | None:
        """The bytes of a file that are its values, where there are such."""


class Progress(Protocol):
    """Is told what is being done, and of long work how many bytes of how many are done."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """Shows it, or does not."""


def silent(text: str, done: int = 0, total: int = 0) -> None:
    """Shows no progress."""


def save_checkpoint(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    source: Source | None = None,
    progress: Progress = silent,
) -> Path:
    """Writes a state dict: all of it or, upon any failure or interrupt, nothing.

    Args:
        path: ending in ``.safetensors``, ``.pt`` or ``.pth``, which decides the format.
        state_dict: tensors by their keys; shared and non-contiguous tensors are fine, none is changed.
        metadata: what the file shall say of itself, as JSON knows it. It goes into the header of a
            safetensors file under the key ``renormify``, and beside ``state_dict`` in the others.
        force: whether an existing file may be replaced.
        inputs: files that must not be replaced, not even with ``force``.
        source: reads the tensor of a key whose entry in ``state_dict`` is on the meta device. Into
            safetensors they are written one at a time; a ``.pt`` file needs them all in memory.
        progress: is told how many bytes are written.

    Raises:
        OutputError: the path cannot be written, or its suffix is unknown.
    """
    path = Path(path)
    kind = check_checkpoint_output(path, force=force, inputs=inputs)
    document = json.dumps(metadata or {}, allow_nan=False)
    with staged(path, force=force, inputs=[Path(source) for source in inputs]) as target:
        try:
            if kind == SAFETENSORS:
                header = {"format": "pt"} | ({OUR_KEY: document} if metadata else {})
                _write_safetensors(target, _checked(state_dict, path), header, source, progress, path)
            else:
                whole = {key: _read(key, value, source) for key, value in state_dict.items()}
                state: Any = state_dict if source is None else whole
                torch.save(
                    {"state_dict": state} | ({OUR_KEY: json.loads(document)} if metadata else {}), target
                )
        except (OSError, RenormifyError):
            raise
        except Exception as error:  # torch has its own names for a full disk
            raise OutputError(f"cannot write {path}: {one_line(error)}") from error
    return path


def check_checkpoint_output(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> str:
    """Says before any work whether a checkpoint can be written there, and in which format.

    Raises:
        OutputError: see :func:`renormify.outputs.check_output`; also for an unknown suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(
            f"cannot write {path}: the suffix {path.suffix!r} names no format; "
            f"expected {', '.join(_SUFFIXES)}"
        )
    check_output(path, force=force, inputs=[Path(source) for source in inputs])
    return _SUFFIXES[path.suffix.lower()]


def _checked(state_dict: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise OutputError(
                f"cannot write {path}: safetensors cannot hold {key!r}, which is no tensor; use .pt"
            )
        if value.dtype not in _NAMES or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise OutputError(f"cannot write {path}: safetensors cannot hold {key!r} as {kind}; use .pt")
    return dict(state_dict)


def _write_safetensors(
    target: Path,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
    source: Source | None,
    progress: Progress,
    path: Path,
) -> None:
    # The format's own order, so that each tensor is aligned; among equals the source's, read in turn.
    keys = sorted(tensors, key=lambda key: -tensors[key].element_size())
    header: dict[str, Any] = {"__metadata__": metadata}
    total = 0
    for key in keys:
        size = tensors[key].numel() * tensors[key].element_size()
        header[key] = {
            "dtype": _NAMES[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [total, total + size],
        }
        total += size
    start = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    start += b" " * (-len(start) % 8)
    done = 0
    with target.open("wb", buffering=0) as file:
        _write_all(file, memoryview(len(start).to_bytes(8, "little") + start))
        for key in keys:
            start, stop = header[key]["data_offsets"]
            span = None if source is None else source.span(key)
            if span is not None and span.length == stop - start and hasattr(os, "sendfile"):
                sizes = _send(file, span)
            else:
                # A tensor that is let go after its turn takes what it maps of its file with it.
                sizes = _write(file, _read(key, tensors.pop(key), source))
            for size in sizes:
                done += size
                progress(f"Writing {path}", done, total)


def _send(file: Any, span: Span) -> Iterator[int]:
    """Copies bytes from file to file, as the system does it fastest."""
    with span.file.open("rb") as source:
        sent = 0
        while sent < span.length:
            count = os.sendfile(
                file.fileno(), source.fileno(), span.start + sent, min(_PIECE, span.length - sent)
            )
            if count == 0:
                raise OSError(f"{span.file} became shorter while it was read")
            sent += count
            yield count


def _write(file: Any, tensor: Tensor) -> Iterator[int]:
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = values.view(torch.uint8).numpy().data
    for first in range(0, len(data), _PIECE):
        yield _write_all(file, data[first : first + _PIECE])


def _write_all(file: Any, data: memoryview) -> int:
    written = 0
    while written < len(data):  # an unbuffered file may take less than it is given
        written += file.write(data[written:])
    return written


def _read(key: str, value: Any, source: Source | None) -> Any:
    return source.read(key) if source is not None and isinstance(value, Tensor) and value.is_meta else value
