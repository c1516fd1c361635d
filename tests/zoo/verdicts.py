"""What the judge is given and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a forward, in training and in evaluation."""


@dataclass(frozen=True)
class Subject:
    """A model to be swept.

    Attributes:
        name: ``library:model``.
        build: makes it, with random weights, on the default device.
        calls: labelled inputs of batch 2 to try, smallest first, for a model that was built.
    """

    name: str
    build: Callable[[], nn.Module]
    calls: Callable[[nn.Module], Iterable[tuple[str, Call]]]


class Converter(Protocol):
    """What is judged: renormify, or a bad one in the judge's own tests."""

    def convert(self, model: nn.Module, *, momentum: float = 0.01, inplace: bool = False) -> Any: ...

    def revert(self, model: nn.Module, *, inplace: bool = False) -> nn.Module: ...


@dataclass
class Verdict:
    """What was found about one model; it passes where nothing failed.

    Attributes:
        sites: how many norm layers the judge's own walk finds.
        converted: how many of them the converter says it converted.
        skipped: why others were not, and how many.
        failures: each broken promise, by name.
        notes: what is not the converter's doing, but limits what was seen.
        unfit: why the model could not be judged at all; empty where it was.
        facts: figures for the record.
    """

    sites: int = 0
    converted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unfit: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def require(self, holds: bool, complaint: str) -> bool:
        if not holds:
            self.failures.append(complaint)
        return holds

    def enter(self, report: Any, sites: dict[str, nn.Module]) -> tuple[str, ...]:
        """Takes a report into the books, holding it against the walk; returns what it says is converted."""
        self.sites = len(sites)
        if report is None:
            self.require(not sites or bool(self.failures), "sites: nothing is reported")
            return ()
        names = Counter(site.name for site in report.sites)
        self.require(not (lost := set(sites) - set(names)), f"sites: not reported: {listed(lost)}")
        self.require(not (new := set(names) - set(sites)), f"sites: no norm layer is at {listed(new)}")
        twice = [name for name, count in names.items() if count > 1]
        self.require(not twice, f"sites: reported more than once: {listed(twice)}")
        mute = [s.name for s in report.sites if s.action != "converted" and not s.reason]
        self.require(not mute, f"sites: skipped without a reason: {listed(mute)}")
        reasons = Counter(site.reason for site in report.sites if site.action != "converted")
        self.converted, self.skipped = len(report.converted), dict(reasons.most_common())
        return tuple(name for name in report.converted if name in sites)


def listed(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    ordered = sorted(name or "the root" for name in names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
