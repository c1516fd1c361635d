"""The tables, from the results alone."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper.intervals import difference, mean, p_text, p_value, ratio
from paper.phases import Phase
from paper.records import Records, Result
from paper.settings import (
    AFTERWARDS,
    ARMS,
    AS_IS,
    BIASED,
    CELLS,
    CONTROLS,
    LABELS,
    MOVING,
    SIZES,
    Arm,
    Results,
    Study,
    finetune_name,
    scratch_name,
)

NAMES = {
    "bn": "BatchNorm",
    "br": "Batch Renorm",
    "pooled": "running averages over all images of a step",
    "constant": "the same, constant in the gradient",
    "frozen": "BatchNorm, frozen",
    "gn": "GroupNorm",
}
NETWORKS = {
    "plain6": "6 layers",
    "plain14": "14 layers",
    "plain20": "20 layers",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "mobilenet_v2": "MobileNetV2",
}
NONE = "to be run"
PLACE = ("processor", "system", "cores", "instructions")

BENCH = "python tests/bench/bench_layers.py --only layers,models --json examples/paper/bench.json"


def sections(study: Study, records: Records, bench: Path | None = None) -> dict[str, str]:
    """Each table by its name, in Markdown; what has not been run says so."""
    results = records.results
    return {
        "machines": machines(records),
        "microbatch": microbatch(study, results),
        "biased": biased(study, results),
        "controls": controls(study, results),
        "overfitting": overfitting(study, results),
        "cost": cost(bench),
        "ablation": ablation(study, results, "ablation"),
        "finetuning": finetuning(study, results),
        "comparisons": comparisons(study, results),
        "defaults": ablation(study, results, "defaults"),
        "deployment": deployment(study, results),
        "settings": settings(study, results),
    }


def fill(text: str, found: Mapping[str, str]) -> str:
    """Puts each table between its marks; a text without marks gets all of them at its end."""
    for name, table in found.items():
        marked = f"<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- end of {name} -->"
        if re.search(pattern, text, re.DOTALL):
            text = re.sub(pattern, lambda _, marked=marked: marked, text, flags=re.DOTALL)
        else:
            text += f"\n## {name}\n\n{marked}\n"
    return text


def finals(study: Study, arm: Arm, results: Results) -> list[Result] | None:
    """An arm's results by seed; None where a run is missing."""
    if not arm.is_tuned(results):
        return None
    runs = Phase(arm.name, arm.finals(results, study.seeds_of(arm)))
    return None if runs.due(results) else [results[run.key()] for run in runs.runs]


def values(found: Sequence[Result], key: str = AS_IS) -> list[float]:
    return [result[key] for result in found]


def score(found: Sequence[Result], key: str = AS_IS) -> str:
    """The mean of an arm in percent, and how many of its runs diverged."""
    diverged = sum(result["diverged"] for result in found)
    return mean(values(found, key)).percent() + (
        f" ({diverged} of {len(found)} diverged)" if diverged else ""
    )


def steps_to(found: Sequence[Result], level: float) -> float | None:
    """The first step at which the mean curve is at a level."""
    for points in zip(*(result["curve"] for result in found), strict=False):  # one that diverged ends sooner
        if statistics.fmean(accuracy for _, accuracy in points) >= level:
            return points[0][0]
    return None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scratch(
    study: Study,
    results: Results,
    network: str,
    norm: str,
    size: int,
    labels: int = LABELS,
    *,
    held: bool = False,
) -> list[Result] | None:
    """The results of an arm trained from scratch, by seed; None where a run is missing."""
    return finals(study, study.arm(scratch_name(network, norm, size, labels, held)), results)


def microbatch(study: Study, results: Results) -> str:
    """Findings 1 and 2."""
    rows = []
    for network in ("plain20", "plain14"):
        reference = scratch(study, results, network, "bn", 32)
        for size in SIZES:
            bn, br = (scratch(study, results, network, norm, size) for norm in ("bn", "br"))
            cells = [NONE] * 9
            if bn is not None and br is not None and reference is not None:
                counted = values(bn, AFTERWARDS)
                ends = values(reference), values(bn)
                ours, theirs = ("" if size == 32 else _share(*ends, won) for won in (values(br), counted))
                cells = [*_compared(bn, br), ours, _faster(bn, br)]
                cells += [score(bn, AFTERWARDS), theirs, _gap(values(br), counted)]
            rows.append([NETWORKS[network], str(size), *cells])
    header = (
        "network",
        "microbatch",
        "BatchNorm",
        "Batch Renorm",
        "difference",
        "p",
        "gap closed",
        "steps to BatchNorm's end",
        "BatchNorm, recalibrated afterwards",
        "gap closed by that",
        "Batch Renorm less that (p)",
    )
    return markdown(header, rows)


def _compared(bn: Sequence[Result], br: Sequence[Result]) -> list[str]:
    plain, ours = values(bn), values(br)
    return [
        score(bn),
        score(br),
        difference(ours, plain).percent(),
        _p(ours, plain),
    ]


def _faster(bn: Sequence[Result], br: Sequence[Result]) -> str:
    """The steps that the mean curve of each takes to where BatchNorm's ends."""
    if any(result["diverged"] for result in bn):
        return "BatchNorm diverged"
    end = statistics.fmean(result["curve"][-1][1] for result in bn)
    taken = [steps_to(found, end) for found in (bn, br)]
    return " / ".join("never" if step is None else f"{step:g}" for step in taken)


def _p(found: Sequence[float], base: Sequence[float]) -> str:
    return p_text(p_value(found, base))


def _share(reference: Sequence[float], bn: Sequence[float], found: Sequence[float]) -> str:
    """Of the gap between BatchNorm here and in i.i.d. microbatches of 32, in percent, with its interval."""
    won = [ours - theirs for ours, theirs in zip(found, bn, strict=True)]
    gap = [whole - theirs for whole, theirs in zip(reference, bn, strict=True)]
    share = ratio(won, gap)
    if share is None or statistics.fmean(gap) <= 0:
        return "no clear gap"
    value, low, high = (100 * part for part in share)
    return f"{value:.0f} % ({low:.0f} to {high:.0f})"


def biased(study: Study, results: Results) -> str:
    """Finding 3, and what can be done."""
    cells = [("plain14", *cell) for cell in BIASED]
    cells += [("plain6", size, labels) for size, labels in CELLS["plain6"] if labels != LABELS]
    rows = []
    for network, size, labels in cells:
        reference = scratch(study, results, network, "bn", 32)
        plain = scratch(study, results, network, "bn", size, labels)
        for held in (False, True) if labels == 1 else (False,):
            bn, br = (scratch(study, results, network, n, size, labels, held=held) for n in ("bn", "br"))
            for norm, found in (("bn", bn), ("br", br)):
                figures = [NONE] * 4
                if found is not None and bn is not None and plain is not None and reference is not None:
                    levels = (values(one) for one in (reference, plain, found))
                    figures = [
                        score(found),
                        "" if (norm, held) == ("bn", False) else _share(*levels),
                        "" if norm == "bn" else _p(values(found), values(bn)),
                        score(found, AFTERWARDS),
                    ]
                name = NAMES[norm] + (", held" if held else "")
                rows.append([NETWORKS[network], str(labels), str(size), name, *figures])
    header = (
        "network",
        "labels",
        "microbatch",
        "norm",
        "accuracy",
        "gap closed",
        "p against the row above",
        "recalibrated afterwards",
    )
    return markdown(header, rows)


def controls(study: Study, results: Results) -> str:
    """What of finding 3 lies in the gradient."""
    rows = []
    for norm, size, labels in CONTROLS:
        found = scratch(study, results, "plain14", norm, size, labels)
        drawn = "all" if labels == LABELS else str(labels)
        rows.append([NAMES[norm], drawn, str(size), NONE if found is None else score(found)])
    return markdown(("normalised by", "labels", "microbatch", "accuracy"), rows)


def overfitting(study: Study, results: Results) -> str:
    """Finding 4."""
    rows = []
    for size, labels in ((32, LABELS), *BIASED):
        for norm in ("bn", "br"):
            found = scratch(study, results, "plain14", norm, size, labels)
            row = ["all" if labels == LABELS else str(labels), str(size), NAMES[norm]]
            if found is None:
                rows.append([*row, *[NONE] * 3])
                continue
            ways = ("test_by_batch", "test_of_drawn")
            gap = difference(*(values(found, way) for way in ways)).percent()
            rows.append([*row, *(score(found, way) for way in ways), gap])
    header = ("labels", "microbatch", "norm", "by batch statistics", "by running statistics", "difference")
    return markdown(header, rows)


def cost(bench: Path | None) -> str:
    """Finding 5: what ``make bench`` measured."""
    if bench is None or not bench.exists():
        return f"to be measured: {BENCH}"
    measured = json.loads(bench.read_text())
    rows = [
        [f"training step of {row['model']}, batch 4, 128 pixels", f"{row['ratio']:.2f}"]
        for row in measured["models"]
    ]
    for row in measured["layers"]:
        shape, layout = "x".join(map(str, row["shape"])), row["layout"].replace("_", " ")
        what = f"the layer alone, forward and backward, {row['dtype']}, {shape}, {layout}"
        rows.append([what, f"{row['train']['ours']:.2f}"])
    machine = f"{measured['machine']}, torch {measured['torch']}"
    return markdown(("Batch Renorm over BatchNorm, time", machine), rows)


def ablation(study: Study, results: Results, part: str) -> str:
    """Finding 6, and of finding 7 what concerns the defaults."""
    names, variants = study.ablations[part]
    columns: dict[str, list[list[str]]] = {variant: [] for variant in variants}
    for name in names:
        if not study.arm(name).is_tuned(results):
            return NONE
        runs = study.ablation(name, variants, results)
        done = {variant: [results.get(run.key()) for run in of] for variant, of in runs.items()}
        base = done[next(iter(variants))]
        for variant, maybe in done.items():
            if None in maybe or None in base:
                columns[variant].append([NONE, NONE])
                continue
            found, chosen = (values(one) for one in (maybe, base))
            columns[variant].append([score(maybe), "" if maybe is base else _gap(found, chosen)])
    header = ["variant"]
    for name in names:
        header += [ablated_title(name), "difference (p)"]
    rows = [[variant, *(text for cells in of for text in cells)] for variant, of in columns.items()]
    return markdown(header, rows)


def ablated_title(name: str) -> str:
    network, _, cell = name.partition(": br, ")
    return f"{NETWORKS[network]}, {cell}"


def _gap(found: Sequence[float], base: Sequence[float]) -> str:
    p = _p(found, base)
    return f"{100 * difference(found, base).value:+.1f}" + (f" ({p})" if p else "")


Way = tuple[str, bool, str]
"""To fine-tune and to test: a norm, whether its statistics are counted first, and what of the result."""


def ways() -> dict[str, Way]:
    """Each by its title, in order."""
    found: dict[str, Way] = {}
    for norm, first in ARMS:
        found[NAMES[norm] + (", recalibrated first" if first else "")] = (norm, first, AS_IS)
        if norm in MOVING and not first:
            found[NAMES[norm] + ", recalibrated afterwards"] = (norm, first, AFTERWARDS)
    return found


def finetuned(study: Study, results: Results, cell: tuple[str, int, int], way: Way) -> list[Result] | None:
    """By seed, with what is asked for as ``test``; None where a run is missing."""
    (network, size, labels), (norm, first, key) = cell, way
    found = finals(study, study.arm(finetune_name(network, norm, size, labels, first)), results)
    return None if found is None else [{**result, "test": result[key]} for result in found]


def finetuning(study: Study, results: Results) -> str:
    """Finding 7."""
    rows = []
    for title, way in ways().items():
        found = [finetuned(study, results, cell, way) for cell in study.finetuned]
        rows.append([title, *(NONE if one is None else score(one) for one in found)])
    return markdown(["", *_cells(study)], rows)


COMPARED: tuple[tuple[str, Way, Way], ...] = (
    ("Batch Renorm less BatchNorm", ("br", False, AS_IS), ("bn", False, AS_IS)),
    ("the same, both recalibrated first", ("br", True, AS_IS), ("bn", True, AS_IS)),
    ("Batch Renorm less BatchNorm recalibrated afterwards", ("br", False, AS_IS), ("bn", False, AFTERWARDS)),
    ("Batch Renorm less frozen", ("br", False, AS_IS), ("frozen", False, AS_IS)),
    ("the same, both recalibrated first", ("br", True, AS_IS), ("frozen", True, AS_IS)),
    ("Batch Renorm less GroupNorm", ("br", False, AS_IS), ("gn", False, AS_IS)),
    ("Batch Renorm recalibrated afterwards less as it is", ("br", False, AFTERWARDS), ("br", False, AS_IS)),
    ("frozen less BatchNorm", ("frozen", False, AS_IS), ("bn", False, AS_IS)),
    ("frozen less GroupNorm", ("frozen", False, AS_IS), ("gn", False, AS_IS)),
    ("what recalibrating first brings to BatchNorm", ("bn", True, AS_IS), ("bn", False, AS_IS)),
    ("to BatchNorm, frozen", ("frozen", True, AS_IS), ("frozen", False, AS_IS)),
    ("to Batch Renorm", ("br", True, AS_IS), ("br", False, AS_IS)),
)
"""Of finding 7: what is taken from what."""


def comparisons(study: Study, results: Results) -> str:
    """Finding 7, seed by seed."""
    rows = []
    for title, *pair in COMPARED:
        row = [title]
        for cell in study.finetuned:
            first, second = (finetuned(study, results, cell, way) for way in pair)
            row.append(NONE if first is None or second is None else _gap(values(first), values(second)))
        rows.append(row)
    return markdown(["points (p)", *_cells(study)], rows)


def _cells(study: Study) -> list[str]:
    drawn = {LABELS: "shuffled", 1: "one label"}
    return [f"{NETWORKS[network]}, {size}, {drawn[labels]}" for network, size, labels in study.finetuned]


def deployment(study: Study, results: Results) -> str:
    """Finding 8."""
    rows = []
    for arm in (*study.main, *study.finetuning):
        found = finals(study, arm, results)
        if found and "onnx" in found[0]:
            onnx = found[0]["onnx"]
            differ = onnx["images"] - onnx["same"]
            rows.append(
                [
                    arm.name,
                    f"{onnx['same']:,} of {onnx['images']:,}",
                    f"{onnx['ties']} of {differ}",
                    f"{onnx['largest_difference']:.1e}",
                ]
            )
    return markdown(
        ("model", "classified as by torch", "others that are ties", "largest difference of a logit"), rows
    )


def settings(study: Study, results: Results) -> str:
    """What was chosen, and from what."""
    rows = []
    for arm in (*study.main, *study.finetuning):
        if not arm.grid or not arm.is_tuned(results):
            continue
        chosen = arm.chosen(results)
        runs = arm.tried(results)
        tried = "; ".join(
            f"{name} {', '.join(f'{v:g}' for v in sorted({getattr(run, name) for run in runs}))}"
            for name in arm.grid
        )
        best = max(arm.validated(results).values())
        picked = ", ".join(f"{name} {getattr(chosen, name):g}" for name in arm.grid)
        rows.append([arm.name, picked, f"{100 * best:.1f}", f"{len(runs)}: {tried}"])
    return markdown(("arm", "chosen", "validation accuracy", "tried"), rows)


def machines(records: Records) -> str:
    """What the runs were done with."""
    rows = []
    for name, runs in records.machines.items():
        about = json.loads(name)
        place = ", ".join(str(about.pop(key)) for key in PLACE if key in about)
        versions = ", ".join(f"{library} {version}" for library, version in about.items())
        rows.append([f"{runs:,}", place, versions])
    return markdown(("runs", ", ".join(PLACE), "versions"), rows)


def repeated(study: Study, committed: Results, found: Results) -> str:
    """Runs that were done again, beside the committed ones."""
    again = [key for key in found if key in committed and AS_IS in found[key]]
    same = sum(found[key][AS_IS] == committed[key][AS_IS] for key in again)
    rows = []
    for arm in (*study.main, *study.finetuning):
        theirs, ours = finals(study, arm, committed), finals(study, arm, found)
        if theirs is not None and ours is not None:
            rows.append([arm.name, score(theirs), score(ours)])
    for names, variants in study.ablations.values():
        for name in names:
            for variant, runs in study.ablation(name, variants, committed).items():
                theirs, ours = ([of.get(run.key()) for run in runs] for of in (committed, found))
                if None not in theirs and None not in ours:
                    rows.append([f"{name}: {variant}", score(theirs), score(ours)])
    table = markdown(("arm", "committed", "repeated"), rows)
    return f"{same} of {len(again)} runs have the very test accuracy that is committed.\n\n{table}"
