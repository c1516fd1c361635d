"""What becomes of each kind of norm layer, or why nothing does.

A layer is converted by giving the very same object another class: it stays where it is in the tree and in
every list, closure and optimizer that refers to it, with its parameters, buffers, hooks, name and training
flag. What Batch Renorm has beyond BatchNorm's state is added to it, and taken away by :func:`revert_layer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from renormify.errors import InputError
from renormify.functional import STATS
from renormify.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, is_batch_renorm
from renormify.sites import Site
from renormify.sync import SyncBatchRenorm

__all__ = ["Momentum", "Settings", "convert_layer", "refusal", "revert_layer"]

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
        if not self.r_max >= 1:
            raise InputError(f"r_max must be at least 1 (got {self.r_max})")
        if not self.d_max >= 0:
            raise InputError(f"d_max must be at least 0 (got {self.d_max})")
        if self.stat not in STATS:
            raise InputError(f"stat must be one of {', '.join(STATS)} (got {self.stat!r})")
        momentum = self.momentum
        if isinstance(momentum, str):
            if momentum != "keep":
                raise InputError(f"momentum must be a number, None or 'keep' (got {momentum!r})")
        elif momentum is not None and not 0 <= momentum <= 1:
            raise InputError(f"momentum must be between 0 and 1, None or 'keep' (got {momentum})")


_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: SyncBatchRenorm,
}

# A subclass that defines no more than these computes what its base computes.
_INERT = frozenset({
    "__annotations__", "__dict__", "__doc__", "__firstlineno__", "__init__", "__module__", "__parameters__",
    "__qualname__", "__repr__", "__static_attributes__", "__weakref__", "extra_repr", "reset_parameters",
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
    own = {name for cls in lineage[: lineage.index(base)] for name in vars(cls)} - _INERT
    if "forward" in own:
        return f"{type(module).__name__} has a forward of its own, which conversion would lose"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized; remove its parametrizations first"
    if own:
        names = ", ".join(sorted(own))
        return f"{type(module).__name__} defines {names}, which conversion would lose"
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
    layer.converted_from = (type(module), layer.momentum)
    layer.__class__ = _COUNTERPARTS[base]
    layer.init_renorm(settings.r_max, settings.d_max, settings.stat)
    if settings.momentum != "keep":
        layer.momentum = settings.momentum


def revert_layer(module: nn.Module) -> None:
    """Turns a Batch Renorm layer into the BatchNorm it was, or into that of torch.nn, in place.

    The momentum is that of the BatchNorm it was converted from; a layer that was never one keeps its own.
    """
    layer: Any = module
    counterpart = next(bn for bn, renorm in _COUNTERPARTS.items() if isinstance(module, renorm))
    original, momentum = getattr(layer, "converted_from", (counterpart, layer.momentum))
    layer.end_renorm()
    layer.__dict__.pop("converted_from", None)
    layer.__class__ = original
    layer.momentum = momentum
    if not issubclass(original, nn.SyncBatchNorm):
        layer.__dict__.pop("process_group", None)
