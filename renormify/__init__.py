"""Batch Renormalization for pretrained BatchNorm models: convert, prove, fine-tune, deploy.

The names below are resolved on first use (PEP 562), so that ``import renormify`` loads neither torch nor
onnx nor the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renormify import errors, functional, onnx
    from renormify.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
    from renormify.rewriting import (
        Conversion,
        SiteReport,
        convert,
        convert_sync,
        register_rule,
        renormify,
        revert,
    )
    from renormify.sync import SyncBatchRenorm

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Conversion",
    "SiteReport",
    "SyncBatchRenorm",
    "convert",
    "convert_sync",
    "errors",
    "functional",
    "onnx",
    "register_rule",
    "renormify",
    "revert",
]

__version__ = "0.1.0"

_HOME = {
    "BatchRenorm1d": "layers",
    "BatchRenorm2d": "layers",
    "BatchRenorm3d": "layers",
    "Conversion": "rewriting",
    "SiteReport": "rewriting",
    "SyncBatchRenorm": "sync",
    "convert": "rewriting",
    "convert_sync": "rewriting",
    "register_rule": "rewriting",
    "renormify": "rewriting",
    "revert": "rewriting",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"renormify.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"renormify.{name}")
    raise AttributeError(f"module 'renormify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
