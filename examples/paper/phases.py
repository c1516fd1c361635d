"""The order in which a study is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paper.settings import AFTERWARDS, Arm, Results, Run, Study


@dataclass(frozen=True)
class Phase:
    """Runs that need nothing of each other.

    Attributes:
        title: for the progress bar.
        runs: those done already, too.
        afterwards: whether the tables ask how they do with statistics counted anew after training.
    """

    title: str
    runs: Sequence[Run]
    afterwards: bool = True

    def due(self, results: Results) -> list[Run]:
        """What is to be run, once each: what has no result, or one without what the tables ask for."""
        return [run for run in dict.fromkeys(self.runs) if not self._is_done(run, results.get(run.key()))]

    def _is_done(self, run: Run, result: Mapping[str, Any] | None) -> bool:
        asked = self.afterwards and run.test and run.is_counted_afterwards
        return result is not None and (not asked or AFTERWARDS in result)


def phases(study: Study, part: str, results: Results) -> Iterator[Phase]:
    """What is to be run, each phase decided when those before it are done."""
    if part in study.ablations:
        names, variants = study.ablations[part]
        yield from _choosing(part, [study.arm(name) for name in names], results)
        for name in names:
            chosen, *others = study.ablation(name, variants, results).values()
            yield Phase(f"{part}: {name}", chosen)  # which are finals of the arm, too
            yield Phase(f"{part}: {name}, varied", [run for runs in others for run in runs], False)
        return
    arms = study.main if part == "main" else study.finetuning
    yield from _choosing(part, arms, results)
    seeds = study.seeds if part == "main" else study.few_seeds
    for seed in range(seeds):  # seed by seed, so that a study in parts has all arms
        yield Phase(f"{part}, seed {seed}", [arm.finals(results, seeds)[seed] for arm in arms])


def _choosing(of: str, arms: Sequence[Arm], results: Results) -> Iterator[Phase]:
    while runs := [run for arm in arms for run in arm.due(results)]:
        yield Phase(f"settings of {of}", runs)
