"""Following an affine through a change of shape: which axes of one shape are which of the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from renormify.onnx.constants import Float64

__all__ = ["carried"]

Size = int | str | None
_Group = tuple[list[int], list[int]]


def carried(array: Float64, before: ir.Shape, after: ir.Shape) -> Float64 | None:
    """Return ``array``, which broadcasts against shape ``before``, as it broadcasts against ``after``.

    A reshape keeps the order of the elements, so both shapes fall into groups of neighbouring axes with equal
    products: ``(n, 8, 6, 6)`` and ``(n, 2, 4, 36)`` into ``n | 8 | 6, 6`` and ``n | 2, 4 | 36``. Within a
    group the array is written out and reshaped; groups along which it does not change may be of any size.

    Returns:
        The array, or None where it changes along axes whose counterpart is not known.
    """
    old, new = [_size(d) for d in before], [_size(d) for d in after]
    if 0 in old or 0 in new:
        return None
    shape = [1] * len(new)
    full = list(array.shape)
    for first, second in _groups(old, new):
        if all(array.shape[axis] == 1 for axis in first):
            continue
        sizes = _solved([old[axis] for axis in first], [new[axis] for axis in second])
        if sizes is None:
            return None
        for axis, size in zip(first, sizes[0], strict=True):
            full[axis] = size
        for axis, size in zip(second, sizes[1], strict=True):
            shape[axis] = size
    return np.broadcast_to(array, full).reshape(shape)


def _solved(one: list[Size], other: list[Size]) -> tuple[list[int], list[int]] | None:
    """Return two lists of equal products with their one unknown size filled in; None if there are more."""
    unknown = [sum(not isinstance(size, int) for size in sizes) for sizes in (one, other)]
    products = [prod(size for size in sizes if isinstance(size, int)) for sizes in (one, other)]
    missing, rest = divmod(products[0], products[1]) if unknown[1] else divmod(products[1], products[0])
    if sum(unknown) > 1 or rest or (missing != 1 and not any(unknown)):
        return None
    first, second = ([size if isinstance(size, int) else missing for size in sizes] for sizes in (one, other))
    return first, second


def _size(dimension: int | ir.SymbolicDim) -> Size:
    return dimension if isinstance(dimension, int) else dimension.value


def _groups(old: Sequence[Size], new: Sequence[Size]) -> list[_Group]:
    """Pair the axes from the right as far as sizes tell, then from the left; what is left is one group."""
    right, i, j = _from_the_left(old[::-1], new[::-1])
    ends = len(old) - i, len(new) - j
    groups = [
        ([ends[0] + i - 1 - a for a in one], [ends[1] + j - 1 - b for b in other]) for one, other in right
    ]
    left, i, j = _from_the_left(old[: ends[0]], new[: ends[1]])
    return [*groups, *left, (list(range(i, ends[0])), list(range(j, ends[1])))]


def _from_the_left(old: Sequence[Size], new: Sequence[Size]) -> tuple[list[_Group], int, int]:
    """Return the groups that sizes tell, and how many axes of each they take."""
    groups: list[_Group] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if not isinstance(old[i], int) and old[i] is not None and old[i] == new[j]:
            groups.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        end, stop, one, other = i, j, 1, 1
        while end == i or stop == j or one != other:
            smaller_first = end == i or (stop > j and one < other)
            line, at = (old, end) if smaller_first else (new, stop)
            size = line[at] if at < len(line) else None
            if not isinstance(size, int):
                return groups, i, j
            if smaller_first:
                one, end = one * size, end + 1
            else:
                other, stop = other * size, stop + 1
        groups.append((list(range(i, end)), list(range(j, stop))))
        i, j = end, stop
    return groups, i, j
