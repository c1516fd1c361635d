"""Which site is to blame where a folded file computes something else than the file it was made from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from renormify.onnx.files import read_model, write_model
from renormify.onnx.folding import FoldSite, fold_graph

__all__ = ["first_fault"]


def first_fault(
    path: str | os.PathLike[str], sites: int, agrees: Callable[[Path], bool], *, leftover: str = "auto"
) -> FoldSite | None:
    """Return the first site that makes the difference, by bisection over how many of them are folded.

    Args:
        path: the file as it was.
        sites: how many it has; folding all of them is known to make a difference.
        agrees: tells whether a file that is folded in part computes what ``path`` does.
        leftover: as in ``fold_onnx``.

    Returns:
        The site, or None where the file differs from itself with no site folded, as with random operators.
    """
    low, high = -1, sites
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "partly.onnx"
        while high - low > 1:
            middle = (low + high) // 2
            model = read_model(path)
            fold_graph(model, leftover=leftover, most=middle)
            write_model(model, target)
            low, high = (middle, high) if agrees(target) else (low, middle)
    return fold_graph(read_model(path), leftover=leftover, most=high)[high - 1] if high else None
