"""The sections of a report on a diagnosis: the advice, and the layers with their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from renormify.pictures import quantile_bands
from renormify.tables import LONG, WORST, Section, name_of, number_of

__all__ = ["describe_advice", "describe_layers"]

_FAR = 100.0  # an infinite limit, which is null in JSON, is drawn here


def describe_advice(diagnosis: Mapping[str, Any]) -> Section:
    """The section on what to do."""
    batches, grouping = diagnosis["batches"], diagnosis["grouping"]
    facts = [f"{batches} {'batch' if batches == 1 else 'batches'}"]
    if grouping is not None:
        facts.append(f"their means vary {grouping:.1f} times as much as those of samples drawn at random")
    notes = [
        f"{found['action']} ({_layer_count(found['layers'])}): {found['evidence']}"
        for found in diagnosis["advice"]
    ]
    notes += [f"not seen: {name_of(site['name'])} ({site['reason']})" for site in diagnosis["unseen"]]
    return Section("Advice", ", ".join(facts), notes=tuple(notes))


def _layer_count(names: Sequence[str]) -> str:
    return name_of(names[0]) if len(names) == 1 else f"{len(names)} layers"


def describe_layers(diagnosis: Mapping[str, Any], full: bool) -> Section:
    """The section on the layers."""
    layers, marks = diagnosis["layers"], diagnosis["quantiles"]
    shown, summary = layers, f"{len(layers)} norm layers, in the order of the forward"
    if not full and len(layers) > LONG:
        shown = sorted(layers, key=lambda layer: -(layer["spread"] or 0.0))[:WORST]
        summary = f"the {WORST} of {len(layers)} norm layers whose statistics differ most from batch to batch"
    low, high = marks.index(0.05), marks.index(0.95)
    rows = tuple(
        (
            name_of(layer["name"]),
            str(layer["m"]),
            *(
                f"{layer[key][low]:.2f} to {layer[key][high]:.2f}" if layer[key] else "-"
                for key in ("r", "d")
            ),
            *(f"{layer[key]:.1%}" for key in ("clipped_r", "clipped_d")),
            *(number_of(layer[key]) for key in ("spread", "drift", "gap")),
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
    names = [name_of(layer["name"]) for layer in drawn]
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
