"""A forward that calls batch_norm on running statistics, run so that in training it is Batch Renorm.

The forward is its author's Python, whatever it does; torch hands every function that it calls to a
:class:`_Interception`, which takes the calls of batch_norm and lets the others pass. In evaluation nothing
stands between.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import CodeType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from renormify.calls import NORM_FUNCTIONS, arguments_of, gives_statistics, number_of_results
from renormify.errors import UnsupportedModelError
from renormify.functional import batch_renorm, is_proxy
from renormify.layers import Renormalised
from renormify.settings import Momentum
from renormify.tracing import hooks_on_what_is_saved

__all__ = ["CallsRenormalised", "TrainingForward", "is_rewritten", "own_call_renormalised"]

Arguments = Mapping[str, Any]
"""Of a call, by their names in :func:`torch.nn.functional.batch_norm`."""


class _Renormalises(Protocol):
    """What becomes of a call: the way to its output of Batch Renorm, or None where it stays what it is."""

    def __call__(self, call: Arguments, /) -> Callable[[], Tensor] | None: ...


class _Interception(TorchFunctionMode):
    """Hands calls of batch_norm to ``renormalise``, in the forward of ``owner``.

    ``any`` tells whether one was taken.
    """

    def __init__(self, owner: nn.Module, renormalise: _Renormalises) -> None:
        super().__init__()
        self.any = False
        self.owner, self.renormalise = owner, renormalise
        self.gradients = torch.is_grad_enabled()
        self.hooks = None if torch.compiler.is_compiling() else hooks_on_what_is_saved()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = func in NORM_FUNCTIONS
        renormalised = self.renormalise(arguments_of(func, args, kwargs)) if taken else None
        if renormalised is None:
            return func(*args, **kwargs)
        self._refuse_checkpoint()
        self.any = True
        alone = number_of_results(func) == 1
        return renormalised() if alone else _with_statistics(func, args, kwargs, renormalised)

    def _refuse_checkpoint(self) -> None:
        """Its second run would come when the forward is over, and nobody listens."""
        if torch.compiler.is_compiling():
            return
        switched_off = self.gradients and not torch.is_grad_enabled()
        if switched_off or hooks_on_what_is_saved() is not self.hooks:
            raise UnsupportedModelError(
                f"the forward of {type(self.owner).__name__} checkpoints its call of batch_norm, or switches "
                "gradients off for it; checkpoint the module itself, or make it call a layer"
            )


def _with_statistics(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], renormalised: Callable[[], Tensor]
) -> Any:
    """What an operator of several results gives, with another output; it moves copies of the statistics."""
    call = arguments_of(func, args, kwargs)
    statistics = call["running_mean"], call["running_var"]
    copies = {id(value): _as_the_kernel_wants(value, call["weight"]) for value in statistics}
    args = tuple(copies.get(id(value), value) for value in args)
    kwargs = {name: copies.get(id(value), value) for name, value in kwargs.items()}
    results = func(*args, **kwargs)
    others = [results[index] for index in range(1, number_of_results(func))]  # a proxy cannot be unpacked
    output = renormalised()  # moves the statistics, so after all that may fail
    if gives_statistics(func):  # as they move, for the caller to keep; they have moved
        others[-2:] = statistics
    return output, *others


def _as_the_kernel_wants(statistics: Tensor, weight: Tensor | None) -> Tensor:
    """A copy, in half precision beside a weight in half precision."""
    if weight is None or is_proxy(statistics, weight) or weight.dtype.itemsize >= statistics.dtype.itemsize:
        return statistics.clone()
    return statistics.to(weight.dtype)


def _renormalised(call: Arguments, momentum: float | None, **settings: Any) -> Callable[[], Tensor]:
    """What :func:`batch_renorm` makes of a call, on the statistics that it names."""
    return functools.partial(
        batch_renorm,
        call["input"],
        call["running_mean"],
        call["running_var"],
        call["weight"],
        call["bias"],
        True,
        momentum,
        call["eps"],
        **settings,
    )


def own_call_renormalised(layer: Renormalised, count: Tensor | None) -> _Interception:
    """Within this, a norm layer's calls on its own statistics are Batch Renorm.

    Args:
        layer: whose forward makes them.
        count: an int64 scalar, increased by each call that moves ``running_mean``.
    """

    def renormalise(call: Arguments) -> Callable[[], Tensor] | None:
        mean, var = call["running_mean"], call["running_var"]
        if not call["training"] or mean is None:
            return None
        if mean is layer.running_mean and var is layer.running_var:
            affine = call["weight"], call["bias"]
            return functools.partial(
                layer.renormalise, call["input"], *affine, eps=call["eps"], num_batches_tracked=count
            )
        if not any(mean is buffer for buffer in layer._buffers.values()):
            return None
        momentum = call["momentum"] if layer.momentum is None else layer.momentum
        return _renormalised(call, momentum, **layer.limits(), stat=layer.stat)  # for a domain of its own

    layer.keep_statistics_in_float32()
    return _Interception(layer, renormalise)


@dataclass(frozen=True)
class CallsRenormalised:
    """What becomes of the calls in the forward of a module that is no norm layer.

    Its limits are read from the module's attributes ``r_max`` and ``d_max``.

    Attributes:
        momentum: see :class:`renormify.settings.Settings`.
        stat: likewise.
        include_frozen: likewise.
        chosen: the running means of the calls to rewrite, as paths in the module or names of arguments.
        left: those of calls that stay; on any further buffer of the module's own they are rewritten too.
    """

    momentum: Momentum
    stat: str
    include_frozen: bool
    chosen: tuple[str, ...]
    left: frozenset[str]

    def __call__(self, module: Any, given: Arguments, call: Arguments) -> Callable[[], Tensor] | None:
        """The way to the output of a call in training, or None where it stays.

        Args:
            module: whose forward makes it.
            given: the arguments of that forward.
            call: those of the call.
        """
        if not (call["training"] or self.include_frozen) or not self._takes(module, given, call):
            return None
        momentum = call["momentum"] if self.momentum == "keep" else self.momentum
        return _renormalised(call, momentum, r_max=module.r_max, d_max=module.d_max, stat=self.stat)

    def _takes(self, module: nn.Module, given: Arguments, call: Arguments) -> bool:
        mean = call["running_mean"]
        if mean is None:
            return False
        for name, buffer in module._buffers.items():
            if buffer is mean:
                return name not in self.left
        return any(mean is _found(module, given, name) for name in self.chosen)


def _found(module: nn.Module, given: Arguments, name: str) -> Any:
    """An argument of a forward, or what lies under a path in the module; None where that is no more."""
    if name in given:
        return given[name]
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None


class TrainingForward:
    """The forward of a class, whose calls of batch_norm are Batch Renorm while the module trains.

    To others it looks like the forward itself: a function, of the module and its arguments.

    Args:
        kind: the class.
        calls: what becomes of each call.
    """

    def __init__(self, kind: type[nn.Module], calls: CallsRenormalised) -> None:
        self.kind, self.calls = kind, calls
        self.arguments = tuple(inspect.signature(kind.forward).parameters)[1:]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.kind.forward)

    @property
    def __code__(self) -> CodeType:
        function: Any = inspect.unwrap(self.kind.forward)
        return cast("CodeType", function.__code__)

    def __call__(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The output of the forward, in training with its calls renormalised."""
        if not module.training:
            return self.kind.forward(module, *args, **kwargs)
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        with _Interception(module, lambda call: self.calls(module, given, call)):
            return self.kind.forward(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingForward:
        return self  # it holds nothing of the module that it is called with


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module's forward is one of these."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and isinstance(forward.func, TrainingForward)
