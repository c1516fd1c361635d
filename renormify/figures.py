"""The figures of one norm layer over some batches, and the sums that they are made of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import reduce
from statistics import median, mode
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renormify.layers import is_batch_renorm
from renormify.observation import Inputs, Moments, moments_of
from renormify.tracing import class_name

__all__ = ["QUANTILES", "LayerFigures", "LayerRecord"]

QUANTILES = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
"""Of r and d, as they are reported; the outermost two tell which limits would clip one value in a hundred."""

# A channel is dead where its values differ by less than a thirtieth of the sigma that eps alone makes ...
_DEAD = 1e-3
# ... and explodes where its sigma is ten times that of the running statistics: no weight allows for that.
_EXPLODING = 10.0


@dataclass(frozen=True)
class LayerFigures:
    r"""What one norm layer got to see.

    A call on fewer than half of the usual samples, as on a loader's last batch, counts for ``calls``,
    ``drift``, ``dead``, ``exploding`` and ``nonfinite`` alone: it is not how the model trains. A channel that
    is not finite in some call is left out of that call.

    Attributes:
        name: its path in the model.
        kind: its class.
        channels: how many.
        m: values per channel in a batch, in most of them. 0 where the forward does not reach the layer.
        calls: how often it was called.
        r: the quantiles :data:`QUANTILES` of :math:`\sigma_B / \sigma` over channels and batches, before
            limits; empty where there is nothing finite.
        d: likewise, of :math:`(\mu_B - \mu) / \sigma`.
        r_max: the limit that ``clipped_r`` refers to: the layer's own, or the one that renormify would give
            it.
        d_max: likewise.
        clipped_r: the share of r, from 0 to 1, outside of [1 / r_max, r_max].
        clipped_d: the share of d outside of [-d_max, d_max].
        spread: how much the statistics differ from batch to batch, in units of the sigma of all batches
            together: the root of the mean over channels of var(mu_B) + var(sigma_B). Batch after batch,
            BatchNorm normalises a value differently by as much. None with fewer than two batches.
        drift: how far the running statistics are from those of all batches together, in units of the running
            sigma: of the median channel, beyond what chance explains.
        gap: how far the layer's output in training is from that in evaluation, before weight and bias, in
            units of the running sigma: the root mean square over the batches, averaged over the channels. Of
            BatchNorm for a BatchNorm layer, of Batch Renorm within its limits for a Batch Renorm layer, zero
            for a frozen one.
        dead: channels whose values hardly differ over all batches.
        exploding: channels whose sigma over all batches is above ten times the running one.
        nonfinite: values that are inf or NaN.
        unsound: channels whose running statistics are inf or NaN, before any batch.
        momentum: the layer's.
        tracked: its ``num_batches_tracked``; None where it has none.
        fresh: whether its running statistics are still those it was made with.
        frozen: whether it stays in evaluation mode when the model trains, as under
            :func:`renormify.freeze_stats`.
        renormed: whether it is a Batch Renorm layer.
        refusal: why renormify cannot convert it, or None.
    """

    name: str
    kind: str
    channels: int
    m: int
    calls: int
    r: tuple[float, ...]
    d: tuple[float, ...]
    r_max: float
    d_max: float
    clipped_r: float
    clipped_d: float
    spread: float | None
    drift: float
    gap: float
    dead: int
    exploding: int
    nonfinite: int
    unsound: int
    momentum: float | None
    tracked: int | None
    fresh: bool
    frozen: bool
    renormed: bool
    refusal: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)


class _Seen(NamedTuple):
    """One call: how many samples, the moments, r and d, and the variance of the means that chance gives."""

    samples: int
    moments: Moments
    r: Tensor
    d: Tensor
    by_chance: Tensor | None


@dataclass
class LayerRecord:
    """Gathers what a layer sees, call by call.

    Args:
        name: of the layer.
        layer: the user's own, as it is before any batch.
        limits: r_max and d_max of the run that is looked at.
        refusal: why renormify cannot convert it, or None.
        frozen: whether it normalises by its running statistics in training.
    """

    name: str
    layer: Any
    limits: tuple[float, float]
    refusal: str | None
    frozen: bool
    _calls: list[_Seen] = field(default_factory=list)
    _nonfinite: int = 0

    def see(self, inputs: Inputs, running_mean: Tensor, running_var: Tensor) -> None:
        """Takes in one call, with the running statistics as they are before it."""
        values = inputs.values()
        if values.numel() == 0:
            return
        self._nonfinite += int((~torch.isfinite(values)).sum())
        moments = moments_of(values)
        sigma = (running_var.double() + self.layer.eps).sqrt()
        n, by_chance = len(inputs.input), None
        if n > 1 and inputs.mask is None:
            by_chance = inputs.input.detach().double().reshape(n, len(sigma), -1).mean(2).var(0) / n
        r, d = self._sigma(moments) / sigma, (moments.mean - running_mean.double()) / sigma
        self._calls.append(_Seen(n, moments, r, d, by_chance))

    def figures(self) -> LayerFigures:
        """The figures of all calls."""
        layer, (r_max, d_max) = self.layer, self.limits
        tracked = getattr(layer, "num_batches_tracked", None)
        usual = self._usual_calls()
        nothing = layer.running_mean.new_zeros(0, layer.running_mean.numel())
        r = torch.stack([call.r for call in usual]) if usual else nothing
        d = torch.stack([call.d for call in usual]) if usual else nothing
        total, variance = self._total()
        sound = torch.isfinite(total)
        live = sound & (variance > _DEAD * layer.eps)
        running_mean, running_var = layer.running_mean.detach().double(), layer.running_var.detach().double()
        unsound = ~torch.isfinite(running_mean + running_var)
        running_sigma = (running_var + layer.eps).sqrt()
        step = (total - running_mean) / running_sigma
        growth = (variance + layer.eps).sqrt() / running_sigma
        spread = self._spread(variance, live)
        chance = 0.0 if spread is None else spread**2 / len(usual)
        drift = _median((step.square() + (growth - 1).square())[live & ~unsound])
        r_finite, d_finite = r[torch.isfinite(r)], d[torch.isfinite(d)]
        return LayerFigures(
            name=self.name,
            kind=class_name(layer),
            channels=layer.running_mean.numel(),
            m=mode(sorted((call.moments.number for call in usual), reverse=True)) if usual else 0,
            calls=len(self._calls),
            r=_quantiles(r_finite),
            d=_quantiles(d_finite),
            r_max=r_max,
            d_max=d_max,
            clipped_r=_share((r_finite > r_max) | (r_finite < 1 / r_max)),
            clipped_d=_share(d_finite.abs() > d_max),
            spread=spread,
            drift=max(drift - chance, 0.0) ** 0.5,
            gap=self._gap(r[:, live], d[:, live]),
            dead=int((sound & ~live).sum()),
            exploding=int((growth[live] > _EXPLODING).sum()),
            nonfinite=self._nonfinite,
            unsound=int(unsound.sum()),
            momentum=layer.momentum,
            tracked=None if tracked is None else int(tracked),
            fresh=not layer.running_mean.any() and bool((layer.running_var == 1).all()),
            frozen=self.frozen,
            renormed=is_batch_renorm(layer),
            refusal=self.refusal,
        )

    def _usual_calls(self) -> list[_Seen]:
        """Without those on a batch that was left over."""
        fewest = median(call.samples for call in self._calls) / 2 if self._calls else 0
        return [call for call in self._calls if call.samples >= fewest]

    def _total(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel over all calls in which it is finite; NaN where it never is."""
        if not self._calls:
            nothing = self.layer.running_mean.new_full((), torch.nan, dtype=torch.float64)
            return (nothing.expand(self.layer.running_mean.numel()),) * 2
        means = torch.stack([call.moments.mean for call in self._calls])
        squares = torch.stack([call.moments.squares for call in self._calls])
        weights = means.new_tensor([call.moments.number for call in self._calls]).unsqueeze(1)
        weights = weights * torch.isfinite(means + squares)
        number = weights.sum(0)
        mean = (weights * means).nansum(0) / number
        scatter = squares.where(weights > 0, 0.0) + (weights * (means - mean).square()).where(
            weights > 0, 0.0
        )
        return mean, scatter.sum(0) / number

    def _sigma(self, moments: Moments) -> Tensor:
        sigma: Tensor = (moments.variance(unbiased=False) + self.layer.eps).sqrt()
        return sigma

    def grouping(self) -> float | None:
        """See :class:`renormify.diagnosis.Diagnosis`."""
        calls = self._grouped_calls()
        expected = [call.by_chance for call in calls if call.by_chance is not None]
        if len(calls) < 2 or len(expected) < len(calls):
            return None
        scale = reduce(Moments.joined, (call.moments for call in calls)).variance(unbiased=False)
        scale = scale + self.layer.eps
        observed = torch.stack([call.moments.mean for call in calls]).var(0)
        chance = (torch.stack(expected).mean(0) / scale).sum().item()
        return (observed / scale).sum().item() / chance if chance > 0 else None

    def grouping_by_chance(self) -> float:
        """The grouping that some one in a hundred sets of shuffled batches exceeds.

        It is a ratio of two variances, F-distributed with one degree of freedom less than batches, and less
        than samples in each of these; by the normal approximation of its logarithm.
        """
        calls = self._grouped_calls()
        above, below = len(calls) - 1, sum(call.samples for call in calls) - len(calls)
        return math.exp(2.33 * math.sqrt(2 / above + 2 / below)) if above > 0 and below > 0 else math.inf

    def _grouped_calls(self) -> list[_Seen]:
        moments = [(call, call.moments.mean + call.moments.squares) for call in self._usual_calls()]
        return [call for call, values in moments if torch.isfinite(values).all()]

    def _spread(self, variance: Tensor, live: Tensor) -> float | None:
        calls = self._usual_calls()
        if len(calls) < 2 or not live.any():
            return None
        means = torch.stack([call.moments.mean for call in calls])[:, live]
        sigmas = torch.stack([self._sigma(call.moments) for call in calls])[:, live]
        sound = torch.isfinite(means + sigmas)
        apart = _variance(means, sound) + _variance(sigmas, sound)
        relative = (apart / (variance[live] + self.layer.eps))[sound.sum(0) > 1]
        return relative.mean().sqrt().item() if relative.numel() else None

    def _gap(self, r: Tensor, d: Tensor) -> float:
        sound = torch.isfinite(r) & torch.isfinite(d)
        if self.frozen or not sound.any():
            return 0.0
        r_max, d_max = self.limits if is_batch_renorm(self.layer) else (1.0, 0.0)
        missing = (r - r.clamp(1 / r_max, r_max)).square() + (d - d.clamp(-d_max, d_max)).square()
        mean = missing.where(sound, 0.0).sum(0) / sound.sum(0)
        return mean[sound.any(0)].sqrt().mean().item()


def _variance(rows: Tensor, sound: Tensor) -> Tensor:
    """The unbiased variance of each column over its sound rows; NaN of fewer than two."""
    number = sound.sum(0)
    mean = rows.where(sound, 0.0).sum(0) / number
    return (rows - mean).square().where(sound, 0.0).sum(0) / (number - 1)


def _quantiles(values: Tensor) -> tuple[float, ...]:
    if values.numel() == 0:
        return ()
    return tuple(torch.quantile(values, values.new_tensor(QUANTILES)).tolist())


def _share(chosen: Tensor) -> float:
    return chosen.double().mean().item() if chosen.numel() else 0.0


def _median(values: Tensor) -> float:
    return values.median().item() if values.numel() else 0.0
