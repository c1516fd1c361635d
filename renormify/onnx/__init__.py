"""Deployment: export to ONNX, fold the inference affine away, prove that nothing changed.

The names below are resolved on first use (PEP 562): importing this package loads neither torch nor onnx nor
onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renormify.onnx.exporting import Export, export_onnx
    from renormify.onnx.folding import Fold, FoldSite, fold_onnx
    from renormify.onnx.verification import LayerParity, OutputParity, Parity, verify_onnx

__all__ = [
    "Export",
    "Fold",
    "FoldSite",
    "LayerParity",
    "OutputParity",
    "Parity",
    "export_onnx",
    "fold_onnx",
    "verify_onnx",
]

_HOME = {
    "Export": "exporting",
    "Fold": "folding",
    "FoldSite": "folding",
    "LayerParity": "verification",
    "OutputParity": "verification",
    "Parity": "verification",
    "export_onnx": "exporting",
    "fold_onnx": "folding",
    "verify_onnx": "verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"renormify.onnx.{_HOME[name]}"), name)
    raise AttributeError(f"module 'renormify.onnx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
