"""The noise of one output, channel by channel, and what a file may therefore differ by.

The noise is the error of torch's own forward against the float64 model. Channels are the entries of axis 1,
and, as a model may have them last, of the last axis: one may be a million times as large as the next, and
noise with it, so each is measured by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FALLBACK", "Channels", "Noise", "comparable", "largest_of", "measure"]

#: The error allowed, relative to the output's largest value, where there is no float64 model to compare with.
FALLBACK = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: The error allowed an element, in floors. Another order of summation, as another runtime has it, makes
#: errors of the floor's size; the largest of two such sets differ by a small factor (2.0 over 12 networks).
NOISE_FACTOR = 4.0
#: And, in units in the last place of the largest value, for where the floor happens to be 0.
NOISE_ULPS = 4.0
#: The largest of a few errors says little about the next one. A channel with few is allowed what an error of
#: its root mean square exceeds with this probability, by Student's t for as many: 6.4 times the root mean
#: square for very many, 25 times for ten (Linear at 1, 2 and 7 rows).
CHANCE = 1e-9
#: The root mean square of many elements hardly varies (a ratio of 1.6 over the same networks), so it is held
#: closer: a small error in every element is a fault that the largest error does not show.
SPREAD_FACTOR = 3.0
SPREAD_ULPS = 1.0
SPREAD_ELEMENTS = 100
#: That holds for errors that have nothing to do with each other. Over an even ground, or where one weight's
#: last place moves a whole channel, they are few however many the elements; in fewer than these nothing is
#: held closer (that noise of 16 exceeds three times that of 48 has a chance of 1e-10).
SPREAD_INDEPENDENT = 16.0


@dataclass(frozen=True)
class Channels:
    """The noise along one axis of an output.

    Attributes:
        axis: 1, or -1 for the last.
        allowed: for each channel, how far an element may be off.
        spread: for each channel, how far the elements may be off in the root mean square; infinite where
            their errors are too much alike to tell.
    """

    axis: int
    allowed: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Noise:
    """What is known of the noise of one output, over all batch sizes.

    Attributes:
        floor: the largest error, or None without a float64 model.
        allowed: how far any element may be off.
        spread: how far the elements may be off in the root mean square; likewise, and infinite also without a
            float64 model.
        channels: the noise along each axis that has one size at every batch size.
    """

    floor: float | None
    allowed: float
    spread: float
    channels: tuple[Channels, ...] = ()

    def tolerance(self, like: Tensor) -> Tensor:
        """Return what each element of ``like`` may be off by: what all of its channels allow."""
        tolerance = torch.full(like.shape, self.allowed, dtype=torch.float64)
        for channels in self.channels:
            shape = [1] * like.ndim
            shape[channels.axis] = -1
            tolerance = tolerance.minimum(channels.allowed.reshape(shape))
        return tolerance

    def spread_beyond(self, difference: Tensor, noise: Tensor) -> str:
        """Say that the elements are together farther off than noise would have them, or "".

        Args:
            difference: how far each is off.
            noise: torch's own errors in the same elements. A channel is judged by itself only where it shows
                noise in as many as are needed: one that a ReLU holds at 0 all but always does not.
        """
        if difference.numel() < SPREAD_ELEMENTS:
            return ""
        for channels in self.channels:
            ours, theirs = _rows(noise, channels.axis), _rows(difference, channels.axis)
            # Rows differ: a channel may be alive in this batch and hardly in the others.
            allowed = channels.spread.maximum(SPREAD_FACTOR * _root_mean_square(ours))
            allowed = torch.where(ours.count_nonzero(1) >= SPREAD_ELEMENTS, allowed, math.inf)
            found = _root_mean_square(theirs)
            worst = int((found - allowed).argmax())
            if found[worst] > allowed[worst]:
                where = (
                    f" in channel {worst}" if channels.axis == 1 else f" in entry {worst} of the last axis"
                )
                return _beyond(float(found[worst]), float(allowed[worst]), where)
        spread = float(_root_mean_square(difference.reshape(1, -1)))
        return _beyond(spread, self.spread) if spread > self.spread else ""


def measure(own: list[Tensor], truth: list[Tensor] | None) -> Noise:
    """Measure the noise of one output.

    Args:
        own: the model's own output at each batch size, and what it might as well have been.
        truth: the float64 model's for each of them, or None where there is no such model.
    """
    dtype = own[0].dtype
    largest = max(largest_of(tensor) for tensor in own)
    if truth is None:
        return Noise(None, FALLBACK.get(dtype, FALLBACK[torch.float32]) * largest, math.inf)
    errors = [_finite(mine.double() - real) for mine, real in zip(own, truth, strict=True)]
    floor = max(largest_of(error) for error in errors)
    ulp = torch.finfo(dtype).eps * largest
    allowed = NOISE_FACTOR * floor + NOISE_ULPS * ulp
    flat = [error.reshape(1, -1) for error in errors]
    along = [_along(axis, own, errors, largest, allowed) for axis in _axes(own)]
    rows = [_rows(error, 1) for error in errors] if along else flat
    squares, independent = _independent(rows)
    # Channels err each by itself, the larger ones count for more (Welch and Satterthwaite).
    together = squares.sum().square() / (squares.square() / independent.clamp(min=1e-300)).sum().clamp(
        min=1e-300
    )
    spread = math.inf
    if together >= SPREAD_INDEPENDENT or not squares.any():
        spread = SPREAD_FACTOR * float(_root_mean_square(torch.cat(flat, 1))) + SPREAD_ULPS * ulp
    return Noise(floor, allowed, spread, tuple(along))


def _axes(own: list[Tensor]) -> list[int]:
    """Return the axes whose entries are told apart."""
    return [
        axis
        for axis, rank in ((1, 2), (-1, 3))
        if own[0].ndim >= rank and len({(tensor.ndim, tensor.shape[axis]) for tensor in own}) == 1
    ]


def _along(axis: int, own: list[Tensor], errors: list[Tensor], largest: float, most: float) -> Channels:
    """Measure the noise along an axis of an output whose elements may be off by ``most``."""
    values = torch.cat([_rows(_finite(tensor), axis) for tensor in own], 1)
    runs = [_rows(error, axis) for error in errors]
    rows = torch.cat(runs, 1)
    eps = torch.finfo(own[0].dtype).eps
    floors, ulps = _largest(rows), eps * _largest(values)
    # Where an activation has cut the noise off, an error of 0 says nothing of the others.
    count = rows.count_nonzero(1).double()
    typical = (rows.square().sum(1) / count.clamp(min=1.0)).sqrt()
    beyond = (count * (CHANCE ** (-2.0 / count.clamp(min=1.0)) - 1.0)).sqrt()
    allowed = torch.maximum(beyond * typical, NOISE_FACTOR * floors) + NOISE_ULPS * ulps
    # A channel without noise is judged by the others', and none more loosely than by the largest. The rows of
    # one column err alike, so by luck a column may show little: noise in proportion to its size is granted.
    allowed = allowed.maximum(most * _largest(values) / max(largest, 1e-300))
    allowed = torch.where(count > 0.0, allowed, math.inf).clamp(max=most)
    spread = SPREAD_FACTOR * _root_mean_square(rows) + SPREAD_ULPS * ulps
    squares, independent = _independent(runs)
    alike = (squares > 0.0) & (independent < SPREAD_INDEPENDENT)
    return Channels(axis, allowed, torch.where(alike, math.inf, spread))


def _independent(runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return for each row the mean square of its errors, and how many of a run are independent of each other.

    Independent errors have a mean that is as much smaller than they are as the root of their number.
    """
    rows = torch.cat(runs, 1)
    sums = torch.stack([run.sum(1).square() / max(run.shape[1], 1) for run in runs]).sum(0)
    squares, count = rows.square().sum(1), max(rows.shape[1], 1)
    return squares / count, squares / sums.clamp(min=1e-300)


def _beyond(spread: float, allowed: float, where: str = "") -> str:
    return (
        f"the root mean square of the differences is {spread:.3g}{where} where noise explains {allowed:.3g}"
    )


def comparable(tensor: Tensor) -> bool:
    """Tell whether a tensor is a plain array of real floats, in which there can be noise."""
    return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested


def largest_of(tensor: Tensor) -> float:
    """Return the largest finite absolute value; 0 where there is none."""
    return float(_largest(_finite(tensor).reshape(1, -1)))


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """Return a row for each channel."""
    return tensor.movedim(axis, 0).flatten(1)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt().nan_to_num(nan=0.0, posinf=math.inf)
