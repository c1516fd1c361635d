"""From a layer of another package to BatchNorm's state: the same evaluation, and how nearly the same."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from renormify.errors import CheckpointError, KeyMismatchError

__all__ = ["Affine", "LayerImport", "Mend", "Norm", "Peer", "Target", "check_norm", "shown", "translate"]

# Roundings that F.batch_norm may make between its result and the exact one.
_ROUNDINGS = 8


@dataclasses.dataclass(frozen=True)
class Norm:
    """One layer of a peer, as its file holds it.

    Args:
        name: its path.
        tensors: by the peer's own names.
        eps: that the layer was built with; most files do not say.
        settings: what the file tells of the layer besides.
    """

    name: str
    tensors: Mapping[str, Tensor]
    eps: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def vector(self, key: str) -> Tensor:
        """A tensor of one value for each channel, in float64: shape (C,)."""
        return self.tensors[key].detach().to(torch.float64).reshape(-1)

    def optional(self, key: str) -> Tensor | None:
        """The same, or None where the layer has no such tensor."""
        return self.vector(key) if key in self.tensors else None


@dataclasses.dataclass(frozen=True)
class Affine:
    """What a layer computes in evaluation: ``weight * (x - mean) / sqrt(var + eps) + bias``.

    Args:
        mean: in float64 as all of them, shape (C,).
        var: whatever, with ``eps``, is sigma squared.
        eps: 0 where the peer keeps sigma itself.
        weight: None where the layer has none.
        bias: None where the layer has none.
        count: of the steps that it was trained for, or None where the file does not tell.
    """

    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    count: int | None

    @property
    def sigma(self) -> Tensor:
        """By which evaluation divides; NaN where it is no number."""
        return (self.var + self.eps).sqrt()


@dataclasses.dataclass(frozen=True)
class Mend:
    """One thing that is otherwise now than in the peer.

    Args:
        where: ``"training"``, ``"evaluation"``, ``"file"``, ``"settings"`` or ``"use"``.
        fault: what the peer does, or what would have come of it.
        now: what is done instead.
        effect: how large the fault is in this layer, or None where the file cannot tell.
        measure: what ``effect`` is.
    """

    where: str
    fault: str
    now: str
    effect: float | None = None
    measure: str | None = None


class Peer(abc.ABC):
    """A kind of Batch Renorm layer.

    Attributes:
        name: as ``--from`` takes it.
        package: as people know it.
        keys: the tensors that every layer has.
        marks: those of them by which it is recognised; no other layer has a tensor of that name.
        eps: the package's default.
        counter: the tensor that counts steps, or None.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    marks: ClassVar[tuple[str, ...]]
    eps: ClassVar[float]
    counter: ClassVar[str | None] = None

    def recognises(self, tensors: Mapping[str, Tensor], version: int | None) -> bool:
        """Whether the tensors of one module look like a layer of this kind.

        ``version`` is what torch has recorded of the module, if the file has kept it.
        """
        return any(mark in tensors for mark in self.marks)

    @abc.abstractmethod
    def affine(self, norm: Norm) -> Affine:
        """What a layer computes in evaluation."""

    @abc.abstractmethod
    def mends(self, norm: Norm) -> tuple[Mend, ...]:
        """What was wrong with a layer, worst first."""

    def best_eps(self, norm: Norm) -> float:
        """The eps for the layer of ours, where nothing else decides it."""
        return norm.eps

    def remedy(self, key: str) -> str:
        """What to do where a tensor is missing or not finite, as the end of an error message."""
        return "train on, or save it again from a sound model"


@dataclasses.dataclass(frozen=True)
class Target:
    """The layer that is to have the state.

    Args:
        name: its path.
        eps: its own.
        keys: of its state dict, or None where there is no model to tell.
    """

    name: str
    eps: float
    keys: frozenset[str] | None = None


@dataclasses.dataclass(frozen=True)
class LayerImport:
    """What became of one norm layer.

    Args:
        name: its path in the file.
        target: its path in the output.
        channels: how many it has.
        eps: that the layer of ours must have for the same evaluation.
        count: of training steps, or None where the file does not tell.
        read: the tensors that it was read from.
        difference: the largest between their evaluation, in float64, and ours from the state as it is
            written, at points within three sigma of each channel's mean.
        tolerance_used: the same as a share of what rounding explains; above 1 it is another function.
        mended: what is otherwise now.
    """

    name: str
    target: str
    channels: int
    eps: float
    count: int | None
    read: tuple[str, ...]
    difference: float
    tolerance_used: float
    mended: tuple[Mend, ...]


def shown(name: str) -> str:
    """A layer's path, for people."""
    return name or "the model itself"


def check_norm(norm: Norm, peer: Peer, path: Path) -> None:
    """Refuses a layer whose evaluation is not defined.

    Raises:
        CheckpointError: tensors are missing, not finite, or not one number for each channel, or sigma is not
            positive.
    """
    where = f"{shown(norm.name)} in {path}"
    if missing := [key for key in peer.keys if key not in norm.tensors]:
        raise CheckpointError(f"{where} has no {' and no '.join(missing)}: {peer.remedy(missing[0])}")
    vectors = [value for key, value in norm.tensors.items() if key != peer.counter]
    sound = all(value.is_floating_point() and value.layout == torch.strided for value in vectors)
    counted = peer.counter is None or norm.tensors[peer.counter].numel() == 1
    if not sound or not counted or len({value.numel() for value in vectors}) != 1:
        told = ", ".join(f"{key} {tuple(value.shape)}" for key, value in norm.tensors.items())
        raise CheckpointError(f"{where} is damaged: expected one number for each channel (got {told})")
    for key, value in norm.tensors.items():
        if count := int((~torch.isfinite(value)).sum()):
            raise CheckpointError(
                f"{where} holds inf or NaN in {count} of {value.numel()} values of {key}: {peer.remedy(key)}"
            )
    if count := int((~(peer.affine(norm).sigma > 0)).sum()):
        raise CheckpointError(
            f"{where} has no positive sigma in {count} channels, where its evaluation divides by zero or has "
            "no root: train it first"
        )


def translate(norm: Norm, peer: Peer, target: Target) -> tuple[dict[str, Tensor], LayerImport]:
    """BatchNorm's state for the evaluation of a peer's layer, and the report of it.

    ``running_var`` = sigma^2 - eps, but not below 0: where sigma is below sqrt(eps), (x - mu) is divided by
    sqrt(eps) instead, and the weight times sqrt(eps) / sigma makes up for it.

    Raises:
        KeyMismatchError: the target has no weight, or no bias, and the layer needs one.
    """
    theirs = peer.affine(norm)
    # The difference of two eps first: where they are the same, no digit of var is lost.
    variance = theirs.var + (theirs.eps - target.eps)
    scale = torch.where(variance < 0, math.sqrt(target.eps) / theirs.sigma, 1.0)
    weight, bias = _affine(theirs, scale, target)
    # At least float32: half precision would round what is subtracted.
    dtypes = (value.dtype for value in norm.tensors.values() if value.is_floating_point())
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": theirs.mean,
        "running_var": variance.clamp(min=0),
    }
    state = {key: value.to(dtype) for key, value in vectors.items() if value is not None}
    if target.keys is not None and (unexpected := state.keys() - target.keys):
        raise KeyMismatchError(
            f"{shown(target.name)} has no {' and no '.join(sorted(unexpected))}, which it needs to evaluate "
            f"as {shown(norm.name)} in the file (a sigma below sqrt(eps) takes a weight): build it with "
            "affine=True"
        )
    if target.keys is None or "num_batches_tracked" in target.keys:
        state["num_batches_tracked"] = torch.tensor(theirs.count or 0)
    mended = peer.mends(norm)
    if bool((variance < 0).any()):
        mended += (_absorbed(scale, target.eps),)
    difference, used = _measure(theirs, state, target.eps)
    layer = LayerImport(
        norm.name,
        target.name,
        len(theirs.mean),
        target.eps,
        theirs.count,
        tuple(norm.tensors),
        difference,
        used,
        mended,
    )
    return state, layer


def _affine(theirs: Affine, scale: Tensor, target: Target) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, made up where the layer has none and its place in BatchNorm's state wants one."""
    weight, bias = theirs.weight, theirs.bias
    carries = bool((scale != 1).any())
    if weight is None and (carries or bias is not None or "weight" in (target.keys or ())):
        weight = torch.ones_like(theirs.mean)
    if bias is None and weight is not None and (target.keys is None or "bias" in target.keys):
        bias = torch.zeros_like(theirs.mean)
    return (weight * scale if carries and weight is not None else weight), bias


def _absorbed(scale: Tensor, eps: float) -> Mend:
    count = int((scale != 1).sum())
    return Mend(
        "evaluation",
        f"sigma is below sqrt(eps), for eps={eps:g}, which BatchNorm cannot hold",
        f"running_var is 0 there, in {count} of {len(scale)} channels, and the weight carries the rest",
        float(scale.max()) - 1,
        "by how much the weight became larger",
    )


def _measure(theirs: Affine, state: Mapping[str, Tensor], eps: float) -> tuple[float, float]:
    """The largest difference in evaluation, and the same as a share of what rounding explains."""
    steps = torch.tensor([[-3.0], [-1.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    input = (theirs.mean + steps * theirs.sigma).to(state["running_mean"].dtype)
    ours = F.batch_norm(
        input, state["running_mean"], state["running_var"], state.get("weight"), state.get("bias"), eps=eps
    )
    x = input.double()
    slope = (1.0 if theirs.weight is None else theirs.weight) / theirs.sigma
    offset = torch.zeros_like(slope) if theirs.bias is None else theirs.bias
    difference = (ours.double() - ((x - theirs.mean) * slope + offset)).abs()
    # The kernel computes x * slope + (offset - mean * slope), each term with a rounding of its own.
    finfo = torch.finfo(input.dtype)
    noise = finfo.eps * ((x.abs() + theirs.mean.abs()) * slope.abs() + offset.abs())
    share = difference / (_ROUNDINGS * noise.clamp(min=finfo.tiny))
    return float(difference.max()), float(share.max())
