"""Files that hold weights among other things: Keras models, and archives of Stable-Baselines3.

Read without Keras and without Stable-Baselines3. Nothing in a file is executed, no link in it is followed,
and what would take far more memory than the file takes on the disk is refused.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import shutil
import tempfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renormify.checkpoints import Checkpoint, load_checkpoint
from renormify.errors import CheckpointError, MissingExtraError, one_line
from renormify.peers import PEERS
from renormify.translation import Norm, Peer

__all__ = ["KERAS", "SB3", "archive_kind", "load_policy", "mentions", "read_keras"]

KERAS, SB3 = "keras", "sb3"
_WEIGHTS = "model.weights.h5"  # in a .keras archive
_POLICY = "policy.pth"  # in an archive of Stable-Baselines3
_LARGE = 2**26  # bytes that a member may have, however well it is compressed
_CHANNELS = 2**20
_STATISTICS = PEERS["keras"].keys  # in the order in which Keras makes them, behind gamma and beta


def archive_kind(path: Path) -> str | None:
    """Which kind of archive a file is, by its content; None for any other file, and for none at all."""
    with contextlib.suppress(OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        with path.open("rb") as file:
            if file.read(4) == b"\x89HDF":
                return KERAS
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
            return KERAS if _WEIGHTS in names else SB3 if _POLICY in names else None
    return None


def load_policy(path: Path) -> Checkpoint:
    """Reads the policy's state dict in an archive of Stable-Baselines3; what else is in it is pickled code.

    Raises:
        CheckpointError: the archive is damaged, or would unpack to far more than its size.
        UnsafeCheckpointError: reading the policy would run code.
    """
    with tempfile.TemporaryDirectory(prefix="renormify.") as folder:
        target = Path(folder) / _POLICY
        with _member(path, _POLICY) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        try:
            policy = load_checkpoint(target)
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(target), f"{_POLICY} in {path}")) from error
        # Mapped into memory, its tensors would end with the file.
        tensors = OrderedDict((key, value.clone()) for key, value in policy.items())
    tensors._metadata = policy._metadata  # type: ignore[attr-defined]
    return Checkpoint(tensors, path=path)


def mentions(path: Path, name: str) -> bool:
    """Whether a name stands somewhere in a file, as that of a module does in a pickle."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def read_keras(path: Path, eps: float | None) -> tuple[list[Norm], list[str], bool]:
    """The renorm layers in a ``.keras`` or ``.weights.h5`` file, in the model's order.

    Args:
        path: the file.
        eps: of the layers, where the file does not tell; None for Keras' default.

    Returns:
        The layers, under the names that they have in Keras, joined by dots (a weights file tells only their
        places); the names of all other layers that have weights; and whether their order is the model's.

    Raises:
        CheckpointError: the file is damaged, or does not tell what a tensor is.
        MissingExtraError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "keras", "to read the files of Keras") from error
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            with _member(path, "config.json") as file:
                configs = _layer_configs(json.loads(file.read()))
            file = stack.enter_context(_member(path, _WEIGHTS))
        else:
            configs, file = {}, stack.enter_context(path.open("rb"))
        stack.enter_context(_damage(path))
        weights = _weights(stack.enter_context(h5py.File(file, "r")), path)
        # A layer of which the configuration does not tell comes behind, in the order of the file.
        order = {place: position for position, place in enumerate(configs)}
        norms, others = [], []
        for place in sorted(weights, key=lambda place: (order.get(place, len(order)), _natural(place))):
            name = ".".join(part for part in place.split("/") if part != "layers")
            name, config = configs.get(place, (name, None))
            norm = _norm(name, weights[place], config, eps, path)
            if norm is None:
                others.append(name)
            else:
                norms.append(norm)
    if len({norm.name for norm in norms}) < len(norms):
        raise CheckpointError(f"{path} is damaged: it holds two layers of one name")
    ordered = len(norms) == 1 or all(place in order for place in weights)
    return norms, others, ordered


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[Any]:
    with _damage(path), zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        if info.file_size > max(_LARGE, 20 * info.compress_size):
            raise CheckpointError(
                f"{path} would unpack {name} to {info.file_size:,} bytes from {info.compress_size:,}; "
                "no weights are compressed so well"
            )
        with archive.open(info) as file:
            while file.read(
                2**20
            ):  # to the end once, where its checksum is compared: h5py reads here and there
                pass
            file.seek(0)
            yield file


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, MissingExtraError):
        raise
    except Exception as error:  # damaged files make zipfile, json and h5py raise anything
        raise CheckpointError(f"{path} is damaged or truncated: {one_line(error)}") from error


def _layer_configs(document: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The name and the configuration of each layer by its place among the weights, in the model's order.

    Its place has the name of its class, counted, as Keras writes it. The weights have the layer's own name
    too, as an attribute; but the HDF5 library does not return from a damaged one.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def visit(layer: Any, prefix: str, place: str) -> None:
        counts: Counter[str] = Counter()
        config = layer.get("config") if isinstance(layer, Mapping) else None
        for child in config.get("layers", ()) if isinstance(config, Mapping) else ():
            kind = _snake_case(str(child["class_name"]))
            own = f"{place}layers/{kind}" + (f"_{counts[kind]}" if counts[kind] else "")
            counts[kind] += 1
            name = f"{prefix}{child['config'].get('name')}"
            found[own] = name, {**child["config"], "class_name": child["class_name"]}
            visit(child, f"{name}.", f"{own}/")

    visit(document, "", "")
    return found


def _snake_case(name: str) -> str:
    """BatchNormalization becomes batch_normalization, by Keras' own rules."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _weights(file: Any, path: Path) -> dict[str, list[Any]]:
    """The variables of each layer, unread, by the layer's place in the file."""
    import h5py

    found: dict[str, list[Any]] = {}

    def visit(group: Any, place: str) -> None:
        for key, child in _children(group, path).items():
            if not isinstance(child, h5py.Group) or (key == "optimizer" and not place):
                continue
            if key != "vars":
                visit(child, f"{place}/{key}".removeprefix("/"))
            elif variables := _children(child, path):
                found[place] = [variables[index] for index in sorted(variables, key=_natural)]

    visit(file, "")
    if not found:
        raise CheckpointError(f"{path} holds no weights as Keras 3 writes them, in .keras or .weights.h5")
    return found


def _children(group: Any, path: Path) -> dict[str, Any]:
    """What is in a group itself; a link may lead into another file, and is refused."""
    import h5py

    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise CheckpointError(f"{path} holds a link at {group.name}/{key}; expected weights alone")
    return {key: group[key] for key in group}


def _norm(
    name: str, variables: list[Any], config: Mapping[str, Any] | None, eps: float | None, path: Path
) -> Norm | None:
    """The layer as a renorm layer, or None where it is none."""
    peer = PEERS["keras"]
    affine = len(variables) - len(_STATISTICS)
    if config is not None:
        if config.get("class_name") != "BatchNormalization" or not config.get("renorm"):
            return None
        leading = [key for key, has in (("gamma", "scale"), ("beta", "center")) if config.get(has, True)]
        if affine != len(leading):
            raise CheckpointError(f"{path} is damaged: {name} has {len(variables)} variables")
        told = config.get("epsilon")
        if eps is not None and told != eps:
            raise CheckpointError(f"{name} in {path} was built with epsilon={told}, and not with {eps:g}")
        eps = float(told) if isinstance(told, (int, float)) else eps
    else:
        shapes = {getattr(variable, "shape", None) for variable in variables}
        if affine not in (0, 1, 2) or len(shapes) != 1 or len(next(iter(shapes)) or ()) != 1:
            return None
        if affine == 1:
            raise CheckpointError(
                f"{path} does not tell whether {name} has gamma or beta: give the .keras file of the model"
            )
        leading = ["gamma", "beta"][:affine]
    tensors = {
        key: _read(variable, f"{name}.{key}", path)
        for key, variable in zip((*leading, *_STATISTICS), variables, strict=True)
    }
    norm = Norm(name, tensors, peer.eps if eps is None else eps, config or {})
    if config is None and eps is None:
        _check_eps(norm, peer, path)
    return norm


def _check_eps(norm: Norm, peer: Peer, path: Path) -> None:
    """Keras derives the variance from the deviation by its eps, and so two tensors tell it."""
    squared, variance = norm.vector("moving_stddev").square(), norm.vector("moving_variance")
    told = squared - variance
    trained = (variance > 0) & (told != 0)
    if bool(((told - peer.eps).abs() > 1e-6 * squared + 1e-3 * peer.eps)[trained].any()):
        raise CheckpointError(
            f"{norm.name} in {path} was not built with epsilon={peer.eps:g}, but with one near "
            f"{float(told[trained].median()):.2g}: give it as --eps, or the .keras file, which holds it"
        )


def _read(variable: Any, name: str, path: Path) -> Tensor:
    import h5py

    if not isinstance(variable, h5py.Dataset) or variable.dtype.kind != "f" or variable.ndim != 1:
        raise CheckpointError(f"{path} is damaged: {name} is no vector of floating-point numbers")
    if variable.external or variable.is_virtual:
        raise CheckpointError(f"{path} keeps {name} in another file, which is not followed")
    if variable.size > _CHANNELS:
        raise CheckpointError(f"{path} is damaged: {name} has {variable.size:,} channels")
    return torch.from_numpy(variable[()].astype(variable.dtype.newbyteorder("=")))


def _natural(text: str) -> list[tuple[int, str]]:
    """Orders layer_2 before layer_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
