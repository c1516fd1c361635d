"""The sections of a report on what was deployed: folding, and parity with the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from renormify.pictures import error_curves
from renormify.tables import LONG, WORST, Section, number_of, rows_of

__all__ = ["describe_export", "describe_parity"]


def describe_export(export: Mapping[str, Any], full: bool) -> Section:
    """The section on folding."""
    sites = (export.get("fold") or {}).get("sites", ())
    counts = Counter(site["action"] for site in sites)
    # What folded without a word is counted; what did not fold is shown with its reason.
    shown = sites if full or len(sites) <= LONG else [site for site in sites if site["action"] != "folded"]
    summary = ", ".join(f"{counts[action]} {action}" for action in ("folded", "rewritten", "kept"))
    opset = f"opset {export['opset']}" if export.get("opset") else ""
    return Section(
        "Folding",
        f"{summary}{', ' if opset else ''}{opset}",
        headers=("site", "action", "into", "reason"),
        rows=rows_of(shown, ("name", "action", "into", "reason")),
    )


def describe_parity(parity: Mapping[str, Any], full: bool) -> Section:
    """The section on parity, with the picture of the error over the depth where layers were compared."""
    outputs = parity.get("outputs", ())
    failed = [record for record in outputs if not record["passed"]]
    notes = [f"{_compared(record)}: {record['reason']}" for record in failed]
    if parity.get("first_divergence"):
        notes.append(f"first divergence: {parity['first_divergence']}")
    notes += parity.get("notes") or []
    shown = outputs
    if not full and len(outputs) > LONG:
        shown = failed or sorted(outputs, key=lambda record: -(record.get("tolerance_used") or 0.0))[:WORST]
        which = "those that failed" if failed else f"the {len(shown)} that take the most of their tolerance"
        notes.append(f"listed: {which}")
    # A column that says the same in each row says nothing.
    names = {"output": "name", "batch": "batch_size"}
    names |= {
        header: key
        for header, key in (("on", "runtime"), ("inputs", "inputs"), ("variant", "variant"))
        if len({record.get(key) for record in outputs}) > 1
    }
    figures = {"max abs": "max_abs", "max rel": "max_rel"}
    if full:
        figures |= {"ulp": "max_ulp", "1 - cosine": "cosine", "top-1": "top1"}
    figures |= {"float noise": "floor", "tolerance": "tolerance"}
    rows = tuple(
        (
            *(str(record.get(key) or "the file") for key in names.values()),
            *(_figure(key, record.get(key)) for key in figures.values()),
            "-" if record.get("tolerance_used") is None else f"{record['tolerance_used']:.0%}",
            "ok" if record["passed"] else "FAILED",
        )
        for record in shown
    )
    summary = (
        f"the ONNX file agrees with the model on {len(outputs)} comparisons"
        if parity["passed"]
        else f"{len(failed)} of {len(outputs)} comparisons failed"
    )
    headers = (*names, *figures, "used", "result")
    return Section(
        "Parity", summary, bool(parity["passed"]), headers, rows, tuple(notes),
        _depth(parity.get("layers") or ()),
    )  # fmt: skip


def _compared(record: Mapping[str, Any]) -> str:
    """What was compared, in as few words as tell it from the others."""
    words = [str(record["name"]), f"batch {record['batch_size']}"]
    if record.get("variant"):
        words.insert(0, record["variant"])
    if record.get("inputs", "example") != "example":
        words.append(f"{record['inputs']} inputs")
    if record.get("runtime", "onnxruntime") != "onnxruntime":
        words.append(record["runtime"])
    return ", ".join(words)


def _figure(key: str, value: float | None) -> str:
    return number_of(1.0 - value) if key == "cosine" and value is not None else number_of(value)


def _depth(layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The picture of the error over the depth of the network."""
    if len(layers) < 2:
        return ()
    names = [layer["name"] if layer["passed"] else f"{layer['name']} (diverges)" for layer in layers]
    curves = {
        "median": [layer["max_rel"] for layer in layers],
        "mark": [layer["floor"] for layer in layers],
    }
    title = (
        "error over depth: the largest difference of each layer's output from the float64 model, relative to "
        "its largest value; dashed, torch's own"
    )
    faults = [index for index, layer in enumerate(layers) if not layer["passed"]]
    return (error_curves(title, names, [layer["position"] for layer in layers], curves, faults),)
