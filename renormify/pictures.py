"""Pictures for the HTML page, as SVG within it: no library, no script, and nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["error_curves", "quantile_bands"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 880, 220, 48, 22, 18


def quantile_bands(
    title: str,
    names: Sequence[str],
    quantiles: Sequence[Sequence[float]],
    marks: Sequence[float],
    limits: tuple[float, float],
    *,
    logarithmic: bool = False,
) -> str:
    """Quantiles of something over the depth of a network: nested bands, the median as a line.

    Args:
        title: what is shown.
        names: of the layers, from the first to the last; a layer's name shows under the pointer.
        quantiles: of each layer, in ascending order, an odd number of them.
        marks: values to draw as dashed lines, such as the limits.
        limits: the least and the largest value of the axis; bands beyond are cut off there.
        logarithmic: whether the axis is.

    Returns:
        An ``<svg>`` element in the page's own colours.
    """
    low, high = (math.log(value) if logarithmic else value for value in limits)
    across = (_WIDTH - _LEFT - 8) / max(len(names) - 1, 1)

    def x(index: int) -> str:
        return f"{_LEFT + index * across:.1f}"

    def y(value: float) -> str:
        place = math.log(max(value, 1e-30)) if logarithmic else value
        share = (min(max(place, low), high) - low) / (high - low)
        return f"{_TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="14">{escape(title)}</text>',
    ]
    middle = len(quantiles[0]) // 2 if quantiles else 0
    for outer in range(middle):
        edge = [f"{x(i)},{y(row[-1 - outer])}" for i, row in enumerate(quantiles)]
        back = [f"{x(i)},{y(row[outer])}" for i, row in reversed(list(enumerate(quantiles)))]
        parts.append(f'<polygon class="band" points="{" ".join(edge + back)}"/>')
    line = " ".join(f"{x(i)},{y(row[middle])}" for i, row in enumerate(quantiles))
    parts.append(f'<polyline class="median" points="{line}"/>')
    for mark in marks:
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(mark)}" y2="{y(mark)}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(mark)}">{mark:.3g}</text>')
    for i, name in enumerate(names):
        top, height = _TOP, _HEIGHT - _TOP - _BOTTOM
        left = _LEFT + (i - 0.5) * across
        parts.append(
            f'<rect class="layer" x="{left:.1f}" y="{top}" width="{across:.1f}" height="{height}">'
            f"<title>{escape(name)}: {quantiles[i][middle]:.3g}</title></rect>"
        )
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{escape(_caption(names))}</text></svg>')
    return "".join(parts)


def error_curves(
    title: str,
    names: Sequence[str],
    positions: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    faults: Sequence[int] = (),
) -> str:
    """Errors over the depth of a network, on a logarithmic axis that holds them all.

    Args:
        title: what is shown.
        names: of the layers, from the first to the last; a layer's name shows under the pointer.
        positions: of the layers across the picture, ascending from 0 to 1.
        curves: by the class of its line in the page's style, the errors of the layers. None and 0, which such
            an axis does not have, are left out.
        faults: the indices of layers to mark on the first curve.

    Returns:
        An ``<svg>`` element in the page's own colours.
    """
    drawn = [value for values in curves.values() for value in values if value]
    low = math.floor(math.log10(min(drawn, default=1e-7)))
    high = max(math.ceil(math.log10(max(drawn, default=1e-6))), low + 1)
    height, width = _HEIGHT - _TOP - _BOTTOM, _WIDTH - _LEFT - 8

    def x(index: int) -> float:
        return _LEFT + positions[index] * width

    def y(exponent: float) -> float:
        return _TOP + (high - exponent) / (high - low) * height

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="14">{escape(title)}</text>',
    ]
    for exponent in range(low, high + 1, max(1, math.ceil((high - low) / 8))):
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(exponent):.1f}">1e{exponent}</text>')
    for kind, values in curves.items():
        points = [f"{x(i):.1f},{y(math.log10(value)):.1f}" for i, value in enumerate(values) if value]
        parts.append(f'<polyline class="{escape(kind)} curve" points="{" ".join(points)}"/>')
    first = next(iter(curves.values()), ())
    for i in faults:
        value = first[i]
        place = y(math.log10(value)) if value else _TOP  # not finite: at the upper edge
        parts.append(f'<circle class="fault" cx="{x(i):.1f}" cy="{place:.1f}" r="3"/>')
    for i, name in enumerate(names):
        left = (x(i - 1) + x(i)) / 2 if i else x(i) - 3
        right = (x(i) + x(i + 1)) / 2 if i + 1 < len(names) else x(i) + 3
        said = f"{first[i]:.3g}" if i < len(first) and first[i] is not None else "not finite"
        parts.append(
            f'<rect class="layer" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{height}">'
            f"<title>{escape(name)}: {said}</title></rect>"
        )
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{escape(_caption(names))}</text></svg>')
    return "".join(parts)


def _caption(names: Sequence[str]) -> str:
    if not names:
        return "no layer"
    return f"{_shortened(names[0])} to {_shortened(names[-1])}, {len(names)} layers"


def _shortened(name: str) -> str:
    """A name of which there is room for two."""
    return name if len(name) <= 48 else f"{name[:20]} ... {name[-23:]}"
