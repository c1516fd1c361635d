"""The noise of one output, channel by channel, and what a file may therefore differ by.

The noise is the error of torch's own forward against the float64 model. Channels are the entries of axis 1:
one may be a million times as large as the next, and noise with it, so each is measured by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FALLBACK", "Noise", "comparable", "largest_of", "measure"]

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


@dataclass(frozen=True)
class Noise:
    """What is known of the noise of one output, over all batch sizes.

    Attributes:
        by_channel: whether axis 1 is told apart; it is where it has one size at every batch size.
        floor: the largest error, or None without a float64 model.
        allowed: for each channel, how far an element may be off.
        spread: for each channel, and last for the whole output, how far the elements may be off in the root
            mean square; None without a float64 model.
    """

    by_channel: bool
    floor: float | None
    allowed: Tensor
    spread: Tensor | None

    def tolerance(self, like: Tensor) -> Tensor:
        """Return what each element of ``like`` may be off by."""
        allowed = self.allowed.reshape(1, -1, *[1] * (like.ndim - 2)) if self.by_channel else self.allowed
        return allowed.expand(like.shape) if like.ndim else allowed.reshape(())

    def spread_beyond(self, difference: Tensor, noise: Tensor) -> str:
        """Say that the elements are together farther off than noise would have them, or "".

        Args:
            difference: how far each is off.
            noise: torch's own errors in the same elements. A channel is judged by itself only where it shows
                noise in as many as are needed: one that a ReLU holds at 0 all but always does not.
        """
        if self.spread is None or difference.numel() < SPREAD_ELEMENTS:
            return ""
        ours, theirs = _rows(noise, self.by_channel), _rows(difference, self.by_channel)
        # Rows differ: a channel may be alive in this batch and hardly in the others.
        allowed = self.spread[:-1].maximum(SPREAD_FACTOR * _root_mean_square(ours))
        many = ours.count_nonzero(1) >= SPREAD_ELEMENTS
        allowed = torch.cat([torch.where(many, allowed, math.inf), self.spread[-1:]])
        spread = torch.cat([_root_mean_square(theirs), _root_mean_square(difference.reshape(1, -1))])
        excess = spread - allowed
        if not bool((excess > 0.0).any()):
            return ""
        worst = int(excess.argmax())
        where = f" in channel {worst}" if self.by_channel and worst < len(theirs) else ""
        return (
            f"the root mean square of the differences is {float(spread[worst]):.3g}{where} where noise "
            f"explains {float(allowed[worst]):.3g}"
        )


def measure(own: list[Tensor], truth: list[Tensor] | None) -> Noise:
    """Measure the noise of one output.

    Args:
        own: the model's own output at each batch size.
        truth: the float64 model's, or None where there is no such model.
    """
    dtype = own[0].dtype
    whole_largest = max(largest_of(tensor) for tensor in own)
    if truth is None:
        fallback = FALLBACK.get(dtype, FALLBACK[torch.float32]) * whole_largest
        return Noise(False, None, torch.tensor([fallback], dtype=torch.float64), None)
    by_channel = own[0].ndim > 1 and len({(tensor.ndim, tensor.shape[1:2]) for tensor in own}) == 1
    values = torch.cat([_rows(_finite(tensor), by_channel) for tensor in own], 1)
    errors = torch.cat(
        [_rows(_finite(mine.double() - real), by_channel) for mine, real in zip(own, truth, strict=True)],
        1,
    )
    eps = torch.finfo(dtype).eps
    floors, ulps = _largest(errors), eps * _largest(values)
    whole_floor, whole_ulp = float(_largest(errors.reshape(1, -1))), eps * whole_largest
    # Where an activation has cut the noise off, an error of 0 says nothing of the others.
    count = errors.count_nonzero(1).double()
    typical = (errors.square().sum(1) / count.clamp(min=1.0)).sqrt()
    beyond = (count * (CHANCE ** (-2.0 / count.clamp(min=1.0)) - 1.0)).sqrt()
    own_allowance = torch.maximum(beyond * typical, NOISE_FACTOR * floors) + NOISE_ULPS * ulps
    # A channel without noise is judged by the others', and none more loosely than by the largest. The rows of
    # one column err alike, so by luck a column may show little: noise in proportion to its size is granted.
    whole = NOISE_FACTOR * whole_floor + NOISE_ULPS * whole_ulp
    own_allowance = own_allowance.maximum(whole * _largest(values) / max(whole_largest, 1e-300))
    allowed = torch.where(count > 0.0, own_allowance, math.inf).clamp(max=whole)
    spread = torch.cat(
        [
            SPREAD_FACTOR * _root_mean_square(errors) + SPREAD_ULPS * ulps,
            SPREAD_FACTOR * _root_mean_square(errors.reshape(1, -1)) + SPREAD_ULPS * whole_ulp,
        ]
    )
    return Noise(by_channel, whole_floor, allowed, spread)


def comparable(tensor: Tensor) -> bool:
    """Tell whether a tensor is a plain array of real floats, in which there can be noise."""
    return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested


def largest_of(tensor: Tensor) -> float:
    """Return the largest finite absolute value; 0 where there is none."""
    return float(_largest(_finite(tensor).reshape(1, -1)))


def _rows(tensor: Tensor, by_channel: bool) -> Tensor:
    """Return a row for each channel."""
    return tensor.movedim(1, 0).flatten(1) if by_channel else tensor.reshape(1, -1)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt().nan_to_num(nan=0.0, posinf=math.inf)
