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
    reader = _ShardReader(places, shards, kinds, trust_pickle)
    placeholders = reader.placeholders(path)
    spans = {name: find_spans(shards[name]) for name, kind in kinds.items() if kind == SAFETENSORS}
    held = {key: spans[name][key] for key, name in places.items() if name in spans}
    return Contents(placeholders, {}, (path, *shards.values()), reader, held)


class _ShardReader:
    """Reads tensors by their keys, with one shard open at a time: what it maps is let go with it."""

    def __init__(
        self,
        places: Mapping[str, str],
        shards: Mapping[str, Path],
        kinds: Mapping[str, str],
        trust_pickle: bool,
    ) -> None:
        self._places = places
        self._shards = shards
        self._kinds = kinds
        self._trust_pickle = trust_pickle
        self._open: tuple[str, Any] | None = None

    def __call__(self, key: str) -> Tensor:
        name = self._places[key]
        try:
            file = self._file(name)
            tensor: Tensor = file[key] if isinstance(file, Mapping) else file.get_tensor(key)
        except CheckpointError:
            raise
        except Exception as error:  # the shard was replaced since its header was read
            raise CheckpointError(
                f"cannot read {key[:80]} of {self._shards[name]}: {one_line(error)}"
            ) from error
        return tensor

    def placeholders(self, index: Path) -> dict[str, Any]:
        """A tensor without memory for each key, in the order of the shards."""
        return dict(self._placeholders(index))

    def _placeholders(self, index: Path) -> Iterator[tuple[str, Any]]:
        for name in self._shards:
            file = self._file(name)
            keys = [key for key, place in self._places.items() if place == name]
            _check_held(index, keys, dict.fromkeys(file.keys()), name)
            for key in keys:
                if isinstance(file, Mapping):
                    value = file[key]
                    yield key, value.to("meta") if isinstance(value, Tensor) else value
                    continue
                part = file.get_slice(key)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(
                        f"{self._shards[name]} holds {key[:80]} as {kind}, which torch cannot"
                    )
                yield key, torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")

    def _file(self, name: str) -> Any:
        if self._open is None or self._open[0] != name:
            self._open = None  # first, so that two are never in memory
            open_shard = self._open_safetensors if self._kinds[name] == SAFETENSORS else self._open_torch
            self._open = name, open_shard(self._shards[name])
        return self._open[1]

    def _open_safetensors(self, shard: Path) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(shard, framework="pt")
        except Exception as error:
            raise CheckpointError(
                f"{shard} is a damaged or truncated safetensors file: {one_line(error)}"
            ) from error

    def _open_torch(self, shard: Path) -> Mapping[str, Any]:
        held = read_torch(shard, trust_pickle=self._trust_pickle)
        if not isinstance(held, Mapping):
            raise CheckpointError(f"{shard} holds no state dict, but is of type {type(held).__name__}")
        return held


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
