"""Means with 95 % intervals, and paired comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Mean:
    """A mean and half of its 95 % interval by Student's t; a single value has none."""

    value: float
    half: float

    def percent(self) -> str:
        """In percent, as ``88.1 ± 0.3``."""
        spread = "" if math.isnan(self.half) else f" ± {100 * self.half:.1f}"
        return f"{100 * self.value:.1f}{spread}"


def mean(values: Sequence[float]) -> Mean:
    value = statistics.fmean(values)
    if len(values) < 2:
        return Mean(value, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(value, float(stats.t.ppf(0.975, len(values) - 1)) * error)


def difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Of pairs, seed by seed: first less second."""
    return mean([a - b for a, b in zip(first, second, strict=True)])


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float] | None:
    """The ratio of two means of pairs, and its 95 % interval by Fieller's theorem.

    The interval holds all ratios q for which a paired t-test finds no difference between the numerator and q
    times the denominator.

    Returns:
        Ratio, lower and upper end; None where the denominator cannot be told from 0, since the interval then
        has no ends.
    """
    n = len(numerator)
    if n < 2:
        return None
    above, below = statistics.fmean(numerator), statistics.fmean(denominator)
    t2 = float(stats.t.ppf(0.975, n - 1)) ** 2 / n
    a = below**2 - t2 * statistics.variance(denominator)
    b = above * below - t2 * statistics.covariance(numerator, denominator)
    c = above**2 - t2 * statistics.variance(numerator)
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b**2 - a * c))
    return above / below, (b - root) / a, (b + root) / a


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the paired t-test, two-sided; NaN for a single pair or pairs that all differ alike."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    if len(gaps) < 2 or statistics.pstdev(gaps) == 0:
        return math.nan
    return float(stats.ttest_rel(first, second).pvalue)


def p_text(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
