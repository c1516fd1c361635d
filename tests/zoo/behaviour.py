"""The second part of the sweep: with numbers, evaluation stays bit for bit and training obeys the paper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.census import census
from zoo.moments import Batch, State, can_tell, complaint, recorded
from zoo.originals import AMPLIFIED, Original, observe, prepare
from zoo.runs import StateDict, all_finite, distance, forward, restore, same, seed_all, step
from zoo.structure import attempt, compare_keys, first_line
from zoo.verdicts import Converter, Subject, Verdict, listed

MOMENTUM = 0.25
"""Of the converted layers; no BatchNorm of the zoo has it, so that its own rule cannot pass for ours."""
CLOSE = 1e-3
"""How far, of the largest value, training may be from BatchNorm's where r is 1 and d is 0: rounding.

Or ``AMPLIFIED`` times as far as the last bit of the input moves the original, where that is farther.
"""
COPIED = 100_000_000
"""Parameters; a larger model is converted in place, for it is large."""


def examine_behaviour(subject: Subject, converter: Converter) -> Verdict:
    """Evaluates, trains a step, evaluates again and reverts, each held against the original.

    A model too large to be copied is converted in place.
    """
    verdict = Verdict()
    seed_all(0)
    model = subject.build()
    verdict.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    sites = census(model)
    verdict.sites = len(sites)
    call = prepare(model, sites, subject, verdict)
    if call is None:
        return verdict
    original = observe(model, sites, call, verdict)
    del model, sites, call
    inplace = verdict.facts["parameters"] > COPIED or not _can_be_copied(original.model, verdict)
    converted, report = attempt(converter, original.model, verdict, momentum=MOMENTUM, inplace=inplace)
    names = verdict.enter(report, original.sites)
    if converted is None:
        return verdict
    if not _check_state(converted, original, verdict, "convert"):
        return verdict
    _check_evaluation(converted, original, verdict, "converted")
    _check_modes(converted, original, verdict)
    _check_step(converted, original, names, verdict)
    if not inplace:
        _check_original(original, converted, verdict)
    restore(converted, original.state)
    _check_revert(converter, converted, original, verdict)
    return verdict


def _can_be_copied(model: nn.Module, verdict: Verdict) -> bool:
    try:
        copy.deepcopy(model)
    except Exception as error:
        verdict.notes.append(f"the original cannot be copied, so in place: {first_line(error)}")
        return False
    return True


def _check_state(model: nn.Module, original: Original, verdict: Verdict, what: str) -> bool:
    """Whether at least the keys are the same, without which there is no way back."""
    state = model.state_dict()
    before = [(key, value.shape, value.dtype) for key, value in original.state.items()]
    compare_keys(before, [(key, value.shape, value.dtype) for key, value in state.items()], verdict)
    changed = [
        key for key, value in original.state.items() if key in state and not same([value], [state[key]])
    ]
    verdict.require(not changed, f"{what}: changed the values of {listed(changed)}")
    versions, now = (getattr(keys, "_metadata", {}) for keys in (original.state, state))
    other = [name for name, version in versions.items() if now.get(name) != version]
    verdict.require(not other, f"state dict: another version at {listed(other)}")
    return set(state) == set(original.state)


def _check_evaluation(model: nn.Module, original: Original, verdict: Verdict, what: str) -> None:
    for _ in range(2 if original.evaluation else 0):
        output = _tried(lambda: forward(model, original.call, training=False), verdict, f"{what}, evaluation")
        if output is None:
            return
        if not same(output, original.evaluation):
            far = distance(output, original.evaluation)
            verdict.failures.append(f"evaluation: {what} differs from the original, by {far:.2g} of its size")
            return


def _check_modes(model: nn.Module, original: Original, verdict: Verdict) -> None:
    """With r = 1 and d = 0 Batch Renorm is BatchNorm, so training must be the original's, dropout and all."""
    limits = [m for m in model.modules() if hasattr(m, "r_max") and hasattr(m, "d_max")]
    before = [(m.r_max, m.d_max) for m in limits]
    for module in limits:
        module.r_max, module.d_max = 1.0, 0.0
    output = _tried(lambda: forward(model, original.call, training=True), verdict, "converted, training")
    if output is not None and original.training:
        other = forward(model, original.call, training=True, seed=2) if original.random else output
        if original.random and same(output, other):
            verdict.failures.append("modes: the original's dropout is gone from training")
        elif original.finite:
            far = distance(output, original.training)
            verdict.facts["training with r=1, d=0"] = far
            allowed = max(CLOSE, AMPLIFIED * original.noise)
            differs = (
                f"modes: with r = 1, d = 0 training differs from the original's by {far:.2g} of its size"
            )
            verdict.require(far <= allowed, differs)
    for module, (r_max, d_max) in zip(limits, before, strict=True):
        module.r_max, module.d_max = r_max, d_max
    restore(model, original.state)


def _check_step(model: nn.Module, original: Original, names: tuple[str, ...], verdict: Verdict) -> None:
    layers = {name: model.get_submodule(name) for name in original.sites}
    with recorded(layers) as batches:
        result = _tried(lambda: step(model, original.call), verdict, "converted, a training step")
    if result is None:
        return
    learning, finite = result
    verdict.require(finite or not original.finite, "training: inf or NaN in outputs or gradients")
    verdict.require(
        original.learning <= learning, f"training: no gradient at {listed(original.learning - learning)}"
    )
    state = model.state_dict()
    complaints: dict[str, list[str]] = {}
    used, worst, blind = 0, 0.0, 0
    for name in names:
        seen = batches.get(name, []) if layers[name].training else []
        used += bool(seen)
        said, away, shown = _complaint_of(name, original, state, seen)
        worst, blind = max(worst, away), blind + (not shown)
        if said:
            complaints.setdefault(said, []).append(name)
    verdict.facts["used in training"] = used
    verdict.facts["share of the rounding"] = round(worst, 3)
    if blind:
        verdict.notes.append(f"{blind} of {used} layers got batches that cannot tell Batch Renorm's rule")
    for said, where in complaints.items():
        verdict.failures.append(f"statistics: {len(where)} of {len(names)} layers {said}: {listed(where)}")
    output = _tried(
        lambda: forward(model, original.call, training=False), verdict, "evaluation after training"
    )
    if output is not None:
        again = forward(model, original.call, training=False)
        verdict.require(same(output, again), "evaluation: after training, two runs differ")
        both = not original.evaluation or not all_finite(original.evaluation) or all_finite(output)
        verdict.require(both, "evaluation: after training it is not finite")


def _complaint_of(
    name: str, original: Original, state: StateDict, seen: list[Batch]
) -> tuple[str, float, bool]:
    """What is wrong with a layer's statistics, its deviation, and whether the batches could show it."""
    if not all(batch.finite and batch.count > 1 for batch in seen):
        return "", 0.0, False  # the paper's rule has nothing to say
    eps, momentum = original.constants[name]
    before, found = State.of(original.state, name), State.of(state, name)
    said, away = complaint(found, before, seen, eps, MOMENTUM, momentum)
    key = f"{name}.num_batches_tracked" if name else "num_batches_tracked"
    if not said and key in state and int(state[key] - original.state[key]) != len(seen):
        said = "miscounted their batches"
    return said, away, not seen or can_tell(before, seen, eps, MOMENTUM, momentum)


def _check_original(original: Original, converted: nn.Module, verdict: Verdict) -> None:
    """The original of a copy is as it was, and evaluates the copy's statistics as the copy does."""
    model = original.model
    verdict.require(model is not converted, "copy: the original itself came back")
    _check_state(model, original, verdict, "copy: the original")
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    verdict.require(kinds == original.kinds, "copy: classes changed in the original")
    if not original.evaluation:
        return
    restore(model, converted.state_dict())
    mine, its = (forward(m, original.call, training=False) for m in (model, converted))
    verdict.require(same(mine, its), "evaluation: after training it is not BatchNorm on the same statistics")
    restore(model, original.state)


def _check_revert(converter: Converter, converted: nn.Module, original: Original, verdict: Verdict) -> None:
    reverted = _tried(lambda: converter.revert(converted, inplace=True), verdict, "revert")
    if reverted is None:
        return
    kinds = [(name, type(module)) for name, module in reverted.named_modules()]
    other = {name for name, _ in set(kinds) ^ set(original.kinds)}
    verdict.require(kinds == original.kinds, f"revert: other classes at {listed(other)}")
    _check_state(reverted, original, verdict, "revert")
    _check_evaluation(reverted, original, verdict, "reverted")


def _tried(action: Callable[[], Any], verdict: Verdict, what: str) -> Any:
    try:
        return action()
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise  # not the converter's fault
        verdict.failures.append(f"{what}: {type(error).__name__}: {first_line(error)}")
        return None
