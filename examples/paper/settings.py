"""What one run is, and the runs that the study consists of."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""Of runs, by their :meth:`Run.key`."""

PROTOCOL = 1
"""Goes up when the way a run is done changes, so that results of the former way no longer count."""

LABELS = 10
RENORM = ("br", "pooled", "constant")
MOVING = ("bn", *RENORM)
"""Norms whose running statistics move."""

AS_IS, AFTERWARDS = "test", "test_recalibrated"
"""What the test images say of a run: at the end of training, and with statistics counted anew after it."""

TUNING_SEEDS = (1000, 1001, 1002)
UNBOUNDED = 1e6


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, whole and reproducible.

    The same settings give the same result, to the last bit, with the same versions and instruction set.

    Attributes:
        network: "plain6", "plain14" and "plain20", so many convolutions in a row, are trained from scratch;
            "efficientnet_lite0" and "mobilenet_v2" are fine-tuned.
        norm: "bn" and "br" are BatchNorm and Batch Renorm; "pooled" is Batch Renorm whose running statistics
            move by those of all images of a step together; "constant" has the same forward, and no gradient
            passes through its statistics; "frozen" is BatchNorm that keeps its pretrained statistics; "gn" is
            GroupNorm in its place.
        microbatch: images that are normalised together.
        labels: how many of the ten labels a microbatch is drawn from; 10 means i.i.d.
        batch: images of an optimisation step, over whose microbatches gradients are averaged.
        steps: of the optimiser.
        lr: its learning rate at the peak; a cosine leads it to 0.
        momentum: of the running statistics.
        r_max: the final limit of r.
        d_max: the final limit of d.
        ramp: whether the limits rise as in the paper, or are there from the start.
        stat: what Batch Renorm averages, "sigma" or "var".
        recalibrate: whether the running statistics are first counted on unlabelled training images.
        held: the share of the steps after which they are counted so and held still from then on; 1: never.
        seed: of the weights and of the order of the images.
        test: how many of the 10,000 test images are used; 0 for runs that choose settings.
        protocol: :data:`PROTOCOL`.
    """

    network: str
    norm: str
    microbatch: int
    labels: int = LABELS
    batch: int
    steps: int
    lr: float
    momentum: float
    r_max: float = 3.0
    d_max: float = 5.0
    ramp: bool = True
    stat: str = "sigma"
    recalibrate: bool = False
    held: float = 1.0
    seed: int = 0
    test: int = 10_000
    protocol: int = PROTOCOL

    @property
    def from_scratch(self) -> bool:
        return self.network.startswith("plain")

    @property
    def is_counted_afterwards(self) -> bool:
        """Whether its running statistics move, and were not counted first."""
        return self.norm in MOVING and not self.recalibrate

    def key(self) -> str:
        """The settings in one line, the same for equal ones."""
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        return cls(**values)


def _missing(runs: Sequence[Run], results: Results) -> list[Run]:
    return [run for run in runs if run.key() not in results]


@dataclass(frozen=True)
class Arm:
    """What is compared: runs that differ in their seed alone, and the settings to choose for them.

    Args:
        name: in the tables.
        base: without a choice made.
        grid: values of fields of :class:`Run`, each combination of which is tried on the validation images.
        ranges: the values that a field of the grid may take, in order. The best so far has its neighbours
            tried too, until none is better, so that no choice is one that the grid's edge has made.
        again: how many of the best are tried again, with each further seed, two learning rates at least; 0
            for none. What is then the best has its neighbours tried too.
        like: an arm whose choice this one takes over.
    """

    name: str
    base: Run
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    again: int = 0
    like: Arm | None = None

    def tried(self, results: Results) -> list[Run]:
        """Each combination, once, and the neighbours that the results lead to, as far as these go."""
        runs = list(self._grid()) if self.grid else []
        while new := self._led_to(runs, results):
            runs += new
        return runs

    def _grid(self) -> Iterator[Run]:
        for point in itertools.product(*self.grid.values()):
            yield replace(self.base, **dict(zip(self.grid, point, strict=True)), seed=TUNING_SEEDS[0], test=0)

    def _led_to(self, runs: Sequence[Run], results: Results) -> list[Run]:
        """What is to be tried beside the best of some runs, and then beside the best with all seeds."""
        if not runs or _missing(runs, results):
            return []
        best = self._best(runs, results)
        new = self._neighbours(best[0], runs)
        if not new and not _missing(self._again(best), results):
            means = self._means(runs, results)
            new = self._neighbours(max(means, key=lambda run: means[run]), runs)
        return new

    def _neighbours(self, run: Run, tried: Sequence[Run]) -> list[Run]:
        found = []
        for name, values in self.ranges.items():
            at = values.index(getattr(run, name))
            for value in (*values[max(0, at - 1) : at], *values[at + 1 : at + 2]):
                found.append(replace(run, **{name: value}))
        return [run for run in found if run not in tried]

    def _best(self, runs: Sequence[Run], results: Results) -> list[Run]:
        """By one seed, those that are worth further ones, or all.

        Where these differ in momentum alone, which never touches how BatchNorm trains, the best with another
        learning rate or share held is one of them.
        """
        ranked = sorted(runs, key=lambda run: -results[run.key()]["validation"])
        best = ranked[: self.again or None]
        trained = {(run.lr, run.held) for run in best}
        if len(trained) == 1:
            best += [run for run in ranked if (run.lr, run.held) not in trained][:1]
        return best

    def _again(self, runs: Sequence[Run]) -> list[Run]:
        """The same, with the further seeds."""
        seeds = TUNING_SEEDS[1:] if self.again else ()
        return [replace(run, seed=seed) for run in runs for seed in seeds]

    def _means(self, runs: Sequence[Run], results: Results) -> dict[Run, float]:
        """The validation accuracy over all seeds, of those that have been among the best at some time."""
        seeds = {run: [run, *self._again([run])] for run in runs}
        return {
            run: statistics.fmean(results[each.key()]["validation"] for each in of)
            for run, of in seeds.items()
            if not _missing(of, results)
        }

    def due(self, results: Results) -> list[Run]:
        """What is to be run next, for a choice to be made; nothing where it is made."""
        tried = self.tried(results)
        return _missing(tried, results) or _missing(self._again(self._best(tried, results)), results)

    def is_tuned(self, results: Results) -> bool:
        """Whether all is there that the choice is made from."""
        return not (self.like or self).due(results)

    def validated(self, results: Results) -> dict[Run, float]:
        """Those that the choice is between, each with its mean accuracy over the seeds."""
        return self._means(self.tried(results), results)

    def chosen(self, results: Results) -> Run:
        """The combination with the best validation accuracy, the first among equals."""
        if self.like:
            chosen = self.like.chosen(results)
            return replace(self.base, **{name: getattr(chosen, name) for name in self.like.grid})
        found = self.validated(results)
        best = max(found, key=lambda run: found[run]) if found else self.base
        return replace(self.base, **{name: getattr(best, name) for name in self.grid})

    def finals(self, results: Results, seeds: int) -> list[Run]:
        """The runs whose test accuracy is reported."""
        chosen = self.chosen(results)
        return [replace(chosen, seed=seed) for seed in range(seeds)]


@dataclass(frozen=True)
class Study:
    """All arms, by finding.

    Attributes:
        main: findings 1 to 4.
        ablations: by part of the study the names of the arms to vary, and how; the first way is none.
        finetuned: network, microbatch and labels of what is fine-tuned.
        finetuning: finding 7.
        seeds: of the main arms.
        few_seeds: of the ablations and of the fine-tuning.
    """

    main: tuple[Arm, ...]
    ablations: Mapping[str, tuple[tuple[str, ...], Mapping[str, Mapping[str, Any]]]]
    finetuned: tuple[tuple[str, int, int], ...]
    finetuning: tuple[Arm, ...]
    seeds: int
    few_seeds: int

    def arm(self, name: str) -> Arm:
        return next(arm for arm in (*self.main, *self.finetuning) if arm.name == name)

    def seeds_of(self, arm: Arm) -> int:
        """How many runs an arm has."""
        return self.seeds if arm in self.main else self.few_seeds

    def ablation(
        self, name: str, variants: Mapping[str, Mapping[str, Any]], results: Results
    ) -> dict[str, list[Run]]:
        """The runs of each variant of an arm, with its choice of learning rate and momentum."""
        chosen = self.arm(name).chosen(results)
        return {
            variant: [replace(chosen, **changes, seed=seed) for seed in range(self.few_seeds)]
            for variant, changes in variants.items()
        }


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as chosen": {},
    "r alone": {"d_max": 0.0},
    "d alone": {"r_max": 1.0},
    "limits 1.5 and 2.5": {"r_max": 1.5, "d_max": 2.5},
    "unbounded, no ramp": {"r_max": UNBOUNDED, "d_max": UNBOUNDED, "ramp": False},
    "momentum 0.1": {"momentum": 0.1},
    "momentum 0.01": {"momentum": 0.01},
    "momentum 0.001": {"momentum": 0.001},
    "average of the variance": {"stat": "var"},
    "no ramp": {"ramp": False},
    "recalibrated first": {"recalibrate": True},
    "no ramp, recalibrated first": {"ramp": False, "recalibrate": True},
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "as chosen": {},
    "momentum 0.03": {"momentum": 0.03},
    "momentum 0.01": {"momentum": 0.01},
    "momentum 0.003": {"momentum": 0.003},
    "average of the variance": {"stat": "var"},
    "limits 1.5 and 2.5": {"r_max": 1.5, "d_max": 2.5},
    "unbounded": {"r_max": UNBOUNDED, "d_max": UNBOUNDED},
    "the paper's ramp": {"ramp": True},
}
"""What `renormify()` might do with a pretrained model."""


def scratch_name(network: str, norm: str, microbatch: int, labels: int = LABELS, held: bool = False) -> str:
    drawn = "" if labels == LABELS else ", one label" if labels == 1 else f", {labels} labels"
    return f"{network}: {norm}, microbatch {microbatch}{drawn}{', held' if held else ''}"


def finetune_name(network: str, norm: str, microbatch: int, labels: int, recalibrate: bool) -> str:
    drawn = "shuffled" if labels == LABELS else "one label"
    first = ", recalibrated" if recalibrate else ""
    return f"{network}: {norm}{first}, microbatch {microbatch}, {drawn}"


SCRATCH = Run(network="plain14", norm="bn", microbatch=32, batch=256, steps=400, lr=0.05, momentum=0.1)
SIZES = (32, 4, 2)
BIASED = ((32, 2), (8, 2), (32, 1), (8, 1))
CELLS: Mapping[str, Sequence[tuple[int, int]]] = {
    "plain20": tuple((size, LABELS) for size in SIZES),
    "plain14": (*((size, LABELS) for size in SIZES), *BIASED),
    "plain6": ((32, LABELS), (8, 1)),
}
"""Microbatch and labels of what is trained from scratch, with BatchNorm and with Batch Renorm."""

CONTROLS = (("pooled", 8, LABELS), ("pooled", 8, 1), ("constant", 8, LABELS), ("constant", 8, 1))
"""With limits that never bind: training's forward is evaluation's, whatever the microbatches. These make
themselves felt in the gradient alone of "pooled"; of "constant" in nothing but which images a step has."""

SCRATCH_RANGES = {
    "lr": (0.000390625, 0.00078125, 0.0015625, 0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2),
    "momentum": (0.01, 0.03, 0.1, 0.3, 1.0),
    "held": (0.0, 0.0625, 0.125, 0.25, 0.5, 0.75),
}
SCRATCH_GRID = {"lr": (0.0125, 0.025, 0.05, 0.1), "momentum": (0.1, 0.03)}
HELD_GRID = {"lr": (0.0125, 0.025, 0.05, 0.1), "momentum": (0.1,), "held": (0.5, 0.75)}
"""Of microbatches with one label, where their statistics are held still from some step on."""

FINETUNE = Run(
    network="efficientnet_lite0",
    norm="bn",
    microbatch=2,
    batch=32,
    steps=200,
    lr=1e-3,
    momentum=0.01,
    ramp=False,
)
ARMS = (
    ("bn", False),
    ("bn", True),
    ("frozen", False),
    ("frozen", True),
    ("gn", False),
    ("br", False),
    ("br", True),
)
FINETUNE_RANGES = {
    "lr": (3.125e-5, 1.25e-4, 5e-4, 2e-3, 8e-3, 3.2e-2, 1.28e-1),
    "momentum": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
}
WITH_MOMENTUM = {"lr": (5e-4, 2e-3), "momentum": (0.03, 0.01)}
WITHOUT = {"lr": (5e-4, 2e-3)}
SEARCHED = tuple(("efficientnet_lite0", size, labels) for size in (2, 8) for labels in (LABELS, 1))
REPEATED = tuple(("mobilenet_v2", 2, labels) for labels in (LABELS, 1))
"""With the settings that the other network's runs led to."""


def _scratch(run: Run, *, tuned: bool) -> tuple[Arm, ...]:
    unlimited = replace(run, r_max=UNBOUNDED, d_max=UNBOUNDED, ramp=False, recalibrate=True)
    compared = [
        replace(run, network=network, norm=norm, microbatch=microbatch, labels=labels)
        for network, cells in CELLS.items()
        for microbatch, labels in cells
        for norm in ("bn", "br")
    ]
    controls = [
        replace(unlimited, norm=norm, microbatch=size, labels=labels) for norm, size, labels in CONTROLS
    ]
    held = [replace(base, held=0.5) for base in compared if base.labels == 1]
    arms = []
    for base in (*compared, *controls, *held):
        grid = HELD_GRID if base.held < 1 else SCRATCH_GRID
        name = scratch_name(base.network, base.norm, base.microbatch, base.labels, base.held < 1)
        arms.append(_arm(name, base, grid if tuned else {}, SCRATCH_RANGES, again=2))
    return tuple(arms)


def _arm(
    name: str,
    base: Run,
    grid: Mapping[str, Sequence[float]],
    ranges: Mapping[str, Sequence[float]],
    again: int = 0,
) -> Arm:
    return Arm(name, base, grid, {key: ranges[key] for key in grid}, again)


def _finetune(run: Run, cells: Sequence[tuple[str, int, int]], tuned: bool) -> tuple[Arm, ...]:
    arms: dict[str, Arm] = {}
    for (network, size, labels), (norm, recalibrate) in itertools.product(cells, ARMS):
        # Where neither the norm nor the order of the images knows of microbatches, one run serves all sizes.
        known = size if norm in MOVING or labels != LABELS else run.batch
        base = replace(
            run, network=network, norm=norm, microbatch=known, labels=labels, recalibrate=recalibrate
        )
        name = finetune_name(network, norm, size, labels, recalibrate)
        if not tuned:
            arms[name] = Arm(name, base)
        elif (network, size, labels) in REPEATED:
            searched = arms[finetune_name(SEARCHED[0][0], norm, size, labels, recalibrate)]
            arms[name] = Arm(name, base, like=searched)
        else:
            arms[name] = _arm(name, base, WITH_MOMENTUM if norm in MOVING else WITHOUT, FINETUNE_RANGES)
    return tuple(arms.values())


ABLATED = (
    scratch_name("plain20", "br", 32),
    scratch_name("plain20", "br", 2),
    scratch_name("plain14", "br", 8, 2),
    scratch_name("plain14", "br", 8, 1),
)

FOR_DEFAULTS = tuple(
    finetune_name(SEARCHED[0][0], "br", 2, labels, recalibrate=False) for labels in (LABELS, 1)
)

FULL = Study(
    main=_scratch(SCRATCH, tuned=True),
    ablations={"ablation": (ABLATED, VARIANTS), "defaults": (FOR_DEFAULTS, DEFAULTS)},
    finetuned=SEARCHED + REPEATED,
    finetuning=_finetune(FINETUNE, SEARCHED + REPEATED, tuned=True),
    seeds=5,
    few_seeds=3,
)

QUICK = Study(
    main=_scratch(replace(SCRATCH, steps=30, test=1_000), tuned=False),
    ablations={
        "ablation": (ABLATED[2:3], {name: VARIANTS[name] for name in ("as chosen", "no ramp")}),
        "defaults": (FOR_DEFAULTS[:1], {name: DEFAULTS[name] for name in ("as chosen", "momentum 0.003")}),
    },
    finetuned=SEARCHED[:2],
    finetuning=_finetune(replace(FINETUNE, steps=6, test=250), SEARCHED[:2], tuned=False),
    seeds=1,
    few_seeds=1,
)
