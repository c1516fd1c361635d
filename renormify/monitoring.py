r"""What the norm layers do while a model trains, read off their running statistics.

A step moves the statistics by :math:`\mu' = \mu + \alpha (\mu_B - \mu)` and
:math:`\sigma' = \sigma + \alpha (\sigma_B - \sigma)`, so two readings, before and after, tell what the
layer's own batch gave:

.. math:: d = \frac{\mu' - \mu}{\alpha \sigma}, \qquad r = 1 + \frac{\sigma' / \sigma - 1}{\alpha}

In a layer that averages the variance, r comes of that, and of the unbiased one.

No hook runs and no graph breaks, activations are not touched, and what is read is what the layer saw: joined
over processes, masked, compiled or checkpointed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from renormify.errors import RenormifyWarning
from renormify.layers import is_batch_renorm
from renormify.observation import norm_layers, warn_of_unserved
from renormify.settings import Settings, check_whole
from renormify.training import is_frozen

__all__ = ["Monitor"]

_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
_MANY = 0.25  # of a layer's channels; the few that always clip are the tail that limits are there for
_DEAD = 1e-3  # of eps: a variance below it is a sigma that eps alone makes
_DEFAULTS = Settings()


class Writer(Protocol):
    """What TensorBoard's ``SummaryWriter`` is for a monitor."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Takes one figure."""
        ...


class _Reading(NamedTuple):
    """A layer's statistics in float64, how many batches it counts in them and rejected, and its mode."""

    mean: Tensor
    var: Tensor
    tracked: int | None
    rejected: int
    training: bool


class _Seen(NamedTuple):
    """What a layer made of its batch, for each channel: r and d before limits, and what limits cost it."""

    r: Tensor
    d: Tensor
    clipped_r: Tensor
    clipped_d: Tensor
    gap: Tensor


class Monitor:
    r"""Figures of a model's norm layers every n steps, as a flat dict of floats for any logger.

    Call :meth:`step` once after each training step. A step that accumulates gradients over several forwards
    gives the r and d of their average; call it after each forward to see each. The figures, all under
    ``prefix``:

    ``r_q05, r_q50, r_q95, d_q05, d_q50, d_q95``: quantiles over the channels of all layers, before limits;
    ``clipped_r, clipped_d``: the share of channels beyond the limits, and ``clipped_most`` that of the worst
    layer; ``gap``: how far training is from evaluation, in units of sigma, as in :func:`renormify.diagnose`;
    ``r_max, d_max``: the widest limits; ``dead``: channels without any variance; ``still``: layers that are
    in training mode, not frozen, and whose statistics did not move; ``rejected``: batches with inf or NaN so
    far, over all layers; ``unbiased``: layers whose r is too large by the factor :math:`\sqrt{m / (m - 1)}`
    for m values per channel. These are BatchNorm layers and those with ``stat="var"``: they keep the unbiased
    variance, and m cannot be read off their statistics. It hardly matters above a hundred values; at two, as
    with batches of two behind a pooling, r reads 1.41 where it is 1, and ``clipped_r`` and ``gap`` follow it.
    :func:`renormify.diagnose` gives the exact r. Where no statistic moved there are none of r and d, and of
    what follows from them.

    Functional calls are no layers; a warning names them, and there are no figures of theirs.

    BatchNorm layers are measured against the limits that renormify would give them.

    It warns once of layers that clip a quarter of their channels, or whose statistics stand still, in
    ``patience`` samples on end. While a schedule holds BatchNorm's limits or moves them, clipping is what it
    wants, and counts for nothing.

    Args:
        model: with BatchNorm or Batch Renorm layers.
        every: as many steps from one sample to the next.
        prefix: of every key.
        per_layer: also give ``NAME/clipped_r``, ``NAME/clipped_d``, ``NAME/r_q50`` and ``NAME/d_q50``.
        patience: as many samples before a warning.

    Raises:
        NothingToConvertError: the model has no norm layer with running statistics.
        InputError: ``every`` or ``patience`` is no whole number of at least 1.

    Examples::

        >>> monitor = Monitor(model, every=100)
        >>> for images, labels in loader:
        ...     train(images, labels)
        ...     if figures := monitor.step():
        ...         wandb.log(figures)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        prefix: str = "renorm/",
        per_layer: bool = False,
        patience: int = 5,
    ) -> None:
        for name, value in (("every", every), ("patience", patience)):
            check_whole(name, value)
        self._layers = norm_layers(model, purpose="to monitor")
        warn_of_unserved(model, None, "Monitor")
        self._every, self._prefix, self._per_layer, self._patience = every, prefix, per_layer, patience
        self._step = 0
        self._before: dict[str, _Reading] | None = None
        self._limits: dict[str, tuple[float, float]] = {}
        self._clipping: Counter[str] = Counter()
        self._standing: Counter[str] = Counter()
        self._rejecting: Counter[str] = Counter()
        self._warned: set[str] = set()
        self.figures: dict[str, float] = {}
        self._read_before_a_sample()

    def step(self) -> dict[str, float]:
        """Counts one step; on every n-th it returns the figures, and otherwise an empty dict."""
        self._step += 1
        sampled = {}
        if self._before is not None:
            sampled = self.figures = self._sample(self._before)
        self._read_before_a_sample()
        return dict(sampled)

    def write(self, writer: Writer, step: int | None = None) -> None:
        """Gives the last figures to a writer, as TensorBoard's.

        Args:
            writer: something with ``add_scalar(tag, value, step)``.
            step: by default the monitor's own count.
        """
        for key, value in self.figures.items():
            writer.add_scalar(key, value, self._step if step is None else step)

    def _read_before_a_sample(self) -> None:
        due = (self._step + 1) % self._every == 0
        self._before = {name: _read(layer) for name, layer in self._layers.items()} if due else None

    def _sample(self, before: dict[str, _Reading]) -> dict[str, float]:
        layers = self._layers
        after = {name: _read(layer) for name, layer in layers.items()}
        maybe = {name: _seen(layer, before[name], after[name]) for name, layer in layers.items()}
        seen = {name: sight for name, sight in maybe.items() if sight is not None}
        still = [
            name
            for name, layer in layers.items()
            if name not in seen and not is_frozen(layer) and (before[name].training or after[name].training)
        ]
        rejecting = [name for name in still if after[name].rejected > before[name].rejected]
        clipped = {name: max(_mean(sight.clipped_r), _mean(sight.clipped_d)) for name, sight in seen.items()}
        self._warn(clipped, still, rejecting)

        limits = [_limits_of(layer) for layer in layers.values()]
        found = {
            "clipped_most": max(clipped.values(), default=0.0),
            "r_max": max(r_max for r_max, _ in limits),
            "d_max": max(d_max for _, d_max in limits),
            "dead": float(sum(int((x.running_var <= _DEAD * x.eps).sum()) for x in layers.values())),
            "still": float(len(still)),
            "rejected": float(sum(reading.rejected for reading in after.values())),
            "unbiased": float(sum(_is_unbiased(layers[name]) for name in seen)),
        }
        if seen:
            joined = _Seen(*map(torch.cat, zip(*seen.values(), strict=True)))
            found |= {key: _mean(getattr(joined, key)) for key in ("clipped_r", "clipped_d", "gap")}
            found |= _quantiles("r", joined.r) | _quantiles("d", joined.d)
        for name, sight in seen.items() if self._per_layer else ():
            found |= {f"{name}/{key}_q50": getattr(sight, key).median().item() for key in ("r", "d")}
            found |= {f"{name}/{key}": _mean(getattr(sight, key)) for key in ("clipped_r", "clipped_d")}
        return {self._prefix + key: value for key, value in found.items()}

    def _warn(self, clipped: Mapping[str, float], still: Sequence[str], rejecting: Sequence[str]) -> None:
        for name, layer in self._layers.items():
            limits = _limits_of(layer)
            settled = limits == self._limits.get(name) and limits != (1.0, 0.0)
            clips = settled and clipped.get(name, 0.0) > _MANY
            self._limits[name] = limits
            self._clipping[name] = self._clipping[name] + 1 if clips else 0
            self._standing[name] = self._standing[name] + 1 if name in still else 0
            self._rejecting[name] = self._rejecting[name] + 1 if name in rejecting else 0
        self._warn_once(
            self._clipping, f"clip more than {_MANY:.0%} of their channels; diagnose(model, batches) says why"
        )
        self._warn_once(
            self._rejecting, "reject their batches, which hold inf or NaN, so their statistics stand still"
        )
        self._warn_once(
            Counter({name: times for name, times in self._standing.items() if not self._rejecting[name]}),
            "are not frozen, but their statistics stand still; is their momentum 0?",
        )

    def _warn_once(self, times: Counter[str], what: str) -> None:
        names = [name for name in self._layers if times[name] >= self._patience]
        if names and what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"step {self._step}, {self._patience} samples on end: {len(names)} norm layers, "
                f"the first {names[0]!r}, {what}",
                RenormifyWarning,
                stacklevel=5,
            )


def _read(layer: Any) -> _Reading:
    tracked = getattr(layer, "num_batches_tracked", None)  # a frozen layer, thawed, counts none
    mean, var = (
        statistic.detach().cpu().to(torch.float64, copy=True)
        for statistic in (layer.running_mean, layer.running_var)
    )
    rejected = int(layer.rejected_batches) if is_batch_renorm(layer) else 0
    return _Reading(mean, var, None if tracked is None else int(tracked), rejected, layer.training)


def _seen(layer: Any, before: _Reading, after: _Reading) -> _Seen | None:
    """What the movement of a layer's statistics tells of its batch; None where nothing has moved."""
    alpha = _share_of_batches(layer.momentum, before.tracked, after.tracked)
    if alpha == 0 or torch.equal(before.mean, after.mean):
        return None
    variance, growth = before.var + layer.eps, (after.var + layer.eps) / (before.var + layer.eps)
    d = (after.mean - before.mean) / (alpha * variance.sqrt())
    if not _is_unbiased(layer):
        r = 1 + (growth.sqrt() - 1) / alpha
    else:
        r = (1 + (growth - 1) / alpha).clamp(min=0).sqrt()
    r_max, d_max = _limits_of(layer)
    kept_r, kept_d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
    gap = torch.hypot(r - kept_r, d - kept_d) if is_batch_renorm(layer) else torch.hypot(r - 1, d)
    return _Seen(r, d, (r > r_max) | (r < 1 / r_max), d.abs() > d_max, gap)


def _is_unbiased(layer: Any) -> bool:
    """Whether it averages the unbiased variance, as BatchNorm does."""
    return getattr(layer, "stat", "var") == "var"


def _share_of_batches(momentum: float | None, before: int | None, after: int | None) -> float:
    """The share that the batches in between have in the running statistics; zero for none."""
    batches = 1 if before is None or after is None else after - before
    if batches <= 0:
        return 0.0
    if momentum is None:
        return batches / after if after else 0.0
    return 1 - (1 - momentum) ** batches


def _limits_of(layer: nn.Module) -> tuple[float, float]:
    return (layer.r_max, layer.d_max) if is_batch_renorm(layer) else (_DEFAULTS.r_max, _DEFAULTS.d_max)


def _quantiles(name: str, values: Tensor) -> dict[str, float]:
    marks = torch.quantile(values, values.new_tensor(list(_QUANTILES.values())))
    return {f"{name}_{key}": mark for key, mark in zip(_QUANTILES, marks.tolist(), strict=True)}


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
