"""The first part of the sweep: on the meta device, every site is accounted for and nothing else touched."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import torch
from torch import nn

from zoo.census import census
from zoo.verdicts import Converter, Subject, Verdict, listed


def examine_structure(subject: Subject, converter: Converter) -> Verdict:
    """Converts the model in place, on meta, and compares it with what it was."""
    with torch.device("meta"):
        model = subject.build()
    sites = census(model)
    verdict = Verdict(sites=len(sites))
    verdict.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if not sites:
        return verdict
    before = Outline(model)
    start = time.perf_counter()
    result, report = attempt(converter, model, verdict, inplace=True)
    verdict.facts["convert_seconds"] = round(time.perf_counter() - start, 3)
    converted = verdict.enter(report, sites)
    if result is not None:
        verdict.require(result is model, "in place: another object came back")
    before.compare(model, verdict)
    dead = [name for name in converted if not has_limits(model.get_submodule(name))]
    verdict.require(not dead, f"layers: no r_max and d_max at {listed(dead)}, said to be converted")
    real = [name for name, tensor in tensors_of(model).items() if tensor.device.type != "meta"]
    verdict.require(not real, f"memory: left the meta device: {listed(real)}")
    reference = weakref.ref(model)
    del model, result, report, sites, before
    gc.collect()
    verdict.require(reference() is None, "memory: the model is kept alive after conversion")
    return verdict


class Outline:
    """What conversion in place must leave: the very tensors, their names and order, classes and modes."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: id(tensor) for name, tensor in tensors_of(model).items()}
        self.keys = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.kind = type(model)

    def compare(self, model: nn.Module, verdict: Verdict) -> None:
        now = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
        compare_keys(self.keys, now, verdict)
        tensors = {name: id(tensor) for name, tensor in tensors_of(model).items()}
        other = [name for name, tensor in self.tensors.items() if tensors.get(name) != tensor]
        verdict.require(not other, f"in place: other tensors at {listed(other)}")
        modes = {name: module.training for name, module in model.named_modules()}
        moved = [name for name, mode in self.modes.items() if modes.get(name) != mode]
        verdict.require(not moved, f"modes: gone, or of another mode: {listed(moved)}")
        verdict.require(type(model) is self.kind, f"class: a {type(model).__name__} came back")


def compare_keys(before: list[Any], now: list[Any], verdict: Verdict) -> None:
    if before == now:
        return
    difference = {str(key[0]) for key in set(before) ^ set(now)}
    what = f"differ at {listed(difference)}" if difference else "come in another order"
    verdict.failures.append(f"state dict: its keys {what}")


def attempt(
    converter: Converter, model: nn.Module, verdict: Verdict, **options: Any
) -> tuple[nn.Module | None, Any]:
    """The converted model and its report; no model where there was nothing to convert."""
    try:
        conversion = converter.convert(model, **options)
    except Exception as error:
        # An error with a report is a plain word: nothing could be converted, and why.
        report = getattr(error, "report", None)
        if report is None:
            verdict.failures.append(f"convert: {type(error).__name__}: {first_line(error)}")
        return None, report
    return conversion.model, conversion.report


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def has_limits(module: nn.Module) -> bool:
    """Whether there is a Batch Renorm layer at this place, or in what the place was rewritten to."""
    return any(hasattr(part, "r_max") and hasattr(part, "d_max") for part in module.modules())


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])
