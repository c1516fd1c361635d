"""Checkpoints in several files, as their index lists them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renormify.errors import CheckpointError, one_line
from renormify.formats import DTYPES, SAFETENSORS, Contents, find_spans, read_torch, recognise
from renormify.sources import nearest

__all__ = ["read_index"]

_LARGEST = 2**26  # bytes of an index; the largest in use have a few million


def read_index(path: Path, *, trust_pickle: bool = False) -> Contents:
    """Reads what ``*.safetensors.index.json`` or ``*.bin.index.json`` lists, one shard at a time.

    A shard is a file beside the index; a name that leads out of its folder is refused.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or they contradict each other.
        UnsafeCheckpointError: loading a shard would run code.
    """
    places = _places(path)
    shards = {name: path.parent / name for name in dict.fromkeys(places.values())}
    kinds = {name: recognise(shard) for name, shard in shards.items()}
    files = (path, *shards.values())
    if set(kinds.values()) == {SAFETENSORS}:
        reader = _ShardReader(places, shards)
        placeholders = reader.placeholders(path)
        spans = {name: find_spans(shard) for name, shard in shards.items()}
        held = {key: spans[name][key] for key, name in places.items()}
        return Contents(placeholders, {}, files, reader, held)
    tensors: dict[str, Any] = {}
    for name, shard in shards.items():
        held = read_torch(shard, trust_pickle=trust_pickle)
        keys = [key for key, place in places.items() if place == name]
        if not isinstance(held, Mapping):
            raise CheckpointError(f"{shard} holds no state dict, but is of type {type(held).__name__}")
        _check_held(path, keys, held, name)
        tensors |= {key: held[key] for key in keys}
    return Contents(tensors, {}, files)


class _ShardReader:
    """Reads tensors by their keys, with one shard open at a time: what it maps is let go with it."""

    def __init__(self, places: Mapping[str, str], shards: Mapping[str, Path]) -> None:
        self._places = places
        self._shards = shards
        self._open: tuple[str, Any] | None = None

    def __call__(self, key: str) -> Tensor:
        name = self._places[key]
        try:
            tensor: Tensor = self._file(name).get_tensor(key)
        except CheckpointError:
            raise
        except Exception as error:  # the shard was replaced since its header was read
            raise CheckpointError(
                f"cannot read {key[:80]} of {self._shards[name]}: {one_line(error)}"
            ) from error
        return tensor

    def placeholders(self, index: Path) -> dict[str, Tensor]:
        """A tensor without memory for each key, in the order of the shards."""
        return dict(self._placeholders(index))

    def _placeholders(self, index: Path) -> Iterator[tuple[str, Tensor]]:
        for name in self._shards:
            file = self._file(name)
            keys = [key for key, place in self._places.items() if place == name]
            _check_held(index, keys, dict.fromkeys(file.keys()), name)
            for key in keys:
                part = file.get_slice(key)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(
                        f"{self._shards[name]} holds {key[:80]} as {kind}, which torch cannot"
                    )
                yield key, torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")

    def _file(self, name: str) -> Any:
        if self._open is None or self._open[0] != name:
            from safetensors import safe_open

            try:
                self._open = name, safe_open(self._shards[name], framework="pt")
            except Exception as error:
                raise CheckpointError(
                    f"{self._shards[name]} is a damaged or truncated safetensors file: {one_line(error)}"
                ) from error
        return self._open[1]


def _check_held(index: Path, keys: list[str], held: Mapping[Any, Any], name: str) -> None:
    absent = [key for key in keys if key not in held]
    if absent:
        raise CheckpointError(
            f"{index} says that {name} holds {absent[0][:80]!r}, and it does not ({len(absent)} in all)"
        )


def _places(path: Path) -> dict[str, str]:
    """Which file holds each key."""
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(
                f"{path} is too large for an index of shards ({path.stat().st_size:,} bytes)"
            )
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {one_line(error)}") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    folder = path.parent
    for name in set(map(str, places.values())):
        # Whoever made the index must not choose which other file of this machine is read.
        if Path(name).name != name or "\\" in name or ":" in name or "\0" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path} names the shard {name[:100]!r}, which is not a file beside it")
        if not (folder / name).is_file():
            near = nearest(name, [file.name for file in folder.iterdir()], files=True)
            raise CheckpointError(f"{path} lists {name[:100]!r}, which is missing beside it{near}")
    return {str(key): str(name) for key, name in places.items()}
