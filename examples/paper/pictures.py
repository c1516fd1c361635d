"""The pictures, from the results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper.intervals import Mean, difference, mean
from paper.settings import AS_IS, LABELS, SIZES, Study
from paper.tables import NAMES, NETWORKS, Results, ablated_title, finetuned, scratch, values, ways

COLOURS = {"bn": "#b5443c", "br": "#2f6db3", "frozen": "#8a8a8a", "gn": "#c79a2a"}
SHIFTS = (-50, -10, -2, 0, 2, 10)  # marked on the axis of the ablation, which is linear to 5
STYLE = {
    "svg.hashsalt": "renormify",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def draw(study: Study, results: Results, folder: Path) -> list[Path]:
    """Writes each picture whose runs are there, as SVG.

    Returns:
        The files written.
    """
    pictures: dict[str, Callable[[Study, Results], Figure | None]] = {
        "microbatch": microbatch,
        "biased": biased,
        "ablation": ablation,
        "finetuning": finetuning,
    }
    written = []
    with mpl.rc_context(STYLE):
        for name, picture in pictures.items():
            figure = picture(study, results)
            if figure is not None:
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None, "Creator": None})
                written.append(path)
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _errors(points: Sequence[Mean]) -> list[float]:
    return [0.0 if point.half != point.half else 100 * point.half for point in points]


def microbatch(study: Study, results: Results) -> Figure | None:
    """Of the deepest network: left, accuracy by microbatch; right, how it rises."""
    found = {
        (norm, size): scratch(study, results, "plain20", norm, size)
        for norm in ("bn", "br")
        for size in SIZES
    }
    if None in found.values():
        return None
    figure, (left, right) = _figure(8, 3.2, 2)
    for norm in ("bn", "br"):
        points = [mean(values(found[norm, size])) for size in SIZES]
        left.errorbar(
            range(len(SIZES)),
            [100 * point.value for point in points],
            _errors(points),
            marker="o",
            capsize=3,
            color=COLOURS[norm],
            label=NAMES[norm],
        )
        for size, line in ((32, "--"), (2, "-")):
            curves = [result["curve"] for result in found[norm, size]]
            steps = [step for step, _ in min(curves, key=len)]
            heights = [
                100 * statistics.fmean(accuracy for _, accuracy in points)
                for points in zip(*curves, strict=False)
            ]
            right.plot(steps, heights, line, color=COLOURS[norm], label=f"{NAMES[norm]}, {size}")
    left.set_xticks(range(len(SIZES)), [str(size) for size in SIZES])
    left.set(xlabel="microbatch", ylabel="test accuracy, %")
    right.set(xlabel="step", ylabel="validation accuracy, %", ylim=(40, None))
    left.legend()
    right.legend(loc="lower right")
    return figure


def biased(study: Study, results: Results) -> Figure | None:
    """Accuracy by batch statistics and by running ones, for microbatches of all, two, and one label."""
    drawn = {LABELS: 32, 2: 8, 1: 8}
    found = {
        (norm, labels): scratch(study, results, "plain14", norm, size, labels)
        for norm in ("bn", "br")
        for labels, size in drawn.items()
    }
    if None in found.values():
        return None
    figure, axes = _figure(8, 3, 2)
    for norm, axis in zip(("bn", "br"), axes, strict=True):
        for offset, (key, label, alpha) in enumerate(
            (("test_by_batch", "by batch statistics", 0.4), ("test_of_drawn", "by running statistics", 1.0))
        ):
            points = [mean(values(found[norm, labels], key)) for labels in drawn]
            axis.bar(
                [place + 0.36 * offset for place in range(len(drawn))],
                [100 * point.value for point in points],
                0.34,
                yerr=_errors(points),
                color=COLOURS[norm],
                alpha=alpha,
                label=label,
            )
        axis.set_xticks([place + 0.18 for place in range(len(drawn))], ["all labels", "2 labels", "1 label"])
        axis.set(title=NAMES[norm], ylabel="test accuracy, %", ylim=(0, 100))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure


def ablation(study: Study, results: Results) -> Figure | None:
    """What each variant changes."""
    names, variants = study.ablations["ablation"]
    if not all(study.arm(name).is_tuned(results) for name in names):
        return None
    runs = {name: study.ablation(name, variants, results) for name in names}
    if any(run.key() not in results for of in runs.values() for one in of.values() for run in one):
        return None
    figure, axes = _figure(11, 3.6, len(names))
    for name, axis in zip(names, axes, strict=True):
        accuracies = [[results[run.key()]["test"] for run in one] for one in runs[name].values()]
        points = [difference(found, accuracies[0]) for found in accuracies]
        places = range(len(points), 0, -1)
        axis.errorbar(
            [100 * point.value for point in points],
            places,
            xerr=_errors(points),
            fmt="o",
            color=COLOURS["br"],
            capsize=2,
        )
        axis.set_yticks(places, list(variants) if axis is axes[0] else [""] * len(points))
        axis.axvline(0, color="#555555", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=5)
        axis.set_xticks(SHIFTS, [f"{shift:+d}" if shift else "0" for shift in SHIFTS])
        axis.minorticks_off()
        axis.set(title=ablated_title(name).replace(", ", "\n", 1), xlabel="points of accuracy")
    return figure


def finetuning(study: Study, results: Results) -> Figure | None:
    """Accuracy of each way to fine-tune, by network and kind of microbatch."""
    cells = study.finetuned
    shown = {title: way for title, way in ways().items() if way[2] == AS_IS}
    figure, (axis,) = _figure(8, 4)
    for place, (title, way) in enumerate(shown.items()):
        norm, recalibrate, _ = way
        found = [finetuned(study, results, cell, way) for cell in cells]
        if None in found:
            return None
        points = [mean(values(one)) for one in found]
        axis.errorbar(
            [cell + 0.09 * (place - len(shown) / 2) for cell in range(len(cells))],
            [100 * point.value for point in points],
            _errors(points),
            fmt="o" if recalibrate else "s",
            color=COLOURS[norm],
            markerfacecolor=COLOURS[norm] if recalibrate else "white",
            capsize=2,
            label=title,
        )
    drawn = {LABELS: "shuffled", 1: "one label"}
    axis.set_xticks(
        range(len(cells)), [f"{NETWORKS[n]}\n{size}, {drawn[labels]}" for n, size, labels in cells]
    )
    axis.set(ylabel="test accuracy, %", ylim=(0, 100))  # where intervals of three seeds may end outside
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8)
    return figure
