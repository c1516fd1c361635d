"""The folders of ``torch.distributed.checkpoint``, read tensor by tensor and without running code.

torch's own reader unpickles ``.metadata`` as it is, which may run anything. Here it may name only the
classes of which such a file consists.
"""

from __future__ import annotations

import io
import itertools
import math
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renormify.errors import CheckpointError, UnsafeCheckpointError, one_line
from renormify.formats import Contents

__all__ = ["read_distributed"]

_METADATA = ".metadata"
_LARGEST = 2**28  # bytes of .metadata
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}


def read_distributed(folder: Path) -> Contents:
    """Reads what ``.metadata`` lists: dtypes and shapes now, each tensor when it is asked for.

    The tensors come nested as they were saved, so that a model can be told from its optimizer.

    Raises:
        CheckpointError: a file is missing or damaged, or they contradict each other.
        UnsafeCheckpointError: ``.metadata`` names what no such file needs.
    """
    metadata = _read_metadata(folder / _METADATA)
    try:
        chunks = {
            key: _chunks(folder, key, entry, metadata.storage_data)
            for key, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks")
        }
        tree: dict[str, Any] = {}
        for key, entry in metadata.state_dict_metadata.items():
            path = (getattr(metadata, "planner_data", None) or {}).get(key, (key,))
            leaf = None
            if key in chunks:
                leaf = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                leaf.stored_key = key  # type: ignore[attr-defined]
            _insert(tree, [str(part) for part in path], leaf)
    except CheckpointError:
        raise
    except Exception as error:  # fields that are missing or of other types
        raise CheckpointError(f"{folder / _METADATA} is damaged: {one_line(error)}") from error
    files = {chunk.file for parts in chunks.values() for chunk in parts}
    return Contents(
        tree, {}, (folder / _METADATA, *sorted(files)), lambda key: _read_tensor(key, chunks[key])
    )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":
            return pathlib.PurePosixPath  # where it was saved; never looked at
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeCheckpointError(f"names {module}.{name}"[:200])


def _read_metadata(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is too large ({path.stat().st_size:,} bytes)")
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f"{path} {error}, which no checkpoint of torch.distributed needs and which may run code; "
            "nothing was loaded"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error
    if not all(
        isinstance(getattr(metadata, part, None), dict) for part in ("state_dict_metadata", "storage_data")
    ):
        raise CheckpointError(f"{path} is damaged: it does not say what is stored where")
    return metadata


class _Chunk:
    """Where a part of a tensor lies: in the tensor, and in which bytes of which file."""

    def __init__(self, offsets: tuple[int, ...], sizes: tuple[int, ...], file: Path, start: int, length: int):
        self.box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        self.shape = sizes
        self.file = file
        self.start = start
        self.length = length


def _chunks(folder: Path, key: str, entry: Any, places: dict[Any, Any]) -> tuple[_Chunk, ...]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    where = f"{folder / _METADATA}: {key[:80]!r}"
    shape = tuple(entry.size)
    found = []
    for chunk in entry.chunks:
        place = places.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise CheckpointError(f"{where} lacks a part: no file holds that at {tuple(chunk.offsets)}")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{where} is stored compressed or encrypted; save it without extensions")
        name = str(place.relative_path)
        if Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{where} is said to be in {name[:100]!r}, which is not a file beside it")
        part = _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), folder / name, place.offset, place.length)
        if not part.file.is_file():
            raise CheckpointError(f"{where} is in {name[:100]}, which is missing")
        outside = any(s.start < 0 or s.stop > length for s, length in zip(part.box, shape, strict=True))
        if outside or part.start < 0 or part.start + part.length > part.file.stat().st_size:
            raise CheckpointError(
                f"{where} is said to be outside of {name[:100]}; the file is damaged or cut"
            )
        found.append(part)
    itemsize = entry.properties.dtype.itemsize
    # A part says how large it is, and is at most as large as its bytes: what is declared costs no memory.
    if sum(math.prod(part.shape) for part in found) != math.prod(shape) or _overlap(found):
        raise CheckpointError(f"{where} has parts that do not make up its shape {shape}")
    if any(math.prod(part.shape) * itemsize > part.length for part in found):
        raise CheckpointError(f"{where} is larger than the bytes that are said to hold it")
    return tuple(found)


def _overlap(parts: list[_Chunk]) -> bool:
    # Sorted along the first axis, a part is compared only with those that begin before it ends.
    ordered = sorted(parts, key=lambda part: part.box[0].start if part.box else 0)
    for index, first in enumerate(ordered):
        for second in itertools.islice(ordered, index + 1, None):
            if first.box and second.box[0].start >= first.box[0].stop:
                break
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(first.box, second.box, strict=True)):
                return True
    return False


def _insert(tree: dict[str, Any], path: list[str], leaf: Tensor | None) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _read_tensor(key: str, chunks: tuple[_Chunk, ...]) -> Tensor:
    parts = _loaded(key, chunks)
    if len(chunks) == 1:
        return next(parts)
    shape = [max(part.box[axis].stop for part in chunks) for axis in range(len(chunks[0].box))]
    first = next(parts)
    whole = torch.empty(shape, dtype=first.dtype)
    for chunk, part in zip(chunks, itertools.chain([first], parts), strict=True):
        whole[chunk.box] = part
    return whole


def _loaded(key: str, chunks: tuple[_Chunk, ...]) -> Iterator[Tensor]:
    for chunk in chunks:
        try:
            with chunk.file.open("rb") as file:
                file.seek(chunk.start)
                part = io.BytesIO(file.read(chunk.length))
            with zipfile.ZipFile(part) as archive:
                packed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
            part.seek(0)
            tensor = None if packed else torch.load(part, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{chunk.file} is damaged at {key[:80]!r}: {one_line(error)}") from error
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.shape:
            raise CheckpointError(
                f"{chunk.file} is damaged at {key[:80]!r}: another shape than .metadata says"
            )
        yield tensor.detach()
