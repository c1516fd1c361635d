"""Checkpoints with the Batch Renorm layers of others, turned into ones with BatchNorm's state.

Weights keep their keys, but for those of the norm layers. What each layer computes in evaluation stays the
same, and this is measured; what its own package did wrong elsewhere is in the report.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from renormify import archives
from renormify.checkpoints import Checkpoint, fit_keys, load_checkpoint
from renormify.errors import (
    CheckpointError,
    InputError,
    KeyMismatchError,
    NothingToConvertError,
    UnsafeCheckpointError,
)
from renormify.peers import PEERS
from renormify.sources import nearest
from renormify.translation import LayerImport, Norm, Peer, Target, check_norm, shown, translate

__all__ = ["AUTO", "Import", "ImportReport", "import_checkpoint"]

AUTO = "auto"
_BATCH_NORM = {"running_mean", "running_var"}
_VERSION = 2  # that torch records of BatchNorm since it counts batches


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What was read from a file of another package, and what was mended.

    Args:
        peer: whose layers they are, as ``--from`` takes it.
        package: the same, as people know it.
        layers: all of them.
        kept: how many tensors went into the output as they are.
        left_out: what did not go into the output.
        notes: what to know of the output.
    """

    peer: str
    package: str
    layers: tuple[LayerImport, ...]
    kept: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every layer evaluates as it did, but for rounding."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Which layers do not evaluate as they did, or None."""
        failed = [shown(layer.name) for layer in self.layers if not layer.tolerance_used <= 1]
        return f"not as in {self.package} in evaluation: {', '.join(failed)}" if failed else None

    def mended(self) -> tuple[dict[str, Any], ...]:
        """Each mended fault once, with the layer in which its effect is the largest."""
        worst: dict[tuple[str, str], dict[str, Any]] = {}
        for layer in self.layers:
            for mend in layer.mended:
                known = worst.get((mend.where, mend.fault))
                count = 1 if known is None else known["layers"] + 1
                if known is None or (mend.effect or 0.0) > (known["effect"] or 0.0):
                    known = dataclasses.asdict(mend) | {"layer": layer.name}
                worst[mend.where, mend.fault] = known | {"layers": count}
        return tuple(worst.values())

    def outline(self) -> dict[str, Any]:
        """What a checkpoint says of where it came from."""
        eps = {layer.target: layer.eps for layer in self.layers}
        return {"from": self.peer, "eps": eps, "mended": list(self.mended())}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        return dataclasses.asdict(self) | {"passed": self.passed, "mended": self.mended()}


@dataclasses.dataclass(frozen=True)
class Import:
    """An imported state dict, and the report of how it came about.

    Args:
        state_dict: with BatchNorm's five names in each norm layer.
        report: what was read and mended.
        complete: whether it holds all weights of the model, or only those of its norm layers.
    """

    state_dict: dict[str, Tensor]
    report: ImportReport
    complete: bool


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    peer: Peer
    norms: Sequence[Norm]
    tensors: Checkpoint  # all that goes into the output, those of the layers included
    left_out: tuple[str, ...] = ()
    ordered: bool = True


def import_checkpoint(
    path: str | os.PathLike[str],
    peer: str = AUTO,
    *,
    model: nn.Module | None = None,
    eps: float | None = None,
) -> Import:
    """Reads a checkpoint with the Batch Renorm layers of another package, which need not be installed.

    ``running_var`` becomes what makes ``sqrt(running_var + eps)`` the sigma by which the peer's evaluation
    divides; see :mod:`renormify.peers` for each of them. Where that sigma is below ``sqrt(eps)``, the weight
    carries the rest.

    Args:
        path: a state dict of ``torch.save`` or safetensors; an archive of Stable-Baselines3 (of which the
            policy is read); a ``.keras`` or ``.weights.h5`` file.
        peer: ``"torchrl"``, ``"sb3"``, ``"avalanche"``, ``"ludvb"``, ``"keras"``, or ``"auto"``: by the names
            of the tensors.
        model: the model that is to be loaded with it. It gives each layer's eps and, for Keras, its name; it
            is not changed. Without it, the report says which eps each layer must have.
        eps: that the peer's layers were built with, where it is not the package's default; no state dict
            tells it.

    Raises:
        CheckpointError: the file cannot be read, is not one of that peer, or lacks statistics, or they are no
            numbers.
        KeyMismatchError: the model has no such layers.
        InputError: an unknown peer, or an eps that is not positive.
        NothingToConvertError: there is no such layer in the file.
        MissingExtraError: h5py is not installed, for a file of Keras.
    """
    if peer != AUTO and peer not in PEERS:
        near = nearest(peer, [AUTO, *PEERS])
        raise InputError(f"no peer {peer!r}; expected {', '.join(PEERS)} or {AUTO}{near}")
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        raise InputError(f"eps must be positive (got {eps})")
    file = _read(Path(path), peer, model, eps)
    translated = {
        norm.name: translate(norm, file.peer, target)
        for norm, target in zip(file.norms, _targets(file, model), strict=True)
    }
    layers = tuple(layer for _, layer in translated.values())
    report = ImportReport(
        file.peer.name,
        file.peer.package,
        layers,
        kept=len(file.tensors) - sum(len(norm.tensors) for norm in file.norms),
        left_out=file.left_out,
        notes=(*(() if model is not None else _notes_on_eps(layers)), *_notes(file)),
    )
    return Import(_merge(file, translated), report, complete=file.peer.name != archives.KERAS)


def _merge(file: _File, translated: Mapping[str, tuple[dict[str, Tensor], LayerImport]]) -> dict[str, Tensor]:
    """The file's tensors in its order, each layer's replaced where the first of them stood."""
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    parts = {_key(norm.name, leaf): norm.name for norm in file.norms for leaf in norm.tensors}
    for key in (*file.tensors, *parts):  # a file of Keras has the parts alone
        if key not in parts:
            tensors[key] = file.tensors[key]
            continue
        state, layer = translated[parts[key]]
        tensors |= {_key(layer.target, leaf): value for leaf, value in state.items()}
    if file.tensors._metadata is not None:
        versions = {layer.target: {"version": _VERSION} for _, layer in translated.values()}
        tensors._metadata = {**file.tensors._metadata, **versions}  # type: ignore[attr-defined]
    return tensors


def _key(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _read(path: Path, peer: str, model: nn.Module | None, eps: float | None) -> _File:
    kind = archives.archive_kind(path)
    if kind == archives.KERAS:
        return _read_keras(path, peer, eps)
    try:
        checkpoint = archives.load_policy(path) if kind == archives.SB3 else load_checkpoint(path)
    except UnsafeCheckpointError as error:
        if peer not in (AUTO, "avalanche") or not archives.mentions(path, "avalanche.models.batch_renorm"):
            raise
        raise UnsafeCheckpointError(
            f"{path} holds a whole pickled model, which runs code on loading; nothing was loaded. "
            f"{PEERS['avalanche'].remedy('running_avg_std')}"
        ) from error
    if model is not None:
        checkpoint = cast(Checkpoint, fit_keys(model, checkpoint))
    return _divide(checkpoint, peer, eps)


def _read_keras(path: Path, peer: str, eps: float | None) -> _File:
    if peer not in (AUTO, archives.KERAS):
        raise CheckpointError(f"{path} is a file of Keras and not of {PEERS[peer].package}: use --from keras")
    norms, others, ordered = archives.read_keras(path, eps)
    if not norms:
        raise NothingToConvertError(f"nothing to import: {path} has no BatchNormalization with renorm=True")
    for norm in norms:
        check_norm(norm, PEERS[archives.KERAS], path)
    tensors = {_key(norm.name, leaf): value for norm in norms for leaf, value in norm.tensors.items()}
    return _File(
        path, PEERS[archives.KERAS], norms, Checkpoint(tensors, path=path), tuple(others), ordered=ordered
    )


def _divide(checkpoint: Checkpoint, peer: str, eps: float | None) -> _File:
    """Tells the peer's layers from everything else in a state dict."""
    path = checkpoint.path
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in checkpoint.items():
        if isinstance(value, Tensor):  # a module's extra state may be anything
            name, _, leaf = key.rpartition(".")
            modules[name][leaf] = value
    found: dict[str, list[str]] = defaultdict(list)
    for name, tensors in modules.items():
        version = _version(checkpoint, name)
        for candidate in PEERS.values():
            if candidate.recognises(tensors, version) or (
                # Without a record of versions, BatchNorm's names are whose the user says.
                candidate.name == peer == "torchrl" and version is None and tensors.keys() >= _BATCH_NORM
            ):
                found[candidate.name].append(name)
    batch_norms = [name for name, tensors in modules.items() if tensors.keys() >= _BATCH_NORM]
    kind = _only_peer(found, peer, path, batch_norms)
    norms = []
    for name in found[kind.name]:
        # What a subclass has besides is kept.
        own = {key: modules[name][key] for key in kind.keys if key in modules[name]}
        norms.append(Norm(name, own, kind.eps if eps is None else eps))
        check_norm(norms[-1], kind, path)
    return _File(path, kind, norms, checkpoint)


def _version(checkpoint: Checkpoint, name: str) -> int | None:
    record = (checkpoint._metadata or {}).get(name)
    return record.get("version") if isinstance(record, Mapping) else None


def _only_peer(found: Mapping[str, list[str]], peer: str, path: Path, batch_norms: list[str]) -> Peer:
    if len(found) > 1:
        kinds = " and ".join(f"of {PEERS[kind].package} ({shown(names[0])})" for kind, names in found.items())
        raise CheckpointError(
            f"{path} holds layers {kinds}; expected those of one: save each part of the model in a file of "
            "its own"
        )
    if found and peer in (AUTO, *found):
        return PEERS[next(iter(found))]
    if found:
        kind, names = next(iter(found.items()))
        raise CheckpointError(
            f"{path} holds no layers of {PEERS[peer].package}, but of {PEERS[kind].package} "
            f"({shown(names[0])}): use --from {kind}"
        )
    if batch_norms:
        raise NothingToConvertError(
            f"nothing to import: the norm layers in {path} ({shown(batch_norms[0])}) have BatchNorm's "
            "names, which renormify convert takes; torchrl's have the same: if they are, use --from torchrl"
        )
    raise NothingToConvertError(
        f"nothing to import: {path} holds no Batch Renorm layer of "
        + (PEERS[peer].package if peer in PEERS else ", ".join(known.package for known in PEERS.values()))
    )


def _targets(file: _File, model: nn.Module | None) -> list[Target]:
    """Where each layer goes."""
    if model is None:
        return [Target(norm.name, file.peer.best_eps(norm)) for norm in file.norms]
    own: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_var", None), Tensor)
        and isinstance(getattr(module, "eps", None), float)
    }
    names = [norm.name for norm in file.norms]
    strangers = [name for name in names if name not in own]
    if strangers and file.peer.name == archives.KERAS:
        names = _by_order(file, own)
    elif strangers:
        near = nearest(strangers[0], own)
        raise KeyMismatchError(f"the model has no norm layer {shown(strangers[0])} as {file.path} has{near}")
    for norm, name in zip(file.norms, names, strict=True):
        channels = len(file.peer.affine(norm).mean)
        if channels != len(own[name].running_var):
            raise KeyMismatchError(
                f"{shown(norm.name)} in {file.path} has {channels} channels, and {shown(name)} in the "
                f"model has {len(own[name].running_var)}"
            )
    return [Target(name, own[name].eps, frozenset(own[name].state_dict())) for name in names]


def _by_order(file: _File, own: Mapping[str, Any]) -> list[str]:
    """Pairs the layers one by one, where both sides have an order and as many channels."""
    theirs = [len(file.peer.affine(norm).mean) for norm in file.norms]
    ours = [len(module.running_var) for module in own.values()]
    if not file.ordered or theirs != ours:
        reason = (
            f"their channels are {theirs} in the file and {ours} in the model"
            if file.ordered
            else "a weights file does not tell their order (the .keras file does)"
        )
        raise KeyMismatchError(
            f"the norm layers in {file.path} ({', '.join(norm.name for norm in file.norms[:3])}) have other "
            f"names than the model's ({', '.join(list(own)[:3])}), and cannot be paired in order: {reason}"
        )
    return list(own)


def _notes_on_eps(layers: Sequence[LayerImport]) -> tuple[str, ...]:
    by_eps: dict[float, list[str]] = defaultdict(list)
    for layer in layers:
        by_eps[layer.eps].append(shown(layer.name))
    return tuple(
        f"{'all layers' if len(by_eps) == 1 else ', '.join(names)} must have eps={eps:g} to evaluate as in "
        "the file; with --model SOURCE they keep the model's own"
        for eps, names in by_eps.items()
    )


def _notes(file: _File) -> tuple[str, ...]:
    if file.peer.name == archives.KERAS:
        return (
            "only the norm layers are imported: load them with strict=False. Other weights have another "
            "layout in torch, where channels come first",
        )
    if file.peer.name == "avalanche":
        return ("num_batches_tracked is 0: Avalanche does not count",)
    return ()
