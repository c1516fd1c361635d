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


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the paired t-test, two-sided; NaN for a single pair or pairs that all differ alike."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    if len(gaps) < 2 or statistics.pstdev(gaps) == 0:
        return math.nan
    return float(stats.ttest_rel(first, second).pvalue)


def p_text(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
