"""What a norm layer gets to see: the layers, the batches of a user, and the values of each channel."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from renormify.errors import (
    InputError,
    NothingToConvertError,
    RenormifyWarning,
    UnsupportedModelError,
    one_line,
)
from renormify.functions import calls_renorm
from renormify.kernels import positions
from renormify.layers import Renormalised, is_batch_renorm
from renormify.rewriting import Filter
from renormify.sites import Site, find_sites
from renormify.tracing import class_name, is_norm

__all__ = [
    "Call",
    "Inputs",
    "Moments",
    "SeenEnoughError",
    "calls_of",
    "copied",
    "eager",
    "moments_of",
    "norm_layers",
    "replayable",
    "run",
    "unserved",
    "warn_of_unserved",
    "watched",
]


_MOST = 1 << 22  # values that are in float64 at a time


class Call(NamedTuple):
    """The arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Moments(NamedTuple):
    """Of each channel's values: how many, their mean, and the sum of their squared deviations from it.

    The number is the same for every channel; the others are :math:`(C)` in float64.
    """

    number: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls) -> Moments:
        """Those of no value at all."""
        return cls(0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    def joined(self, other: Moments) -> Moments:
        """Those of both sets of values together (Chan, Golub and LeVeque, 1979)."""
        if self.number == 0 or other.number == 0:
            return other if self.number == 0 else self
        number = self.number + other.number
        step = other.mean - self.mean
        share = other.number / number
        return Moments(
            number,
            self.mean + step * share,
            self.squares + other.squares + step.square() * (self.number * share),
        )

    def variance(self, *, unbiased: bool) -> Tensor:
        """The variance of each channel; zero of a single value."""
        return self.squares / max(self.number - unbiased, 1)


def eager(model: nn.Module) -> nn.Module:
    """The model itself, where it is a compiled one: hooks run in it, and its layers have their own names."""
    return getattr(model, "_orig_mod", model)


def norm_layers(
    model: nn.Module, filter_fn: Filter | None = None, purpose: str = "to look at"
) -> dict[str, Any]:
    """The layers of a model that have running statistics, by their paths, in the order of its module tree.

    Layers whose class is frozen, which hold constants, are none of them.

    Args:
        model: any module.
        filter_fn: ``filter_fn(module, name) -> bool`` says which layers are meant; by default all.
        purpose: of looking for them, as the end of the error's first phrase.

    Raises:
        UnsupportedModelError: it is not a module.
        InputError: the filter is not a function.
        NothingToConvertError: there is none, or the filter takes none.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected an nn.Module (got {type(model).__name__})")
    if filter_fn is not None and not callable(filter_fn):
        raise InputError(f"filter_fn must be a function of a module and its name (got {filter_fn!r:.80})")
    layers = {
        name: module
        for name, module in eager(model).named_modules()
        if _is_served(module) and _has_statistics(module)
    }
    if not layers:
        if sites := unserved(model):
            raise NothingToConvertError(
                f"found no norm layer {purpose} in {class_name(model)}, but {_listed(sites)}"
            )
        raise NothingToConvertError(
            f"found no BatchNorm or Batch Renorm layer with running statistics in {class_name(model)} "
            f"{purpose}"
        )
    chosen = {name: layer for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)}
    if not chosen:
        raise NothingToConvertError(
            f"filter_fn takes none of the {len(layers)} norm layers of {class_name(model)} {purpose}; "
            f"the first is {next(iter(layers))!r}"
        )
    return chosen


def _is_served(module: nn.Module) -> bool:
    return is_norm(module) and isinstance(module, (_NormBase, Renormalised))


def unserved(model: nn.Module, filter_fn: Filter | None = None) -> dict[str, str]:
    """The sites that follow their batches with no layer of :func:`norm_layers`, by name, with the reason.

    Args:
        model: any module.
        filter_fn: as for :func:`norm_layers`.
    """
    model = eager(model)
    found = {site.name: (site.module, _reason(site)) for site in find_sites(model) if _is_unserved(site)}
    for name, module in model.named_modules():
        if calls_renorm(module):
            found.setdefault(name, (module, _CALL))
    return {
        name: reason
        for name, (module, reason) in found.items()
        if filter_fn is None or filter_fn(module, name)
    }


def warn_of_unserved(model: nn.Module, filter_fn: Filter | None, what: str) -> None:
    """Warns, for the caller's caller, of the sites that ``what`` does not serve."""
    if sites := unserved(model, filter_fn):
        warnings.warn(f"{what} does not serve {_listed(sites)}", RenormifyWarning, stacklevel=3)


_CALL = "a functional call; make it call a layer"


def _is_unserved(site: Site) -> bool:
    if site.calls or site.problem:
        constant = not site.problem and not any(call.trains for call in site.calls)
        return not constant or calls_renorm(site.module)
    return not _is_served(site.module) and "frozen" not in site.kind.lower() and _has_statistics(site.module)


def _reason(site: Site) -> str:
    if site.problem:
        return site.problem
    return _CALL if site.calls else f"a {site.kind}, which does not derive from a BatchNorm of torch.nn"


def _listed(sites: Mapping[str, str]) -> str:
    names = ", ".join(name or "the model itself" for name in list(sites)[:5])
    number = f"{len(sites)} site{'s' * (len(sites) > 1)}"
    more = f" and {len(sites) - 5} more" if len(sites) > 5 else ""
    return f"{number} ({names}{more}), the first for this reason: {next(iter(sites.values()))}"


def _has_statistics(module: nn.Module) -> bool:
    statistics = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return all(isinstance(s, Tensor) and not nn.parameter.is_lazy(s) and not s.is_meta for s in statistics)


def replayable(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches as something that can be gone through many times; an iterator is read into memory."""
    return list(batches) if isinstance(batches, Iterator) else batches


def calls_of(
    batches: Iterable[Any], model: nn.Module, limit: int | None = None, *, again: bool = False
) -> Iterator[Call]:
    """Turns a user's batches into calls of the model, on its device.

    A tensor is the input; of a tuple or list the first element is, as where a loader gives inputs with
    labels; a mapping holds keyword arguments. ``again`` says that they were gone through before.

    Raises:
        InputError: ``batches`` is one batch, not an iterable of them, or holds something else, or nothing.
    """
    device = next((p.device for p in (*model.parameters(), *model.buffers())), None)
    number = 0
    for number, batch in enumerate(islice(_iterated(batches), limit), 1):  # noqa: B007
        yield pytree.tree_map_only(Tensor, lambda value: value.detach().to(device, copy=True), _call(batch))
    if number == 0 and again:
        raise InputError(
            "batches gave nothing when gone through again: expected an iterable that starts anew each time, "
            "as a list or a DataLoader does (an iterator itself may be given too)"
        )
    if number == 0:
        raise InputError("batches is empty: expected at least one batch, as a DataLoader gives them")


def _iterated(batches: object) -> Iterator[Any]:
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches must be an iterable of batches (got one {type(batches).__name__}); "
            "put a single batch into a list"
        )
    return iter(batches)


def _call(batch: object) -> Call:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return Call((batch,), {})
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    raise InputError(
        "a batch must be a tensor, a tuple or list whose first element is the input, or a dict of keyword "
        f"arguments (got {type(batch).__name__})"
    )


class SeenEnoughError(BaseException):
    """Raised while watching, to end a forward whose rest is of no interest; a model does not catch it."""


def run(model: nn.Module, call: Call) -> None:
    """Runs the model without gradient, up to its end or to a :class:`SeenEnoughError`.

    Raises:
        InputError: it fails on this batch.
    """
    try:
        # What watches may end the forward, which no compiled graph can be left by; nor has it the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*call.args, **call.kwargs)
    except SeenEnoughError:
        pass
    except Exception as error:  # a user's model may raise anything
        shapes = [
            str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, Tensor)
        ]
        raise InputError(
            f"the model fails on a batch of shape {', '.join(shapes) or 'none'}: {one_line(error)}"
        ) from error


class Inputs(NamedTuple):
    """What a layer is called with: an input :math:`(N, C, *)`, and the mask where it takes one."""

    input: Tensor
    mask: Tensor | None

    def values(self) -> Tensor:
        """The values of each channel that count, :math:`(C, m)`."""
        values = self.input.detach().movedim(1, 0).flatten(1)
        if self.mask is None:
            return values
        n, _, *rest = self.input.shape
        return values[:, positions(self.mask, self.input).expand(n, 1, *rest).flatten()]


@contextmanager
def watched(layers: Mapping[str, nn.Module], look: Callable[[str, Inputs], None]) -> Iterator[None]:
    """Calls ``look(name, inputs)`` before every forward of the layers; no hook is left behind."""

    def hook(name: str) -> Callable[..., None]:
        def before_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            mask = (args[1] if len(args) > 1 else kwargs.get("mask")) if is_batch_renorm(layer) else None
            look(name, Inputs(given[0], mask))

        return before_forward

    with ExitStack() as stack:
        for name, layer in layers.items():
            # In front of hooks of the user's, which may change the layer and expect its forward to follow.
            handle = layer.register_forward_pre_hook(hook(name), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def moments_of(values: Tensor) -> Moments:
    """Those of :math:`(C, m)` values."""
    # By parts, since an activation in float64 may be more than there is memory for.
    parts = torch.split(values, max(_MOST // len(values), 1), dim=1)
    return reduce(Moments.joined, map(_moments_of_part, parts), Moments.none())


def _moments_of_part(values: Tensor) -> Moments:
    values = values.to(torch.float64)
    mean = values.mean(1)
    return Moments(values.shape[1], mean, (values - mean.unsqueeze(1)).square().sum(1))


def copied(model: nn.Module) -> nn.Module:
    """A copy to look at in the model's place.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        raise UnsupportedModelError(
            f"{class_name(model)} cannot be copied, and nothing of it may change: {one_line(error)}"
        ) from error
