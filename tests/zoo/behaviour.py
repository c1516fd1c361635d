"""The second part of the sweep: with numbers, evaluation stays bit for bit and training obeys the paper."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.census import Calls, census
from zoo.moments import Batch, State, can_tell, complaint, recorded
from zoo.structure import attempt, compare_keys, first_line
from zoo.verdicts import Call, Converter, Subject, Verdict, listed

MOMENTUM = 0.25
"""Of the converted layers; no BatchNorm of the zoo has it, so that its own rule cannot pass for ours."""
CLOSE = 1e-3
"""How far, of the largest value, training may be from BatchNorm's where r is 1 and d is 0: rounding."""
AMPLIFIED = 100
"""Or how many times as far as the last bit of the input moves the original, where that is farther."""
COPIED = 100_000_000
"""Parameters; a larger model is converted in place, for it is large."""

StateDict = dict[str, Tensor]


@dataclass
class Original:
    """What a model did before it was converted."""

    model: nn.Module
    call: Call
    sites: dict[str, nn.Module]
    state: StateDict
    kinds: list[tuple[str, type]]
    evaluation: list[Tensor]
    training: list[Tensor]
    noise: float  # how far the last bit of the input moves the outputs in training
    learning: frozenset[str]  # the parameters that got a gradient
    finite: bool  # in training, gradients included
    random: bool  # two runs in training with other seeds differ
    constants: dict[str, tuple[float, float | None]]  # eps and momentum of each site


def examine_behaviour(subject: Subject, converter: Converter) -> Verdict:
    """Evaluates, trains a step, evaluates again and reverts, each held against the original.

    A model too large to be copied is converted in place.
    """
    verdict = Verdict()
    _seed(0)
    model = subject.build()
    verdict.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    sites = census(model)
    verdict.sites = len(sites)
    call = _prepare(model, sites, subject, verdict)
    if call is None:
        return verdict
    original = _observe(model, sites, call, verdict)
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
    _load(converted, original.state)
    _check_revert(converter, converted, original, verdict)
    return verdict


def _prepare(
    model: nn.Module, sites: dict[str, nn.Module], subject: Subject, verdict: Verdict
) -> Call | None:
    """Gives the model statistics that are its own, then disturbs them; finds the smallest input it takes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and float(parameter.abs().max()) < 1e-3:
                parameter.normal_(0, 0.02)  # a head or a branch that starts at zero would hide all before it
        for site in sites.values():
            for name, fill in (
                ("weight", lambda t: t.uniform_(0.5, 1.5)),
                ("bias", lambda t: t.normal_(0, 0.2)),
            ):
                tensor = getattr(site, name, None)
                if tensor is not None:
                    fill(tensor)
    call = _smallest(model, sites, subject, verdict)
    if call is None:
        return None
    with torch.no_grad():
        for site in sites.values():
            if site.running_mean is None:
                continue
            sigma = site.running_var.sqrt()
            site.running_mean += sigma * torch.randn_like(sigma) * 0.2
            site.running_var *= torch.empty_like(sigma).uniform_(0.5, 1.5)
    return call


def _smallest(
    model: nn.Module, sites: dict[str, nn.Module], subject: Subject, verdict: Verdict
) -> Call | None:
    momenta = {name: site.momentum for name, site in sites.items() if hasattr(site, "momentum")}
    initial = _state_of(model)
    error: Exception | None = None
    for label, call in subject.calls(model):
        for name in momenta:
            sites[name].momentum = 1.0  # the statistics become those of the batch
        try:
            calls = Calls(sites)
            with calls:
                _forward(model, call, training=True)
            if calls.strangers:
                verdict.notes.append(f"{calls.strangers} calls of batch_norm with statistics of no layer")
        except Exception as raised:  # what it takes is known by trying
            error = raised
            _load(model, initial)
        else:
            verdict.facts["input"] = label
            return call
        finally:
            for name, momentum in momenta.items():
                sites[name].momentum = momentum
    verdict.unfit = f"the original takes no input tried: {type(error).__name__}: {first_line(error)}"
    return None


def _observe(model: nn.Module, sites: dict[str, nn.Module], call: Call, verdict: Verdict) -> Original:
    state = _state_of(model)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    learning, finite = _step(model, call)
    training, again = (_forward(model, call, training=True) for _ in range(2))
    stochastic = not _same(training, _forward(model, call, training=True, seed=2))
    noise = _distance(_forward(model, _shaken(call), training=True), training)
    _load(model, state)
    evaluation = _forward(model, call, training=False)
    if not finite:
        verdict.notes.append("the original is not finite in training")
    if not _finite(evaluation):
        verdict.notes.append("the original is not finite in evaluation")
    if not _same(evaluation, _forward(model, call, training=False)):
        verdict.notes.append("the original differs from run to run in evaluation")
        evaluation = []
    if not _same(training, again):
        verdict.notes.append("the original differs from run to run in training, with one seed")
        training = []
    verdict.facts["random in training"] = stochastic
    constants = {
        n: (getattr(site, "eps", 1e-5), getattr(site, "momentum", None)) for n, site in sites.items()
    }
    return Original(
        model, call, sites, state, kinds, evaluation, training, noise, learning, finite, stochastic, constants
    )


def _shaken(call: Call) -> Call:
    return tree_map_only(Tensor, lambda t: t * (1 + 2**-22) if t.is_floating_point() else t, call)


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
        key for key, value in original.state.items() if key in state and not _same([value], [state[key]])
    ]
    verdict.require(not changed, f"{what}: changed the values of {listed(changed)}")
    return set(state) == set(original.state)


def _check_evaluation(model: nn.Module, original: Original, verdict: Verdict, what: str) -> None:
    for _ in range(2 if original.evaluation else 0):
        output = _tried(
            lambda: _forward(model, original.call, training=False), verdict, f"{what}, evaluation"
        )
        if output is None:
            return
        if not _same(output, original.evaluation):
            far = _distance(output, original.evaluation)
            verdict.failures.append(f"evaluation: {what} differs from the original, by {far:.2g} of its size")
            return


def _check_modes(model: nn.Module, original: Original, verdict: Verdict) -> None:
    """With r = 1 and d = 0 Batch Renorm is BatchNorm, so training must be the original's, dropout and all."""
    limits = [m for m in model.modules() if hasattr(m, "r_max") and hasattr(m, "d_max")]
    before = [(m.r_max, m.d_max) for m in limits]
    for module in limits:
        module.r_max, module.d_max = 1.0, 0.0
    output = _tried(lambda: _forward(model, original.call, training=True), verdict, "converted, training")
    if output is not None and original.training:
        other = _forward(model, original.call, training=True, seed=2) if original.random else output
        if original.random and _same(output, other):
            verdict.failures.append("modes: the original's dropout is gone from training")
        elif original.finite:
            far = _distance(output, original.training)
            verdict.facts["training with r=1, d=0"] = far
            allowed = max(CLOSE, AMPLIFIED * original.noise)
            differs = (
                f"modes: with r = 1, d = 0 training differs from the original's by {far:.2g} of its size"
            )
            verdict.require(far <= allowed, differs)
    for module, (r_max, d_max) in zip(limits, before, strict=True):
        module.r_max, module.d_max = r_max, d_max
    _load(model, original.state)


def _check_step(model: nn.Module, original: Original, names: tuple[str, ...], verdict: Verdict) -> None:
    layers = {name: model.get_submodule(name) for name in original.sites}
    with recorded(layers) as batches:
        result = _tried(lambda: _step(model, original.call), verdict, "converted, a training step")
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
        lambda: _forward(model, original.call, training=False), verdict, "evaluation after training"
    )
    if output is not None:
        again = _forward(model, original.call, training=False)
        verdict.require(_same(output, again), "evaluation: after training, two runs differ")
        both = not original.evaluation or not _finite(original.evaluation) or _finite(output)
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
    _load(model, converted.state_dict())
    mine, its = (_forward(m, original.call, training=False) for m in (model, converted))
    verdict.require(_same(mine, its), "evaluation: after training it is not BatchNorm on the same statistics")
    _load(model, original.state)


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


def _step(model: nn.Module, call: Call) -> tuple[frozenset[str], bool]:
    """One forward and backward: which parameters got a gradient, and whether all is finite."""
    with torch.enable_grad():
        outputs = _outputs(model, call, training=True, seed=1)
        loss = sum(out.float().square().mean() for out in outputs if out.requires_grad and out.numel())
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finite = _finite(outputs) and _finite(list(gradients.values()))
    model.zero_grad(set_to_none=True)
    return frozenset(gradients), finite


def _forward(model: nn.Module, call: Call, *, training: bool, seed: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return _outputs(model, call, training=training, seed=seed)


def _outputs(model: nn.Module, call: Call, *, training: bool, seed: int) -> list[Tensor]:
    args, kwargs = tree_map_only(Tensor, torch.clone, call)
    model.train(training)
    _seed(seed)
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _state_of(model: nn.Module) -> StateDict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _load(model: nn.Module, state: StateDict) -> None:
    model.load_state_dict(state)


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal, NaN where NaN."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(left, right, strict=True)
    )


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of the output it is in."""
    if [a.shape for a in left] != [b.shape for b in right]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(left, right, strict=True) if a.numel()]
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]
    return max((float(share.nan_to_num(math.inf)) for share in shares), default=0.0)
