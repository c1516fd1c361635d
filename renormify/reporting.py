"""Results for people and for machines: rich tables, one HTML page, JSON.

All three are renderings of the same document, the ``to_dict()`` of the result objects under the keys
``report``, ``proof``, ``export``, ``parity`` and ``diagnosis``. Nothing is computed here that is not in it,
so that a document read back from JSON renders alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renormify import __version__
from renormify.errors import InputError, MissingExtraError, one_line, printable
from renormify.pictures import error_curves, quantile_bands

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Section", "html_page", "print_sections", "sections", "to_json"]

# More rows than a screen holds are summarised, unless everything was asked for.
_LONG = 24
_WORST = 12
_FAR = 100.0  # an infinite limit, which is null in JSON, is drawn here
_TEMPLATE = Path(__file__).parent / "templates" / "report.html"


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        title: its heading.
        summary: what it says, in one line.
        passed: its verdict, or None where there is none to give.
        headers: of its table's columns.
        rows: of its table; without any there is no table.
        notes: further lines.
        pictures: SVG elements, which the HTML page alone shows.
    """

    title: str
    summary: str
    passed: bool | None = None
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


def to_json(document: Mapping[str, Any]) -> str:
    """The document as strict JSON: paths become text, and numbers that are not finite become null."""
    return json.dumps(_jsonable(document), indent=2, allow_nan=False)


def parse(text: str, name: str) -> dict[str, Any]:
    """The document that :func:`to_json` printed.

    Raises:
        InputError: the text is none.
    """
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or not {"command", "passed"} <= document.keys():
            raise InputError(f"{name} is not the result of a renormify command; expected what --json printed")
        sections(document)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name} is not the result of a renormify command: {one_line(error, 100)}; "
            "expected what --json printed"
        ) from error
    return document


def sections(document: Mapping[str, Any], *, full: bool = False) -> tuple[Section, ...]:
    """What a document holds, one section for each result in it.

    Args:
        document: results by their keys, as ``to_dict()`` gives them.
        full: list every site, however many there are.
    """
    document = _jsonable(document)
    found = []
    if document.get("command") == "doctor":
        found.append(_installed(document))
    if "files" in document:
        found.append(_files(document))
    if "model" in document:
        found.append(_subject(document))
    if document.get("checkpoint") is not None:
        found.append(_checkpoint(document["checkpoint"]))
    if document.get("imported") is not None:
        found += _imported(document["imported"])
    if document.get("report") is not None:
        found.append(_sites(document["report"], full))
    if document.get("unproven"):
        found.append(Section("Proof", f"none: {document['unproven']}"))
    if document.get("proof") is not None:
        found.append(_proof(document["proof"]))
    if document.get("export") is not None:
        found.append(_export(document["export"], full))
    if document.get("parity") is not None:
        found.append(_parity(document["parity"], full))
    if document.get("diagnosis") is not None:
        found += [_advice(document["diagnosis"]), _layers(document["diagnosis"], full)]
    if not found and document.get("reason"):
        found.append(Section(str(document["command"]), str(document["reason"]), False))
    return tuple(found)


def print_sections(console: Console, parts: Sequence[Section]) -> None:
    """Prints sections to a terminal; names are text here, never markup or what steers a terminal."""
    from rich.table import Table
    from rich.text import Text

    for part in parts:
        mark, style = {None: (" ", ""), True: (" ok ", "green"), False: (" FAILED ", "bold red")}[part.passed]
        line = Text.assemble((part.title, "bold"), (mark, style), printable(part.summary))
        console.print(line, soft_wrap=True)
        if part.rows:
            table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 2))
            for header, values in zip(part.headers, zip(*part.rows, strict=True), strict=True):
                numeric = all(_is_number(value) for value in values)
                table.add_column(header, justify="right" if numeric else "left", overflow="fold")
            for row in part.rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            console.print(table)
        for note in part.notes:
            console.print(Text(f"  {printable(note)}"), soft_wrap=True)


def html_page(parts: Sequence[Section], *, title: str = "renormify") -> str:
    """The sections as one HTML page that needs no other file and no network.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "to write the HTML page") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["numeric"] = _is_number
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=parts, version=__version__)


def _subject(document: Mapping[str, Any]) -> Section:
    weights = document.get("weights") or "none given: the fresh weights of the model's own making"
    facts = [("weights", str(weights))]
    if document.get("input_shape"):
        facts.append(("input", ", ".join("x".join(map(str, shape)) for shape in document["input_shape"])))
    if document.get("kwargs"):
        facts.append(("kwargs", _text(document["kwargs"])))
    for facts_of in ("settings", "data"):
        facts += [(key, _text(value)) for key, value in (document.get(facts_of) or {}).items()]
    if document.get("dtypes"):
        facts.append(
            ("parameters", ", ".join(f"{count:,} {name}" for name, count in document["dtypes"].items()))
        )
    facts += [("note", note) for note in document.get("notes") or ()]
    return Section("Model", str(document["model"]), notes=tuple(f"{name}: {value}" for name, value in facts))


def _checkpoint(checkpoint: Mapping[str, Any]) -> Section:
    notes = [f"{key}: {_text(value)}" for key, value in checkpoint.get("metadata", {}).items()]
    return Section("Checkpoint", str(checkpoint.get("summary", "")), notes=tuple(notes))


def _imported(imported: Mapping[str, Any]) -> list[Section]:
    layers = imported["layers"]
    largest = max((layer["tolerance_used"] or 0.0 for layer in layers), default=0.0)
    summary = (
        f"{len(layers)} layers of {imported['package']} evaluate as there, within {largest:.0%} of what "
        "rounding explains"
        if imported["passed"]
        else f"layers do not evaluate as in {imported['package']}"
    )
    left_out = imported["left_out"]
    notes = [f"kept as they are: {imported['kept']} other tensors"] if imported["kept"] else []
    if left_out:
        notes.append(f"left out: {', '.join(left_out[:_LONG])}{', ...' if len(left_out) > _LONG else ''}")
    rows = _rows(
        [layer | {"target": layer["target"] or "(the model itself)"} for layer in layers],
        ("target", "channels", "eps", "count", "difference", "tolerance_used"),
    )
    mends = [
        mend | {"effect": None if mend["effect"] is None else f"{mend['effect']:.3g}: {mend['measure']}"}
        for mend in imported["mended"]
    ]
    return [
        Section(
            "Import",
            summary,
            bool(imported["passed"]),
            headers=("layer", "channels", "eps", "steps", "difference", "of tolerance"),
            rows=rows,
            notes=(*notes, *imported["notes"]),
        ),
        Section(
            "Mended",
            f"what is otherwise now than in {imported['package']}",
            headers=("in", "there", "here", "largest effect", "layers"),
            rows=_rows(mends, ("where", "fault", "now", "effect", "layers")),
        ),
    ]


def _sites(report: Mapping[str, Any], full: bool) -> Section:
    sites = report.get("sites", ())
    converted = [site for site in sites if site["action"] == "converted"]
    skipped = [site for site in sites if site["action"] != "converted"]
    shown = sites if full or len(sites) <= _LONG else skipped
    notes = []
    if shown is skipped and converted:
        kinds = Counter(site["kind"] for site in converted)
        notes.append("converted: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
    if len(skipped) > _LONG and not full:
        reasons = Counter(site["reason"] for site in skipped)
        notes += [f"skipped: {count} x {reason}" for reason, count in reasons.most_common()]
        shown = []
    return Section(
        "Sites",
        f"{len(converted)} converted, {len(skipped)} skipped",
        headers=("site", "kind", "channels", "action", "reason"),
        rows=_rows(
            [{**site, "name": _name(site["name"])} for site in shown],
            ("name", "kind", "channels", "action", "reason"),
        ),
        notes=(*notes, *report.get("notes", ())),
    )


def _proof(proof: Mapping[str, Any]) -> Section:
    if proof["identical"]:
        summary = (
            f"the converted model gives the same bits in evaluation mode: {proof['outputs']} output(s), "
            f"{proof['values']:,} values, largest difference {_number(proof['max_abs_difference'])}"
        )
        notes = (proof["reason"],) if proof.get("reason") else ()
        return Section("Proof", summary, True, notes=notes)
    return Section("Proof", proof.get("reason") or "the outputs differ", False)


def _export(export: Mapping[str, Any], full: bool) -> Section:
    sites = (export.get("fold") or {}).get("sites", ())
    counts = Counter(site["action"] for site in sites)
    # What folded without a word is counted; what did not fold is shown with its reason.
    shown = sites if full or len(sites) <= _LONG else [site for site in sites if site["action"] != "folded"]
    summary = ", ".join(f"{counts[action]} {action}" for action in ("folded", "rewritten", "kept"))
    opset = f"opset {export['opset']}" if export.get("opset") else ""
    return Section(
        "Folding",
        f"{summary}{', ' if opset else ''}{opset}",
        headers=("site", "action", "into", "reason"),
        rows=_rows(shown, ("name", "action", "into", "reason")),
    )


def _parity(parity: Mapping[str, Any], full: bool) -> Section:
    outputs = parity.get("outputs", ())
    failed = [record for record in outputs if not record["passed"]]
    notes = [f"{_compared(record)}: {record['reason']}" for record in failed]
    if parity.get("first_divergence"):
        notes.append(f"first divergence: {parity['first_divergence']}")
    notes += parity.get("notes") or []
    shown = outputs
    if not full and len(outputs) > _LONG:
        shown = failed or sorted(outputs, key=lambda record: -(record.get("tolerance_used") or 0.0))[:_WORST]
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
    return _number(1.0 - value) if key == "cosine" and value is not None else _number(value)


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
    return (error_curves(title, names, [layer["position"] for layer in layers], curves),)


def _advice(diagnosis: Mapping[str, Any]) -> Section:
    batches, grouping = diagnosis["batches"], diagnosis["grouping"]
    facts = [f"{batches} {'batch' if batches == 1 else 'batches'}"]
    if grouping is not None:
        facts.append(f"their means vary {grouping:.1f} times as much as those of samples drawn at random")
    notes = [
        f"{found['action']} ({_layer_count(found['layers'])}): {found['evidence']}"
        for found in diagnosis["advice"]
    ]
    notes += [f"not seen: {_name(site['name'])} ({site['reason']})" for site in diagnosis["unseen"]]
    return Section("Advice", ", ".join(facts), notes=tuple(notes))


def _layer_count(names: Sequence[str]) -> str:
    return _name(names[0]) if len(names) == 1 else f"{len(names)} layers"


def _layers(diagnosis: Mapping[str, Any], full: bool) -> Section:
    layers, marks = diagnosis["layers"], diagnosis["quantiles"]
    shown, summary = layers, f"{len(layers)} norm layers, in the order of the forward"
    if not full and len(layers) > _LONG:
        shown = sorted(layers, key=lambda layer: -(layer["spread"] or 0.0))[:_WORST]
        summary = (
            f"the {_WORST} of {len(layers)} norm layers whose statistics differ most from batch to batch"
        )
    low, high = marks.index(0.05), marks.index(0.95)
    rows = tuple(
        (
            _name(layer["name"]),
            str(layer["m"]),
            *(
                f"{layer[key][low]:.2f} to {layer[key][high]:.2f}" if layer[key] else "-"
                for key in ("r", "d")
            ),
            *(f"{layer[key]:.1%}" for key in ("clipped_r", "clipped_d")),
            *(_number(layer[key]) for key in ("spread", "drift", "gap")),
            *(str(layer[key]) for key in ("dead", "exploding", "nonfinite")),
        )
        for layer in shown
    )
    headers = (
        "layer", "m", "r (5-95 %)", "d (5-95 %)", "r clipped", "d clipped", "spread", "drift", "gap", "dead",
        "exploding", "not finite",
    )  # fmt: skip
    notes = (
        "m: values per channel in a batch; spread: how much the statistics differ from batch to batch; "
        "drift: how far the running ones are off; gap: how far training is from evaluation; all in sigma",
    )
    return Section("Layers", summary, headers=headers, rows=rows, notes=notes, pictures=_bands(layers))


def _bands(layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The pictures of r and d over the depth of the network, with the limits."""
    drawn = [layer for layer in layers if layer["r"]]
    if not drawn:
        return ()
    names = [_name(layer["name"]) for layer in drawn]
    r_max, d_max = (max(layer[key] or _FAR for layer in drawn) for key in ("r_max", "d_max"))
    r_edge, d_edge = 2 * r_max, 1.5 * max(d_max, 1.0)
    return (
        quantile_bands(
            "r over depth: bands of 99 %, 90 % and 50 % of channels and batches, the median, and the limits",
            names, [layer["r"] for layer in drawn], (1 / r_max, 1.0, r_max), (1 / r_edge, r_edge),
            logarithmic=True,
        ),
        quantile_bands(
            "d over depth, likewise",
            names, [layer["d"] for layer in drawn], (-d_max, 0.0, d_max), (-d_edge, d_edge),
        ),
    )  # fmt: skip


def _name(name: str) -> str:
    return name or "(the model itself)"


def _installed(document: Mapping[str, Any]) -> Section:
    rows = [("renormify", document["renormify"], ""), ("python", document["python"], document["executable"])]
    rows += [(name, version or "missing", "needed") for name, version in document["packages"].items()]
    for extra, packages in document["extras"].items():
        rows += [
            (name, version or "not installed", "" if version else f"pip install 'renormify[{extra}]'")
            for name, version in packages.items()
        ]
    devices = "; ".join(document["devices"])
    return Section(
        "System",
        document["system"],
        headers=("package", "version", ""),
        rows=tuple(rows),
        notes=(f"devices: {devices}",),
    )


def _files(document: Mapping[str, Any]) -> Section:
    counts = ", ".join(f"{count} {status}" for status, count in document["counts"].items())
    seconds = sum(record["seconds"] for record in document["files"])
    return Section("Files", f"{counts} ({seconds:.1f} s of work)", bool(document["passed"]))


def _rows(records: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(_text(record.get(key)) for key in keys) for record in records)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (Mapping, list)):
        return json.dumps(value)
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value
