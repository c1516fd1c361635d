"""Batch Renormalization for pretrained BatchNorm models: convert, prove, fine-tune, deploy.

The names below are resolved on first use (PEP 562), so that ``import renormify`` loads neither torch nor
onnx nor the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renormify import errors, functional, onnx
    from renormify.advice import Advice
    from renormify.diagnosis import Diagnosis, diagnose
    from renormify.figures import LayerFigures
    from renormify.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
    from renormify.monitoring import Monitor
    from renormify.rewriting import (
        Conversion,
        SiteReport,
        convert,
        convert_sync,
        register_rule,
        renormify,
        revert,
    )
    from renormify.schedules import (
        ConstantSchedule,
        CosineSchedule,
        LinearSchedule,
        PaperSchedule,
        RenormScheduler,
    )
    from renormify.sync import SyncBatchRenorm
    from renormify.training import freeze_stats, recalibrate, unfreeze_stats

__all__ = [
    "Advice",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConstantSchedule",
    "Conversion",
    "CosineSchedule",
    "Diagnosis",
    "LayerFigures",
    "LinearSchedule",
    "Monitor",
    "PaperSchedule",
    "RenormScheduler",
    "SiteReport",
    "SyncBatchRenorm",
    "convert",
    "convert_sync",
    "diagnose",
    "errors",
    "freeze_stats",
    "functional",
    "onnx",
    "recalibrate",
    "register_rule",
    "renormify",
    "revert",
    "unfreeze_stats",
]

__version__ = "0.1.0"

_HOME = {
    "Advice": "advice",
    "BatchRenorm1d": "layers",
    "BatchRenorm2d": "layers",
    "BatchRenorm3d": "layers",
    "ConstantSchedule": "schedules",
    "Conversion": "rewriting",
    "CosineSchedule": "schedules",
    "Diagnosis": "diagnosis",
    "LayerFigures": "figures",
    "LinearSchedule": "schedules",
    "Monitor": "monitoring",
    "PaperSchedule": "schedules",
    "RenormScheduler": "schedules",
    "SiteReport": "rewriting",
    "SyncBatchRenorm": "sync",
    "convert": "rewriting",
    "convert_sync": "rewriting",
    "diagnose": "diagnosis",
    "freeze_stats": "training",
    "recalibrate": "training",
    "register_rule": "rewriting",
    "renormify": "rewriting",
    "revert": "rewriting",
    "unfreeze_stats": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"renormify.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"renormify.{name}")
    raise AttributeError(f"module 'renormify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
