"""The class that a norm layer gets when it becomes Batch Renorm.

A layer of torch.nn gets the layer of ours. A class that somebody derived from one keeps all that it is, with
Batch Renorm put where BatchNorm stood among its ancestors::

    BatchNormAct2d -> BatchNorm2d -> _BatchNorm -> _NormBase -> Module
    BatchRenormAct2d -> BatchNormAct2d -> BatchRenorm2d -> _BatchRenorm -> _NormBase -> Module

So its methods stay, ``super()`` in them reaches Batch Renorm, and ``isinstance`` tells what it is: still a
BatchNormAct2d, but no longer a BatchNorm2d, which ``convert_sync_batchnorm`` would replace without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from renormify.functional import is_proxy
from renormify.interception import own_call_renormalised
from renormify.kernels import per_channel
from renormify.layers import (
    AnyBatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    Renormalised,
    kept_whole,
)
from renormify.sync import SyncBatchRenorm, Synchronised

__all__ = [
    "Thawed",
    "WithOwnForward",
    "class_of",
    "counterpart",
    "names_given",
    "set_class",
    "synchronised",
    "torch_base",
]

_LAYERS: dict[type[nn.Module], type[Renormalised]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: SyncBatchRenorm,
    _BatchNorm: AnyBatchRenorm,
}


def torch_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The BatchNorm class of torch.nn that a class is or derives from."""
    return next((base for base in cls.__mro__ if base in _LAYERS), None)


def counterpart(cls: type[nn.Module]) -> type[Renormalised]:
    """The Batch Renorm class for a class of norm layers: BatchNorm, derived from it, or frozen."""
    base = torch_base(cls)
    if base is None:
        return _derived(cls, Thawed)
    if issubclass(cls, _LazyNormBase):
        base = cls.cls_to_become or base
        return _derived(cls, _LAYERS[base])
    return _LAYERS[base] if cls is base else _derived(cls, _LAYERS[base])


def synchronised(cls: type[Renormalised]) -> type[Renormalised]:
    """The class that joins the batches of all processes, for one that does not."""
    if issubclass(cls, Synchronised):
        return cls
    if issubclass(cls, _Derived):
        base = _SynchronisedThawed if cls.base is Thawed else SyncBatchRenorm
        return _derived(cls.original, base)
    return SyncBatchRenorm


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a parametrized one, the class that it had before."""
    return nn.utils.parametrize.type_before_parametrizations(module)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module another class; the properties of a parametrized one move onto it."""
    if nn.utils.parametrize.is_parametrized(module):
        made = {"__dict__", "__weakref__", "__module__", "__doc__"}
        own = {name: value for name, value in vars(type(module)).items() if name not in made}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


class _WithoutBatchNorm(type):
    """Leaves BatchNorm out of the ancestors."""

    def mro(cls) -> list[type]:
        return [ancestor for ancestor in super().mro() if ancestor not in _LAYERS]


def _metaclass(original: type[type]) -> type[type]:
    """That of a class, such as ABCMeta, which leaves BatchNorm out too."""
    return _WithoutBatchNorm if original is type else type("_Meta", (_WithoutBatchNorm, original), {})


class _Derived(nn.Module):
    """A class of someone else's that was given Batch Renorm; made at run time, so pickled by what made it."""

    original: type[nn.Module]
    base: type[Renormalised]
    running_mean: Tensor
    running_var: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the class from what the original does with classes that its author derives."""

    @contextmanager
    def _statistics_as_the_weight(self) -> Iterator[None]:
        """For code of the class's own, whose kernels want alike what ``.half()`` leaves in float32."""
        kept, weight = (self.running_mean, self.running_var), getattr(self, "weight", None)
        if weight is None or weight.dtype.itemsize >= kept[0].dtype.itemsize:
            yield
            return
        self.running_mean, self.running_var = (statistics.to(weight.dtype) for statistics in kept)
        try:
            yield
        finally:
            self.running_mean, self.running_var = kept

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _new, (self.original, self.base), *state


def names_given(cls: type[nn.Module]) -> set[str]:
    """The names that a module of a class gets, where something of its own must not be in the way."""
    base = torch_base(cls) or nn.Module
    layer = _LAYERS.get(base, Thawed)
    overridable = {*dir(base), "forward", *vars(_Derived)}
    given = {name for name in dir(layer) if not name.startswith("__")} - overridable
    return given | {*_ATTRIBUTES[issubclass(layer, Thawed)], "original", "base"}


_OF_A_LAYER = (
    "r_max",
    "d_max",
    "stat",
    "_r_max",
    "_d_max",
    "_rejected",
    "_limits",
    "_warned",
    "converted_from",
)
_ATTRIBUTES = {False: (*_OF_A_LAYER, "calls_itself"), True: (*_OF_A_LAYER, "lent", "order")}

_made: dict[tuple[type[nn.Module], type[Renormalised]], type[Renormalised]] = {}


def _derived(original: type[nn.Module], base: type[Renormalised]) -> type[Renormalised]:
    """The class made of the two; the same one each time."""
    if (original, base) not in _made:
        own: dict[str, Any] = {"original": original, "base": base}
        own |= {"__doc__": original.__doc__, "__module__": original.__module__}
        bases: tuple[type, ...] = (WithOwnForward, original, base)
        if issubclass(base, Thawed):
            bases = (base, original)
        elif issubclass(original, _LazyNormBase):  # it becomes another class in the midst of its first call
            bases, own["cls_to_become"] = (_Derived, original, base), base
        name = original.__name__.replace("BatchNorm", "BatchRenorm")
        _made[original, base] = cast("type[Renormalised]", _metaclass(type(original))(name, bases, own))
    return _made[original, base]


def _new(original: type[nn.Module], base: type[Renormalised]) -> Renormalised:
    cls = _derived(original, base)
    return cls.__new__(cls)


class WithOwnForward(_Derived):
    """A derived class with a forward of its own.

    Attributes:
        calls_itself: whether that calls batch_norm; else it leaves the normalising to super(), which is Batch
            Renorm.
    """

    calls_itself = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class has it, with its call of batch_norm renormalised."""
        if is_proxy(*args, *kwargs.values()):
            return kept_whole(self, *args, **kwargs)
        if not self.calls_itself:
            return super().forward(*args, **kwargs)
        if self.training:
            return self._trained(*args, **kwargs)
        with self._statistics_as_the_weight():
            return super().forward(*args, **kwargs)

    def _trained(self, *args: Any, **kwargs: Any) -> Any:
        """In training. Calls of its own count the batches, whatever the forward makes of the count."""
        count = self._buffers.get("num_batches_tracked")
        counted = None if count is None else count.clone()
        calls = own_call_renormalised(cast("Renormalised", self), counted)
        try:
            with calls:
                return super().forward(*args, **kwargs)
        finally:
            if calls.any and count is not None and counted is not None:
                count.copy_(counted)
                if self._buffers["num_batches_tracked"] is not count:
                    self._buffers["num_batches_tracked"] = count


class Thawed(_Derived, Renormalised):
    r"""A frozen BatchNorm, whatever its arithmetic, that follows its batches in training.

    Its forward is an affine by the running statistics, :math:`f(u) = \gamma (u - \mu) / \sigma + \beta`. Of
    :math:`u = z \sigma + \mu`, where z is the renormalised batch, it makes :math:`\gamma z + \beta`.
    """

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As the class has it, of one tensor under the name that it has there; in training renormalised."""
        if is_proxy(*args, *kwargs.values()):
            return kept_whole(self, *args, **kwargs)
        (input,) = (*args, *kwargs.values())
        z = self.renormalise(input, None, None) if self.training else None
        with self._statistics_as_the_weight():
            if z is not None:
                mean, std = self.running_mean, (self.running_var + self.eps).sqrt()
                input = torch.addcmul(per_channel(mean, input), z, per_channel(std, input)).to(input.dtype)
            output: Tensor = super().forward(input)
        return output

    def thaw(self, momentum: float | None) -> None:
        """Makes parameters of weight and bias, and lends what a frozen layer lacks."""
        order = tuple(self._buffers)
        for name in ("weight", "bias"):
            constant = self._buffers.pop(name, None)
            if constant is not None:
                self.register_parameter(name, nn.Parameter(constant))
        lent = {"momentum": momentum} | ({} if hasattr(self, "eps") else {"eps": 1e-5})
        vars(self).update(lent, lent=tuple(lent), order=order)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """In the order that it was in, which has no parameters before the buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in [prefix + name for name in vars(self)["order"]]:
            if key in destination:
                destination[key] = destination.pop(key)

    def freeze(self) -> None:
        """Undoes :meth:`thaw`."""
        order = vars(self)["order"]
        for name in (*vars(self)["lent"], "lent", "order"):
            del vars(self)[name]
        for name in ("weight", "bias"):
            weight = self._parameters.pop(name, None)
            if weight is not None:
                self.register_buffer(name, weight.detach())
        for name in order:
            if name in self._buffers:
                self._buffers[name] = self._buffers.pop(name)


class _SynchronisedThawed(Synchronised, Thawed):
    pass
