"""What becomes of each kind of norm layer, or why nothing does.

A layer is converted by giving the very same object another class: it stays where it is in the tree and in
every list, closure and optimizer that refers to it, with its parameters, buffers, hooks, name and training
flag. What Batch Renorm has beyond BatchNorm's state is added to it, and taken away by :func:`revert_layer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from renormify.errors import InputError, UnsupportedModelError
from renormify.functional import STATS
from renormify.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, is_batch_renorm
from renormify.sites import Site
from renormify.sync import SyncBatchRenorm

__all__ = ["Momentum", "Settings", "convert_layer", "original_of", "refusal", "revert_layer"]

Momentum = float | None | Literal["keep"]


@dataclass(frozen=True)
class Settings:
    """How converted layers train; see :func:`renormify.convert` for the fields.

    Raises:
        InputError: for one out of range.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    momentum: Momentum = 0.01
    stat: str = "sigma"

    def __post_init__(self) -> None:
        if not _at_least(self.r_max, 1):
            raise InputError(f"r_max must be a number of at least 1 (got {self.r_max!r})")
        if not _at_least(self.d_max, 0):
            raise InputError(f"d_max must be a number of at least 0 (got {self.d_max!r})")
        if self.stat not in STATS:
            raise InputError(f"stat must be one of {', '.join(STATS)} (got {self.stat!r})")
        momentum = self.momentum
        if momentum is not None and momentum != "keep" and not (_at_least(momentum, 0) and momentum <= 1):
            raise InputError(f"momentum must be a number from 0 to 1, None or 'keep' (got {momentum!r})")


def _at_least(value: object, least: float) -> bool:
    return isinstance(value, Real) and float(value) >= least


_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: SyncBatchRenorm,
}

# What a subclass may define and still compute, and be to its users, what its base is. Other special names
# matter where they are among the active ones.
_INERT = frozenset({"extra_repr", "reset_parameters", "_abc_impl"})
_ACTIVE = frozenset({
    "__call__", "__deepcopy__", "__getattr__", "__getattribute__", "__getstate__", "__reduce__",
    "__reduce_ex__", "__setattr__", "__setstate__",
})  # fmt: skip


def _torch_base(module: nn.Module) -> type[nn.Module] | None:
    """The BatchNorm class of torch.nn that the module's class is or derives from."""
    return next((base for base in type(module).__mro__ if base in _COUNTERPARTS), None)


def refusal(site: Site, include_frozen: bool = False) -> str | None:
    """Why a site cannot be converted, as a phrase with what to do where something can be done; or None."""
    module = site.module
    if site.is_call:
        return "a functional call in this module's forward; make it an nn.BatchNorm module to convert it"
    if is_batch_renorm(module):
        return "is Batch Renorm already"
    if isinstance(module, _LazyNormBase):
        return "lazy and not initialised; run one forward first"
    if not isinstance(module, _BatchNorm):
        return _refusal_of_stranger(site, include_frozen)
    base = _torch_base(module)
    if base is None:
        return f"{site.kind} is of unknown dimensions: derive it from BatchNorm1d, BatchNorm2d or BatchNorm3d"
    return _refusal_of_class(module, base) or _refusal_of_state(module)


def _refusal_of_stranger(site: Site, include_frozen: bool) -> str:
    if "frozen" not in site.kind.lower():
        return f"{site.kind} does not derive from a BatchNorm of torch.nn"
    if include_frozen:
        return f"{site.kind} is frozen and does not derive from a BatchNorm of torch.nn"
    return "frozen: its statistics and affine are constants"


def _refusal_of_class(module: nn.Module, base: type[nn.Module]) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    lineage = type(module).__mro__
    names = {name for cls in lineage[: lineage.index(base)] for name in vars(cls)} - _INERT
    own = {name for name in names if name in _ACTIVE or not name.startswith("__")}
    if "forward" in own:
        return f"{type(module).__name__} has a forward of its own, which conversion would lose"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized; remove its parametrizations first"
    if own:
        return f"{type(module).__name__} defines {', '.join(sorted(own))}, which conversion would lose"
    return None


def _refusal_of_state(module: Any) -> str | None:
    if module.running_mean is None or module.running_var is None or not module.track_running_stats:
        return "has no running statistics, which r and d are relative to; set track_running_stats=True"
    if module.num_batches_tracked is None:
        return "has no num_batches_tracked; its state is not BatchNorm's"
    return None


def convert_layer(module: nn.Module, settings: Settings) -> None:
    """Turns a BatchNorm that :func:`refusal` lets pass into Batch Renorm, in place."""
    base = _torch_base(module)
    assert base is not None, "refusal() lets only classes of torch.nn pass"
    layer: Any = module
    layer.converted_from = (type(module), layer.momentum, layer.running_mean.dtype)
    layer.__class__ = _COUNTERPARTS[base]
    layer.init_renorm(settings.r_max, settings.d_max, settings.stat)
    if settings.momentum != "keep":
        layer.momentum = settings.momentum


def original_of(layer: Any) -> tuple[type[nn.Module], float | None, torch.dtype]:
    """The class that a Batch Renorm layer had, its momentum, and the dtype of its statistics.

    Of a layer that was never a BatchNorm: the class of torch.nn that corresponds, and what it has now.

    Raises:
        UnsupportedModelError: for a class that derives from a layer of ours.
    """
    counterpart = next((bn for bn, renorm in _COUNTERPARTS.items() if type(layer) is renorm), None)
    if counterpart is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} derives from a Batch Renorm layer; no BatchNorm corresponds to it"
        )
    dtype = layer.running_mean.dtype if layer.weight is None else layer.weight.dtype
    return getattr(layer, "converted_from", (counterpart, layer.momentum, dtype))


def revert_layer(module: nn.Module) -> None:
    """Turns a Batch Renorm layer into what :func:`original_of` tells, in place."""
    layer: Any = module
    original, momentum, dtype = original_of(layer)
    if dtype.itemsize < layer.running_mean.dtype.itemsize == 4:  # raised to float32 by training, or by a cast
        layer.running_mean, layer.running_var = layer.running_mean.to(dtype), layer.running_var.to(dtype)
    layer.end_renorm()
    layer.__dict__.pop("converted_from", None)
    layer.__class__ = original
    layer.momentum = momentum
    if not issubclass(original, nn.SyncBatchNorm):
        layer.__dict__.pop("process_group", None)
