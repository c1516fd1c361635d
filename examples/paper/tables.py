"""The tables, from the results alone."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper.intervals import difference, mean, p_text, p_value
from paper.records import Result
from paper.settings import (
    ARMS,
    BIASED,
    CELLS,
    CONTROLS,
    LABELS,
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
    "pooled": "statistics of all images of a step",
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
BENCH = "python tests/bench/bench_layers.py --only layers,models --json examples/paper/bench.json"


def sections(study: Study, results: Results, bench: Path | None = None) -> dict[str, str]:
    """Each table by its name, in Markdown; what has not been run says so."""
    return {
        "microbatch": microbatch(study, results),
        "biased": biased(study, results),
        "controls": controls(study, results),
        "overfitting": overfitting(study, results),
        "cost": cost(bench),
        "ablation": ablation(study, results),
        "finetuning": finetuning(study, results),
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
    runs = [run.key() for run in arm.finals(results, study.seeds_of(arm))]
    return [results[key] for key in runs] if all(key in results for key in runs) else None


def values(found: Sequence[Result], key: str = "test") -> list[float]:
    return [result[key] for result in found]


def score(found: Sequence[Result], key: str = "test") -> str:
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
            cells = [NONE] * 6
            if bn is not None and br is not None and reference is not None:
                closed = "" if size == 32 else _share(*(values(found) for found in (reference, bn, br)))
                cells = [*_compared(bn, br), closed, _faster(bn, br)]
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
    """The steps that each takes to where BatchNorm ends."""
    end = statistics.fmean(result["curve"][-1][1] for result in bn)
    taken = [steps_to(found, end) for found in (bn, br)]
    return " / ".join("never" if step is None else f"{step:g}" for step in taken)


def _p(found: Sequence[float], base: Sequence[float]) -> str:
    return p_text(p_value(found, base))


def _share(reference: Sequence[float], bn: Sequence[float], br: Sequence[float]) -> str:
    """Of the gap between BatchNorm here and at microbatch 32, in percent."""
    gap = statistics.fmean(reference) - statistics.fmean(bn)
    return f"{100 * (statistics.fmean(br) - statistics.fmean(bn)) / gap:.0f} %" if gap > 0 else "no gap"


def biased(study: Study, results: Results) -> str:
    """Finding 3, and what limits it."""
    cells = [("plain14", *cell) for cell in BIASED]
    cells += [("plain6", size, labels) for size, labels in CELLS["plain6"] if labels != LABELS]
    rows = []
    for network, size, labels in cells:
        reference, plain = (
            scratch(study, results, network, "bn", *cell) for cell in ((32, LABELS), (size, labels))
        )
        for held, norm in itertools.product((False, True) if labels == 1 else (False,), ("bn", "br")):
            name = NAMES[norm] + (", held" if held else "")
            row = [NETWORKS[network], str(labels), str(size), name]
            found = scratch(study, results, network, norm, size, labels, held=held)
            if found is None or plain is None or reference is None:
                rows.append([*row, *[NONE] * 4])
                continue
            ours, theirs = values(found), values(plain)
            versus = [_share(values(reference), theirs, ours), _p(ours, theirs)]
            if norm == "bn" and not held:
                versus = ["", ""]
            rows.append([*row, score(found), *versus, score(found, "test_recalibrated")])
    header = (
        "network",
        "labels",
        "microbatch",
        "norm",
        "accuracy",
        "gap closed",
        "p",
        "recalibrated afterwards",
    )
    return markdown(header, rows)


def controls(study: Study, results: Results) -> str:
    """What of finding 3 lies in the gradient."""
    rows = []
    for norm, size, labels in CONTROLS:
        found = scratch(study, results, "plain14", norm, size, labels)
        drawn = "all" if labels == LABELS else str(labels)
        cells = [NONE] * 2
        if found is not None:
            cells = [score(found, key) for key in ("test", "test_by_batch")]
        rows.append([NAMES[norm], drawn, str(size), *cells])
    return markdown(("normalised by", "labels", "microbatch", "accuracy", "by batch statistics"), rows)


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
            batch, running = values(found, "test_by_batch"), values(found)
            gap = difference(batch, running).percent()
            rows.append([*row, mean(batch).percent(), mean(running).percent(), gap])
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
        if row["dtype"] == "float32" and row["layout"] == "contiguous":
            shape = "x".join(map(str, row["shape"]))
            rows.append([f"the layer alone, forward and backward, {shape}", f"{row['train']['ours']:.2f}"])
    machine = f"{measured['machine']}, torch {measured['torch']}"
    return markdown(("Batch Renorm over BatchNorm, time", machine), rows)


def ablation(study: Study, results: Results) -> str:
    """Finding 6."""
    columns: dict[str, dict[str, list[str]]] = {}
    for name in study.ablated:
        if not study.arm(name).is_tuned(results):
            return NONE
        base: list[float] | None = None
        for arm, variant, runs in study.ablation(results):
            if arm != name:
                continue
            done = [results[run.key()] for run in runs if run.key() in results]
            cells = columns.setdefault(variant, {})
            if len(done) < len(runs):
                cells[name] = [NONE, NONE]
                continue
            found = values(done)
            base = base or found
            cells[name] = [score(done), "" if found is base else _gap(found, base)]
    header = ["variant"]
    for name in study.ablated:
        header += [ablated_title(name), "difference (p)"]
    rows = [
        [variant, *(text for name in study.ablated for text in cells[name])]
        for variant, cells in columns.items()
    ]
    return markdown(header, rows)


def ablated_title(name: str) -> str:
    network, _, cell = name.partition(": br, ")
    return f"{NETWORKS[network]}, {cell}"


def _gap(found: Sequence[float], base: Sequence[float]) -> str:
    p = _p(found, base)
    return f"{100 * difference(found, base).value:+.1f}" + (f" ({p})" if p else "")


def finetuning(study: Study, results: Results) -> str:
    """Finding 7."""
    rows = []
    for norm, recalibrate in ARMS:
        row = [NAMES[norm] + (", recalibrated first" if recalibrate else "")]
        for network, size, labels in study.finetuned:
            arm = study.arm(finetune_name(network, norm, size, labels, recalibrate))
            found = finals(study, arm, results)
            row.append(NONE if found is None else score(found))
        rows.append(row)
    drawn = {LABELS: "shuffled", 1: "one label"}
    return markdown(
        ["", *(f"{NETWORKS[n]}, {size}, {drawn[labels]}" for n, size, labels in study.finetuned)], rows
    )


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
        tried = "; ".join(
            f"{name} {', '.join(f'{v:g}' for v in points)}" for name, points in arm.grid.items()
        )
        best = max(arm.validated(results).values())
        picked = ", ".join(f"{name} {getattr(chosen, name):g}" for name in arm.grid)
        rows.append([arm.name, picked, f"{100 * best:.1f}", tried])
    return markdown(("arm", "chosen", "validation accuracy", "from"), rows)
