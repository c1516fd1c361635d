"""How converted layers train."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from renormify.errors import InputError
from renormify.functional import STATS

__all__ = ["Momentum", "Settings", "check_whole"]

Momentum = float | None | Literal["keep"]


@dataclass(frozen=True)
class Settings:
    """How converted layers train; see :func:`renormify.convert` for the fields.

    Raises:
        InputError: for one out of range.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    momentum: Momentum = 0.01
    stat: str = "sigma"
    include_frozen: bool = False

    def __post_init__(self) -> None:
        if not _at_least(self.r_max, 1):
            raise InputError(f"r_max must be a number of at least 1 (got {self.r_max!r})")
        if not _at_least(self.d_max, 0):
            raise InputError(f"d_max must be a number of at least 0 (got {self.d_max!r})")
        if self.stat not in STATS:
            raise InputError(f"stat must be one of {', '.join(STATS)} (got {self.stat!r})")
        momentum = self.momentum
        if momentum is not None and momentum != "keep" and not (_at_least(momentum, 0) and momentum <= 1):
            raise InputError(f"momentum must be a number from 0 to 1, None or 'keep' (got {momentum!r})")


def _at_least(value: object, least: float) -> bool:
    return isinstance(value, Real) and float(value) >= least


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Checks a number of steps or batches.

    Raises:
        InputError: it is no whole number, or too small.
    """
    try:
        sound = operator.index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        sound = False
    if not sound:
        raise InputError(f"{name} must be a whole number of at least {least} (got {value!r:.80})")
