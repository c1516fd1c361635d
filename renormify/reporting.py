"""Results for people and for machines: rich tables, one HTML page, JSON.

All three are renderings of the same document, the ``to_dict()`` of the result objects under the keys
``report``, ``proof``, ``export``, ``parity`` and ``diagnosis``. Nothing is computed here that is not in it,
so that a document read back from JSON renders alike.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renormify import __version__
from renormify.errors import InputError, MissingExtraError, one_line, printable
from renormify.reporting_diagnosis import describe_advice, describe_layers
from renormify.reporting_onnx import describe_export, describe_parity
from renormify.tables import LONG, Section, name_of, number_of, rows_of, text_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Section", "html_page", "print_sections", "sections", "to_json"]

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"


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
        found.append(describe_export(document["export"], full))
    if document.get("parity") is not None:
        found.append(describe_parity(document["parity"], full))
    if document.get("diagnosis") is not None:
        found += [describe_advice(document["diagnosis"]), describe_layers(document["diagnosis"], full)]
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
    environment.filters["kind"] = _kind_of
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=parts, version=__version__)


def _subject(document: Mapping[str, Any]) -> Section:
    weights = document.get("weights") or "none given: the fresh weights of the model's own making"
    facts = [("weights", str(weights))]
    if document.get("input_shape"):
        facts.append(("input", ", ".join("x".join(map(str, shape)) for shape in document["input_shape"])))
    if document.get("kwargs"):
        facts.append(("kwargs", text_of(document["kwargs"])))
    for facts_of in ("settings", "data"):
        facts += [(key, text_of(value)) for key, value in (document.get(facts_of) or {}).items()]
    if document.get("dtypes"):
        facts.append(
            ("parameters", ", ".join(f"{count:,} {name}" for name, count in document["dtypes"].items()))
        )
    facts += [("note", note) for note in document.get("notes") or ()]
    return Section("Model", str(document["model"]), notes=tuple(f"{name}: {value}" for name, value in facts))


def _checkpoint(checkpoint: Mapping[str, Any]) -> Section:
    notes = [f"{key}: {text_of(value)}" for key, value in checkpoint.get("metadata", {}).items()]
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
        notes.append(f"left out: {', '.join(left_out[:LONG])}{', ...' if len(left_out) > LONG else ''}")
    rows = rows_of(
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
            rows=rows_of(mends, ("where", "fault", "now", "effect", "layers")),
        ),
    ]


def _sites(report: Mapping[str, Any], full: bool) -> Section:
    sites = report.get("sites", ())
    converted = [site for site in sites if site["action"] == "converted"]
    skipped = [site for site in sites if site["action"] != "converted"]
    shown = sites if full or len(sites) <= LONG else skipped
    notes = []
    if shown is skipped and converted:
        kinds = Counter(site["kind"] for site in converted)
        notes.append("converted: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
    if len(skipped) > LONG and not full:
        reasons = Counter(site["reason"] for site in skipped)
        notes += [f"skipped: {count} x {reason}" for reason, count in reasons.most_common()]
        shown = []
    return Section(
        "Sites",
        f"{len(converted)} converted, {len(skipped)} skipped",
        headers=("site", "kind", "channels", "action", "reason"),
        rows=rows_of(
            [{**site, "name": name_of(site["name"])} for site in shown],
            ("name", "kind", "channels", "action", "reason"),
        ),
        notes=(*notes, *report.get("notes", ())),
    )


def _proof(proof: Mapping[str, Any]) -> Section:
    if proof["identical"]:
        summary = (
            f"the converted model gives the same bits in evaluation mode: {proof['outputs']} output(s), "
            f"{proof['values']:,} values, largest difference {number_of(proof['max_abs_difference'])}"
        )
        notes = (proof["reason"],) if proof.get("reason") else ()
        return Section("Proof", summary, True, notes=notes)
    return Section("Proof", proof.get("reason") or "the outputs differ", False)


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


def _kind_of(cell: str) -> str:
    """How the page's style sets a cell."""
    if cell == "FAILED":
        return "failed"
    if _is_number(cell):
        return "number"
    return "word" if len(cell) <= 20 else "long"


def _is_number(text: str) -> bool:
    try:
        float(text.removesuffix("%"))
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
