"""Running statistics while a model trains: frozen, let go, or counted anew over a data set."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn

from renormify.errors import InputError, RenormifyWarning
from renormify.layers import is_batch_renorm
from renormify.modes import evaluating
from renormify.observation import (
    Inputs,
    Moments,
    SeenEnoughError,
    calls_of,
    eager,
    moments_of,
    norm_layers,
    replayable,
    run,
    warn_of_unserved,
    watched,
)
from renormify.rewriting import Filter
from renormify.tracing import generators_restored

__all__ = ["freeze_stats", "is_frozen", "recalibrate", "unfreeze_stats"]


def freeze_stats(model: nn.Module, *, filter_fn: Filter | None = None) -> tuple[str, ...]:
    """Makes norm layers normalise by their running statistics in training too, and moves those no more.

    ``model.train()`` does not undo it, nor does copying, pickling, converting or reverting the model; the
    state dict stays as it is. Weight and bias go on learning. It serves BatchNorm and its subclasses as well
    as Batch Renorm, since all of them do in evaluation what a frozen layer does: its ``training`` flag is
    False and stays so until :func:`unfreeze_stats`. Functional calls are no layers; a warning names them.

    Args:
        model: with BatchNorm or Batch Renorm layers.
        filter_fn: ``filter_fn(module, name) -> bool`` says which layers to freeze; by default all.

    Returns:
        The names of the layers that are frozen now.

    Raises:
        NothingToConvertError: the model has no norm layer with running statistics, or the filter takes none.
    """
    layers = norm_layers(model, filter_fn, "to freeze")
    warn_of_unserved(model, filter_fn, "freeze_stats")
    for layer in layers.values():
        if not is_frozen(layer):
            layer.__dict__["train"] = _Held(layer, layer.training)
            layer.training = False  # not by eval(), which would take the layer's children along
    return tuple(layers)


def unfreeze_stats(model: nn.Module, *, filter_fn: Filter | None = None) -> tuple[str, ...]:
    """Undoes :func:`freeze_stats`: each layer takes the mode that it was last asked to take.

    Args:
        model: the model.
        filter_fn: ``filter_fn(module, name) -> bool`` says which layers to let go; by default all.

    Returns:
        The names of the layers that were frozen and are not any more.

    Raises:
        NothingToConvertError: the model has no norm layer with running statistics, or the filter takes none.
    """
    layers = norm_layers(model, filter_fn, "to unfreeze")
    frozen = {name: layer for name, layer in layers.items() if is_frozen(layer)}
    for layer in frozen.values():
        held = layer.__dict__.pop("train")
        layer.train(held.mode)
    return tuple(frozen)


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer's statistics are held by :func:`freeze_stats`."""
    return isinstance(layer.__dict__.get("train"), _Held)


@dataclass(eq=False)
class _Held:
    """Stands in for a frozen layer's ``train``; a class and no closure, so that it can be copied and pickled.

    Attributes:
        layer: the frozen layer.
        mode: what it was last asked for.
    """

    layer: nn.Module
    mode: bool

    def __call__(self, mode: bool = True) -> nn.Module:
        self.mode = mode
        for child in self.layer.children():
            child.train(mode)
        return self.layer


def recalibrate(
    model: nn.Module, batches: Iterable[Any], *, filter_fn: Filter | None = None
) -> tuple[str, ...]:
    r"""Gives each norm layer the exact mean and variance of its input over a data set, in evaluation mode.

    In place of :func:`torch.optim.swa_utils.update_bn`, and for a model that meets data of another domain or
    has been trained in small batches. Batches count by their numbers of values, whatever their sizes; they
    are joined in float64. Compare before you fine-tune from them: in the study of examples/paper they served
    frozen layers less well than the pretrained ones. Nor are they for a model whose statistics were held
    while it was trained, or for Batch Renorm after training on batches of one label: there they cost 3 to 28
    points. As in training, ``running_var`` is the biased variance in a layer that averages sigma, and the
    unbiased one in BatchNorm and with ``stat="var"``. ``num_batches_tracked`` becomes the number of batches.

    The layers are done one after another in the order of execution, each while all before it normalise by
    their new statistics. So every layer has the statistics of the very input that it will get, and the size
    of the batches does not matter. One pass for all layers at once cannot do that. With the layers in front
    in training mode every batch is normalised by itself: on EfficientNet-Lite0, 256 handwritten digits and
    batches of two, such a pass left the outputs 150 % off the ones that hold for the data set as a whole, and
    update_bn 100 %. With the layers in front in evaluation mode, repeated passes do not even converge. The
    price is a pass over the data for each layer, of half a forward on average, and one more that tells their
    order; a few hundred samples will mostly do. Compiled models run uncompiled.

    Args:
        model: with BatchNorm or Batch Renorm layers.
        batches: an iterable of inputs: tensors, tuples or lists whose first element is the input, or dicts of
            keyword arguments. It is gone through once for each layer and once more; an iterator, which can be
            gone through only once, is read into memory.
        filter_fn: ``filter_fn(module, name) -> bool`` says which layers to do; by default all, frozen ones
            too.

    Returns:
        The names of the layers done. Functional calls are none, and a warning names them. A layer that the
        forward does not reach is left alone, with a warning; one that it calls several times sees its later
        calls under its former statistics.

    Raises:
        NothingToConvertError: the model has no norm layer with running statistics, or the filter takes none.
        InputError: there is no batch, or the model fails on one, or a layer gets inf, NaN or a single value
            per channel. Upon this and any other exception the model is as it was.
    """
    model, layers = eager(model), norm_layers(model, filter_fn, "to recalibrate")
    warn_of_unserved(model, filter_fn, "recalibrate")
    batches = replayable(batches)
    with torch.no_grad(), generators_restored(model), evaluating(model), _restored_upon_error(layers):
        times = _count_calls(model, layers, batches)
        for name, expected in times.items():
            _recalibrate(model, name, layers[name], expected, batches)
    missed = [name for name in layers if name not in times]
    if missed:
        warnings.warn(
            f"recalibrate leaves {len(missed)} layers alone that the forward does not reach, "
            f"the first {missed[0]!r}",
            RenormifyWarning,
            stacklevel=2,
        )
    return tuple(times)


def _count_calls(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, int]:
    """How often a forward calls each layer at most, in the order of execution."""
    most: Counter[str] = Counter()
    order: list[str] = []
    times: Counter[str] = Counter()

    def count(name: str, _: Inputs) -> None:
        times[name] += 1

    with watched(layers, count):
        for call in calls_of(batches, model):
            times.clear()
            run(model, call)
            most |= times
            place = len(order)
            for name in reversed(times):  # a layer that only some batches reach comes before what follows it
                if name in order:
                    place = order.index(name)
                else:
                    order.insert(place, name)
    return {name: most[name] for name in order}


def _recalibrate(model: nn.Module, name: str, layer: Any, times: int, batches: Iterable[Any]) -> None:
    """Gives one layer the statistics of what it gets, in forwards that call it so many times at most."""
    seen: list[Moments] = []

    def look(_: str, inputs: Inputs) -> None:
        seen.append(moments_of(inputs.values()))
        if len(seen) == times:
            raise SeenEnoughError

    total, number = Moments.none(), 0
    with watched({name: layer}, look):
        for number, call in enumerate(calls_of(batches, model, again=True), 1):  # noqa: B007
            seen.clear()
            run(model, call)
            total = reduce(Moments.joined, seen, total)
    if total.number < 2:
        raise InputError(f"layer {name!r} gets {total.number} value per channel in all: it has no variance")
    if not torch.isfinite(total.mean + total.squares).all():
        raise InputError(f"layer {name!r} gets inf or NaN from these batches; no statistics were changed")
    if is_batch_renorm(layer):
        layer.keep_statistics_in_float32()
    layer.running_mean.copy_(total.mean)
    layer.running_var.copy_(total.variance(unbiased=not (is_batch_renorm(layer) and layer.stat == "sigma")))
    if getattr(layer, "num_batches_tracked", None) is not None:
        layer.num_batches_tracked.fill_(number)


@contextmanager
def _restored_upon_error(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    before = [
        (layer, name, buffer, buffer.clone())
        for layer in layers.values()
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    try:
        yield
    except BaseException:
        for layer, name, buffer, value in before:
            layer._buffers[name] = buffer.copy_(value)
        raise
