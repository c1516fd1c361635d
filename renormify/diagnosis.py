r"""What a model's norm layers do at a user's own batch size, and what to do about it.

A copy of the model goes through the first batches of a run: in training mode, as Batch Renorm, with running
statistics that move, but with weights that stand still. Each norm layer is watched. For each channel of each
batch there is

.. math:: r = \sigma_B / \sigma, \qquad d = (\mu_B - \mu) / \sigma

before any limit. In these terms the input that evaluation normalises is :math:`\hat x r + d`, where BatchNorm
in training gives :math:`\hat x`; so the difference of the two has a mean square of :math:`(r - 1)^2 + d^2`,
and with Batch Renorm that of what the limits cut off from r and d.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from renormify.advice import Advice, advise
from renormify.errors import NothingToConvertError, RenormifyWarning
from renormify.figures import QUANTILES, LayerFigures, LayerRecord
from renormify.layers import is_batch_renorm
from renormify.observation import Inputs, calls_of, copied, eager, norm_layers, run, unserved, watched
from renormify.rewriting import Report, convert
from renormify.settings import Settings, check_whole
from renormify.tracing import generators_restored, is_norm

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """What the norm layers of a model do with some batches.

    Attributes:
        layers: the figures of each layer, in the order in which the forward reaches them; those that it does
            not reach come last.
        advice: what to do, each with its evidence.
        batches: how many were looked at.
        grouping: how many times larger the variance of the batches' means is than it would be were the
            samples drawn at random, as the samples within each batch tell: about 1 for shuffled data, more
            where a batch holds what belongs together. Of the first layer's input, which no other layer has
            normalised; None with fewer than two batches, or one sample in each.
        unseen: the names of sites that normalise where no one can look, such as functional calls, with the
            reason.
    """

    layers: tuple[LayerFigures, ...]
    advice: tuple[Advice, ...]
    batches: int
    grouping: float | None = None
    unseen: tuple[tuple[str, str], ...] = ()

    def worst(self, number: int = 5) -> tuple[LayerFigures, ...]:
        """The layers whose statistics differ most from batch to batch, the worst first."""
        return tuple(sorted(self.layers, key=lambda layer: -(layer.spread or 0.0))[:number])

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values, with the quantiles that ``r`` and ``d`` of a layer are."""
        return {
            "batches": self.batches,
            "grouping": self.grouping,
            "quantiles": list(QUANTILES),
            "advice": [advice.to_dict() for advice in self.advice],
            "layers": [layer.to_dict() for layer in self.layers],
            "unseen": [{"name": name, "reason": reason} for name, reason in self.unseen],
        }


def diagnose(model: nn.Module, batches: Iterable[Any], *, max_batches: int = 32) -> Diagnosis:
    """Looks at the norm layers of a BatchNorm or Batch Renorm model at a user's own batch size.

    The model itself does not run, a copy of it does, so that neither its state and modes nor any random
    number generator are another afterwards, upon an exception neither. The copy's own hooks run.

    Args:
        model: with BatchNorm or Batch Renorm layers; BatchNorm is looked at as :func:`renormify.renormify`
            would convert it by default.
        batches: an iterable of batches as they will be trained on, of that size and in that order: tensors,
            tuples or lists whose first element is the input, or dicts of keyword arguments.
        max_batches: as many are looked at. Two are the fewest that tell how batches differ.

    Returns:
        The figures of each layer, and advice.

    Raises:
        NothingToConvertError: the model has no norm layer with running statistics.
        InputError: there is no batch, or the model fails on one; or ``max_batches`` is not 1 or more.
        UnsupportedModelError: the model cannot be copied.

    Examples::

        >>> diagnosis = diagnose(model, loader)
        >>> for advice in diagnosis.advice:
        ...     print(advice.action, advice.evidence)
    """
    check_whole("max_batches", max_batches)
    model = eager(model)
    originals = norm_layers(model, purpose="to diagnose")
    with generators_restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", RenormifyWarning)  # what the layers warn of is in the figures
        subject, report = _converted(model)
        subject.train()
        layers = norm_layers(subject)
        reasons = {} if report is None else {site.name: site.reason for site in report.sites if site.reason}
        records = {
            name: LayerRecord(
                name,
                originals[name],
                (layer.r_max, layer.d_max) if is_batch_renorm(layer) else (_DEFAULTS.r_max, _DEFAULTS.d_max),
                None if is_batch_renorm(layer) else reasons.get(name),
                not layer.training,
            )
            for name, layer in layers.items()
        }

        reached: dict[str, None] = {}

        def look(name: str, inputs: Inputs) -> None:
            reached.setdefault(name)
            records[name].see(inputs, layers[name].running_mean, layers[name].running_var)

        number = 0
        with watched(layers, look):
            for number, call in enumerate(calls_of(batches, subject, max_batches), 1):  # noqa: B007
                run(subject, call)
    order = [*reached, *(name for name in records if name not in reached)]
    figures = tuple(records[name].figures() for name in order)
    first = records[order[0]]
    grouping = first.grouping()
    unseen = {name: reason for name, reason in reasons.items() if name not in records} | unserved(model)
    grouped = grouping is not None and grouping > first.grouping_by_chance()
    return Diagnosis(
        figures, advise(figures, grouping if grouped else None), number, grouping, tuple(unseen.items())
    )


_DEFAULTS = Settings()


def _converted(model: nn.Module) -> tuple[nn.Module, Report | None]:
    """A copy of the model with all the Batch Renorm it can have, and what became of each BatchNorm."""
    subject = copied(model)
    try:
        conversion = convert(subject, inplace=not is_norm(subject))
    except NothingToConvertError as error:
        return subject, error.report
    return conversion.model, conversion.report
