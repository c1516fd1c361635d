"""What to do about a model's norm layers, from their figures; every threshold with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from renormify.figures import LayerFigures

__all__ = ["Action", "Advice", "advise"]

Action = Literal["keep", "renormify", "freeze", "other_norm", "limits", "momentum", "recalibrate", "inspect"]

# From here on the batch a sample happens to be in matters to it: 0.3 of a standard deviation. On the trained
# EfficientNet-Lite0 and MobileNetV2, photographs and digits, one layer in ten reaches it in shuffled batches
# of 16 and fewer, and not in those of 32 and 64 (at most 0.29); in batches of one class it does at 64 too
# (0.39 to 0.54). Batches of 8 and fewer are where BatchNorm is known to lose accuracy, 16 where it begins to
# (Wu and He, Group Normalization, 2018, table 2: ResNet-50 errs by 23.6 % at 32, 23.7 at 16, 24.8 at 8).
_SPREAD = 0.3
_LAYERS = 0.1
# Shuffled batches gave 0.2 to 1.3 in the same measurements, batches of one class 3.5 to 41.
_GROUPING = 2.0
# Half of the layers this far off, in sigma: r and d would spend themselves on the domain. The same networks,
# trained on photographs, gave 0.34 to 0.66 on digits, and on photographs 0.13 to 0.19 at 160 pixels, which is
# about the scale they know, and up to 0.48 at 64, which is not.
_DRIFT = 0.3
# With two values per channel the gradient is some 6e-4 of its due, with one it is zero.
_TOO_FEW = 2
# What is clipped is a difference of training from evaluation; up to one value in twenty is the tail that the
# limits are there for.
_CLIPPED = 0.05
# Running statistics that tremble by a tenth of a sigma are a drift of their own.
_TREMBLE = 0.1
# The paper's limits: wider ones are not lowered below them.
_LIMITS = {"r_max": 3.0, "d_max": 5.0}
# None wider is proposed: r scales the gradient.
_WIDEST = 10.0


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Attributes:
        action: ``"keep"`` the norm as it is, ``"renormify"`` the model, ``"freeze"`` statistics, use
            ``"other_norm"``, change ``"limits"`` or ``"momentum"``, or ``"recalibrate"`` first; or
            ``"inspect"`` where inf and NaN come from.
        layers: the names of the layers that it is about, the worst first.
        evidence: the figures it follows from, and the call that does it.
    """

    action: Action
    layers: tuple[str, ...]
    evidence: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)


def advise(layers: Sequence[LayerFigures], grouping: float | None = None) -> tuple[Advice, ...]:
    """What follows from the figures of a model's layers; there is always something.

    Args:
        layers: the figures of each.
        grouping: see :class:`renormify.diagnosis.Diagnosis`; None where it can be chance.
    """
    seen = [layer for layer in layers if layer.calls]
    advice = (
        *_nonfinite(layers),
        *_few_values(seen),
        *_dependence_on_the_batch(seen, grouping),
        *_domain(seen),
        *_limits(seen),
        *_momentum(seen),
    )
    if not any(found.action in _VERDICTS for found in advice):
        why = (
            "every layer that the forward reaches is frozen already"
            if seen
            else "the forward reaches no layer"
        )
        return (*advice, Advice("keep", _names(seen), why))
    return advice


_VERDICTS = ("keep", "renormify", "freeze", "other_norm", "inspect")


def _nonfinite(layers: Sequence[LayerFigures]) -> Iterator[Advice]:
    """In the order of the forward, so that the first is where it begins."""
    unsound = [layer for layer in layers if layer.unsound]
    if unsound:
        yield Advice(
            "recalibrate",
            _names(unsound),
            f"the running statistics of {_count(unsound, layers)} hold inf or NaN, first those of "
            f"{_named(unsound[0])} (in {unsound[0].unsound} of {unsound[0].channels} channels), so "
            "evaluation gives NaN: recalibrate(model, batches), or load another checkpoint",
        )
    hit = [layer for layer in layers if layer.nonfinite]
    if hit:
        yield Advice(
            "inspect",
            _names(hit),
            f"inf or NaN come into {_count(hit, layers)}, first into {_named(hit[0])}: {hit[0].nonfinite} "
            "values; look for them in the batches, the weights and the running statistics in front of it; "
            "the other figures leave them out",
        )


def _few_values(layers: Sequence[LayerFigures]) -> Iterator[Advice]:
    few = sorted((layer for layer in _training(layers) if layer.m <= _TOO_FEW), key=lambda layer: layer.m)
    if not few:
        return
    evidence = (
        f"{_count(few, layers)} have at most {few[-1].m} values per channel in a batch (down to {few[0].m}): "
        "normalised by them, the output says next to nothing of the input, and the gradient vanishes"
    )
    trained = [layer for layer in few if not layer.fresh]
    if trained:
        yield Advice(
            "freeze",
            _names(trained),
            f"{evidence}; trained running statistics, those of {len(trained)} of these, need no batch: "
            "freeze_stats(model, filter_fn=...)",
        )
    yield Advice(
        "other_norm",
        _names(few),
        f"{evidence}; use GroupNorm or LayerNorm there, or larger batches or inputs",
    )


def _dependence_on_the_batch(layers: Sequence[LayerFigures], grouping: float | None) -> Iterator[Advice]:
    training = [layer for layer in _training(layers) if layer.m > _TOO_FEW and layer.r]
    if not training:
        return
    measured = [layer for layer in training if layer.spread is not None]
    what = "the batch statistics differ from batch to batch"
    if not measured:  # one batch; all there is to compare it with are the running statistics
        measured, what = training, "the one batch differs from the running statistics"
    depends = _spread if measured[0].spread is not None else _gap
    measured.sort(key=depends, reverse=True)
    worst = measured[0]
    harmed = [layer for layer in measured if depends(layer) > _SPREAD]
    most = depends(measured[math.ceil(_LAYERS * len(measured)) - 1])
    if len(harmed) < max(1, _LAYERS * len(measured)):
        if any(layer.fresh for layer in training):
            then = (
                "; but these are statistics of an untrained model, so look again once it has learnt something"
            )
        else:
            then = ": BatchNorm would do as well" if all(layer.renormed for layer in training) else ""
        yield Advice(
            "keep",
            _names(training),
            f"{what} by less than {_SPREAD} sigma (at most {depends(worst):.2f}, in {_named(worst)}; "
            f"{most:.2f} in the worst tenth of the layers){then}",
        )
        return
    evidence = (
        f"{what} by more than {_SPREAD} sigma in {_count(harmed, measured)}, "
        f"the most in {_named(worst)}: {depends(worst):.2f} at m = {worst.m}"
    )
    grouped = grouping is not None and grouping > _GROUPING
    if grouped:
        evidence += (
            f"; the batches are not drawn at random: in the first layer the variance of their means is "
            f"{grouping:.1f} times that of shuffled ones"
        )
    renormed = [layer for layer in harmed if layer.renormed]
    refused = [layer for layer in harmed if not layer.renormed and layer.refusal]
    plain = [layer for layer in harmed if not layer.renormed and not layer.refusal]
    trained = [layer for layer in (*plain, *renormed) if not layer.fresh]
    if grouped and trained:
        yield Advice(
            "freeze",
            _names(trained),
            f"{evidence}; trained running statistics need no batch: to fine-tune try {_freezing(harmed)} "
            "first, by which none is felt",
        )
    if plain:
        yield Advice(
            "renormify",
            _names(plain),
            f"{evidence}; renormify(model) corrects it by r and d{_or_freeze(plain, grouped)}",
        )
    if renormed:
        yield Advice(
            "keep",
            _names(renormed),
            f"{evidence}; Batch Renorm is what these need{_or_freeze(renormed, grouped)}",
        )
    if refused:
        yield Advice(
            "freeze",
            _names(refused),
            f"{evidence}; renormify cannot convert {_named(refused[0])} ({refused[0].refusal}), but "
            "freeze_stats(model, filter_fn=...) takes the batch out of it",
        )


def _or_freeze(layers: Sequence[LayerFigures], grouped: bool) -> str:
    """What else trained layers may do, where it has not been said already.

    In 200 steps of two pretrained networks on Fashion-MNIST frozen statistics were 5 and 7 points ahead of
    Batch Renorm in shuffled batches of 2, not shown to be so in those of 8, and 22 to 35 in batches of one
    class (examples/paper).
    """
    if grouped or all(layer.fresh for layer in layers):
        return ""
    return (
        f"; or, for a short fine-tuning, {_freezing(layers)}, by which no batch is felt: compare both, each "
        "at its own learning rate"
    )


def _freezing(layers: Sequence[LayerFigures]) -> str:
    """The call that freezes the trained ones."""
    return f"freeze_stats(model{', filter_fn=...' if any(layer.fresh for layer in layers) else ''})"


def _domain(layers: Sequence[LayerFigures]) -> Iterator[Advice]:
    fresh = [layer for layer in layers if layer.fresh]
    if fresh:
        yield Advice(
            "limits",
            _names(fresh),
            f"the running statistics of {_count(fresh, layers)} are those they were made with, so r and d "
            "would be relative to nothing: train as BatchNorm first, with "
            "RenormScheduler(model, PaperSchedule.scaled(total_steps))",
        )
    drifted = _drifted(layers)
    if drifted:
        trained = [layer for layer in layers if not layer.fresh]
        median = sorted(layer.drift for layer in trained)[len(trained) // 2]
        yield Advice(
            "recalibrate",
            _names(drifted),
            f"the running statistics are {median:.2f} sigma off those of this data in the median layer, "
            f"the most in {_named(drifted[0])}: {drifted[0].drift:.2f}; Batch Renorm and evaluation are as "
            "good as they: recalibrate(model, batches) before training, or leave them some hundred steps to "
            "follow in; before statistics are frozen compare both",
        )


def _drifted(layers: Sequence[LayerFigures]) -> list[LayerFigures]:
    """The layers whose running statistics belong to other data, where half of them all do."""
    trained = [layer for layer in layers if not layer.fresh and layer.calls > 1]
    drifted = [layer for layer in trained if layer.drift > _DRIFT]
    return sorted(drifted, key=lambda layer: -layer.drift) if 2 * len(drifted) > len(trained) else []


def _limits(layers: Sequence[LayerFigures]) -> Iterator[Advice]:
    if _drifted(layers):
        return  # first the statistics, then the limits around them
    ours = [
        layer
        for layer in _training(layers)
        if layer.r and layer.m > _TOO_FEW and layer.renormed and not layer.fresh
        if (layer.r_max, layer.d_max) != (1.0, 0.0)  # BatchNorm, as a schedule has it before its ramp
    ]
    narrow = {name: [layer for layer in ours if _clips(layer, name)] for name in _LIMITS}
    clipping = [layer for layer in ours if any(layer in narrow[name] for name in _LIMITS)]
    if clipping:
        clipping.sort(key=lambda layer: -max(layer.clipped_r, layer.clipped_d))
        worst = clipping[0]
        raised = " and ".join(
            f"{name} to {min(max(_needed(layer)[name] for layer in narrow[name]), _WIDEST):.3g}"
            for name in _LIMITS
            if narrow[name]
        )
        yield Advice(
            "limits",
            _names(clipping),
            f"{_count(clipping, ours)} clip more than {_CLIPPED:.0%}, the most {_named(worst)}: "
            f"r {worst.clipped_r:.0%}, d {worst.clipped_d:.0%}; raise {raised}; "
            "or leave that to a schedule that is still rising",
        )
    wide = {name: [layer for layer in ours if _is_loose(layer, name)] for name in _LIMITS}
    loose = [layer for layer in ours if any(layer in wide[name] for name in _LIMITS)]
    if loose:
        found = " and ".join(
            f"{name} {getattr(wide[name][0], name):.3g}, needed {_needed(wide[name][0])[name]:.3g}, "
            f"in {_named(wide[name][0])}"
            for name in _LIMITS
            if wide[name]
        )
        lowered = " and ".join(f"{name} to {_LIMITS[name]:g}" for name in _LIMITS if wide[name])
        yield Advice(
            "limits",
            _names(loose),
            f"{_count(loose, ours)} have limits that nothing comes near ({found}): "
            f"a batch gone wrong would pass; lower {lowered}, as in the paper",
        )


def _needed(layer: LayerFigures) -> dict[str, float]:
    """The limits that would clip one value in a hundred."""
    return {
        "r_max": max(layer.r[-1], 1 / max(layer.r[0], 1e-6)),
        "d_max": max(abs(layer.d[0]), abs(layer.d[-1])),
    }


def _clips(layer: LayerFigures, name: str) -> bool:
    """Whether a limit clips too much, and may be raised."""
    clipped = {"r_max": layer.clipped_r, "d_max": layer.clipped_d}[name]
    return clipped > _CLIPPED and getattr(layer, name) < _WIDEST


def _is_loose(layer: LayerFigures, name: str) -> bool:
    limit: float = getattr(layer, name)
    return limit > _LIMITS[name] and limit > 2 * _needed(layer)[name]


def _momentum(layers: Sequence[LayerFigures]) -> Iterator[Advice]:
    training = _training(layers)
    overwritten = [
        layer for layer in training if layer.momentum is None and layer.tracked == 0 and not layer.fresh
    ]
    if overwritten:
        yield Advice(
            "momentum",
            _names(overwritten),
            f"{_count(overwritten, layers)} average cumulatively (momentum None) and count no batch so far, "
            "though their statistics are trained: the first batch would replace them; set momentum to 0.01",
        )
    still = [layer for layer in training if layer.momentum == 0]
    if still:
        yield Advice(
            "momentum",
            _names(still),
            f"{_count(still, layers)} have momentum 0, so their statistics never move; set it to 0.01, or "
            "freeze_stats(model) if that is meant",
        )
    trembling = sorted(
        (layer for layer in training if _tremble(layer) > _TREMBLE), key=lambda layer: -_tremble(layer)
    )
    if trembling and len(trembling) >= _LAYERS * len(training):
        worst = trembling[0]
        square = (_TREMBLE / _spread(worst)) ** 2
        yield Advice(
            "momentum",
            _names(trembling),
            f"with momentum {worst.momentum:.3g} and batches this different the running statistics of "
            f"{_named(worst)} tremble by {_tremble(worst):.2f} sigma (above {_TREMBLE} in "
            f"{_count(trembling, layers)}); at most {_floored(2 * square / (1 + square)):g} suits them",
        )


def _tremble(layer: LayerFigures) -> float:
    """The standard deviation of an exponential average of independent terms that differ by the spread."""
    return _spread(layer) * math.sqrt(layer.momentum / (2 - layer.momentum)) if layer.momentum else 0.0


def _floored(value: float) -> float:
    """The value with one digit, rounded down."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.floor(value / unit) * unit


def _training(layers: Sequence[LayerFigures]) -> list[LayerFigures]:
    return [layer for layer in layers if not layer.frozen]


def _spread(layer: LayerFigures) -> float:
    return layer.spread or 0.0


def _gap(layer: LayerFigures) -> float:
    return layer.gap


def _names(layers: Sequence[LayerFigures]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _named(layer: LayerFigures) -> str:
    return layer.name or "the model itself"


def _count(some: Sequence[LayerFigures], layers: Sequence[LayerFigures]) -> str:
    return f"{len(some)} of {len(layers)} layers"
