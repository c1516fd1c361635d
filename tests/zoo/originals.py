"""What a model does before it is converted, with random weights and statistics that are not trivial."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zoo.census import Calls
from zoo.runs import StateDict, all_finite, distance, forward, restore, same, state_of, step
from zoo.structure import first_line
from zoo.verdicts import Call, Subject, Verdict

AMPLIFIED = 100
"""How many times as far as the last bit of the input moves the original its training may be moved."""


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


def prepare(model: nn.Module, sites: dict[str, nn.Module], subject: Subject, verdict: Verdict) -> Call | None:
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
            # Two images leave channels without any spread; evaluation would blow them up beyond all floats.
            site.running_var.clamp_(min=float(site.running_var.mean()) / 100)
    return call


def _smallest(
    model: nn.Module, sites: dict[str, nn.Module], subject: Subject, verdict: Verdict
) -> Call | None:
    momenta = {name: site.momentum for name, site in sites.items() if hasattr(site, "momentum")}
    initial = state_of(model)
    error: Exception | None = None
    for label, call in subject.calls(model):
        for name in momenta:
            sites[name].momentum = 1.0  # the statistics become those of the batch
        try:
            calls = Calls(sites)
            with calls:
                forward(model, call, training=True)
            forward(model, call, training=False)
            if calls.strangers:
                verdict.notes.append(f"{calls.strangers} calls of batch_norm with statistics of no layer")
        except Exception as raised:  # what it takes is known by trying
            error = raised
            restore(model, initial)
        else:
            verdict.facts["input"] = label
            return call
        finally:
            for name, momentum in momenta.items():
                sites[name].momentum = momentum
    verdict.unfit = f"the original takes no input tried: {type(error).__name__}: {first_line(error)}"
    return None


def observe(model: nn.Module, sites: dict[str, nn.Module], call: Call, verdict: Verdict) -> Original:
    state = state_of(model)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    learning, finite = step(model, call)
    training, again = (forward(model, call, training=True) for _ in range(2))
    stochastic = not same(training, forward(model, call, training=True, seed=2))
    noise = distance(forward(model, _shaken(call), training=True), training)
    restore(model, state)
    evaluation = forward(model, call, training=False)
    if not finite:
        verdict.notes.append("the original is not finite in training")
    if not all_finite(evaluation):
        verdict.notes.append("the original is not finite in evaluation")
    if not same(evaluation, forward(model, call, training=False)):
        verdict.notes.append("the original differs from run to run in evaluation")
        evaluation = []
    if not same(training, again):
        verdict.notes.append("the original differs from run to run in training, with one seed")
        training = []
    if finite and training and AMPLIFIED * noise > 0.5:
        verdict.notes.append(f"training turns the last bit of the input into {noise:.1g} of the output")
    verdict.facts["random in training"] = stochastic
    constants = {
        n: (getattr(site, "eps", 1e-5), getattr(site, "momentum", None)) for n, site in sites.items()
    }
    return Original(
        model, call, sites, state, kinds, evaluation, training, noise, learning, finite, stochastic, constants
    )


def _shaken(call: Call) -> Call:
    """The same inputs but for their last bits, up or down at random: a change of scale BatchNorm undoes."""

    def shake(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + torch.randn_like(tensor).sign() * 2**-22)

    return tree_map_only(Tensor, shake, call)
