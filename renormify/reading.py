"""Reading checkpoints of every format, without running what is in them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from renormify import sources
from renormify.distcp import read_distributed
from renormify.errors import CheckpointError, KeyMismatchError
from renormify.exported import read_program
from renormify.formats import (
    DISTRIBUTED,
    INDEX,
    OUR_KEY,
    PROGRAM,
    SAFETENSORS,
    Contents,
    Span,
    find_spans,
    locate,
    read_safetensors,
    read_torch,
    recognise,
    stand_ins,
)
from renormify.nests import describe, find_state_dict
from renormify.shards import read_index

__all__ = ["Checkpoint", "load_checkpoint"]


class Checkpoint(dict[str, Tensor]):
    """The tensors of a checkpoint by their keys, with what the file says of itself.

    Args:
        tensors: the state dict.
        path: the file that it came from.
        metadata: what :func:`save_checkpoint` wrote beside the tensors; empty for a file of another origin.
        reader: reads a tensor of which only dtype and shape are here (on the meta device), by its stored key.
        stored: the stored key of each such tensor.
        spans: where in a file the values of a tensor lie as they are, by its stored key.
        files: every file that was read.
        notes: what the user should know of how it was read, a sentence each.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        path: Path,
        metadata: Mapping[str, Any] | None = None,
        reader: Callable[[str], Tensor] | None = None,
        stored: Mapping[str, str] | None = None,
        spans: Mapping[str, Span] | None = None,
        files: tuple[Path, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(tensors)
        self.path = path
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.files = files or (path,)
        self.notes = notes
        self._reader = reader
        self._spans = dict(spans or {})
        self._stored = dict(stored or {})
        # torch's own record of each module's version, by which load_state_dict() knows old checkpoints.
        self._metadata: Any = getattr(tensors, "_metadata", None)

    @property
    def streamed(self) -> bool:
        """Whether the tensors here have no values, and are read one by one."""
        return self._reader is not None

    def read(self, key: str) -> Tensor:
        """The tensor of a key, with its values.

        Raises:
            CheckpointError: the file holds another one than it said.
        """
        expected = self[key]
        if self._reader is None:
            return expected
        tensor = self._reader(self._stored.get(key, key))
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            raise CheckpointError(f"{self.path} is damaged at {key[:80]!r}: not the tensor that it announced")
        return tensor

    def span(self, key: str) -> Span | None:
        """Which bytes of a file are the tensor's, where they are there as they are in memory."""
        return self._spans.get(self._stored.get(key, key))

    def without_values(self) -> Checkpoint:
        """The same with dtypes and shapes alone, so that what is mapped of the file can be let go."""
        tensors = OrderedDict(
            (key, value.to("meta") if isinstance(value, Tensor) else value) for key, value in self.items()
        )
        tensors._metadata = self._metadata  # type: ignore[attr-defined]
        return Checkpoint(tensors, path=self.path, metadata=self.metadata, files=self.files, notes=self.notes)

    def renamed(self, rename: Callable[[str], str], keys: Mapping[str, Any] | None = None) -> Checkpoint:
        """The same tensors under other names, and so the record of each module's version."""
        kept = self if keys is None else keys
        tensors = OrderedDict((rename(key), self[key]) for key in kept)
        if self._metadata is not None:
            # A module's name is a prefix of its keys, but for the dot.
            tensors._metadata = {  # type: ignore[attr-defined]
                rename(f"{name}." if name else "").removesuffix("."): version
                for name, version in self._metadata.items()
            }
        return Checkpoint(
            tensors,
            path=self.path,
            metadata=self.metadata,
            reader=self._reader,
            stored={rename(key): self._stored.get(key, key) for key in kept},
            spans=self._spans,
            files=self.files,
            notes=self.notes,
        )


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    prefix: str = "",
    trust_pickle: bool = False,
    stream: bool = False,
) -> Checkpoint:
    """Reads the state dict in a checkpoint.

    That is a safetensors file; an index of shards, or the folder with it; a file that ``torch.save`` wrote; a
    folder that ``torch.distributed.checkpoint`` wrote; the weights in a ``.pt2`` file. Which of these, its
    content tells and not its suffix. Nothing in it is ever executed, and no path in it followed out of its
    folder. A state dict nested under ``state_dict``, ``model`` and the like is found. Its keys are as they
    are stored: whether a prefix ``module.`` belongs to them, :func:`load_weights` can tell by the model.
    Tensors are mapped into memory where the format allows it.

    Args:
        path: the file or folder.
        key: where in the file the state dict is, dotted where nested; without it, it is looked for.
        prefix: take only the keys that begin with this, without it.
        trust_pickle: whether a file of ``torch.save`` may run code; then a pickled model is taken too.
        stream: leave the tensors of shards and of distributed checkpoints where they are, to be had by
            :meth:`Checkpoint.read`; here they are on the meta device then.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict.
        UnsafeCheckpointError: loading it would run code.
    """
    path = locate(Path(path))
    contents = _contents(path, recognise(path), trust_pickle)
    found = find_state_dict(contents.tensors, key)
    if found is None:
        raise CheckpointError(f"{path} holds no state dict: it holds {describe(contents.tensors)}")
    tensors, notes = found
    stored = {name: getattr(value, "stored_key", name) for name, value in tensors.items()}
    ours = contents.ours if isinstance(contents.ours, dict) else {}
    reader = contents.read
    if reader is not None and not stream:
        tensors, reader = {name: reader(stored[name]) for name in tensors}, None
    checkpoint = Checkpoint(
        tensors,
        path=path,
        metadata=ours,
        reader=reader,
        stored=stored,
        spans=contents.spans,
        files=contents.files,
        notes=(*contents.notes, *notes),
    )
    return _take_prefix(checkpoint, prefix) if prefix else checkpoint


def _contents(path: Path, kind: str, trust_pickle: bool) -> Contents:
    if kind == SAFETENSORS:
        tensors, ours = read_safetensors(path)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors")
        return Contents(tensors, ours, (path,), spans=find_spans(path))
    if kind == INDEX:
        return read_index(path, trust_pickle=trust_pickle)
    if kind == DISTRIBUTED:
        return read_distributed(path)
    if kind == PROGRAM:
        return read_program(path)
    loaded = read_torch(path, trust_pickle=trust_pickle)
    ours = loaded.get(OUR_KEY) if isinstance(loaded, Mapping) else None
    left = [] if trust_pickle else [name for _, name in stand_ins(path)]
    note = f"not loaded, as it stands beside the weights: {', '.join(left)[:300]}"
    return Contents(loaded, ours, (path,), notes=(note,) if left else ())


def _take_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """The part of a checkpoint under a prefix, without it; a note says what was left.

    Raises:
        KeyMismatchError: no key begins with it.
    """
    kept = {key: None for key in checkpoint if key.startswith(prefix)}
    if not kept:
        tops = dict.fromkeys(key.partition(".")[0][:80] + "." for key in checkpoint if "." in key)
        near = sources.nearest(prefix, tops) or f"; keys begin with {', '.join(list(tops)[:5])}"
        raise KeyMismatchError(f"--prefix {prefix!r}: no key of {checkpoint.path} begins with it{near}")
    part = checkpoint.renamed(lambda key: key.removeprefix(prefix), kept)
    left = len(checkpoint) - len(kept)
    if left:
        part.notes += (f"left {left} tensors that are not under {prefix!r}",)
    return part
