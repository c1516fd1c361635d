"""The results: one JSON line for each run, with the machine and the versions that it was got with."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from paper.settings import PROTOCOL, Run

LIBRARIES = ("renormify", "torch", "torchvision", "efficientnet-lite-pytorch", "numpy", "onnxruntime")

Result = dict[str, Any]


def machine() -> dict[str, Any]:
    """What the figures were got on."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # by which runs differ in their last bits
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


class Records:
    """A file of results that a study continues.

    Args:
        file: is appended to, one line as each run is done; a line that was cut off, or got by a former way of
            doing runs, does not count.

    Attributes:
        results: by :meth:`Run.key`.
        machines: how many of the lines were got with each :func:`machine`, in JSON.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, Result] = {}
        self.machines: dict[str, int] = {}
        text = file.read_text() if file.exists() else ""
        self._gap = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["run"]["protocol"] == PROTOCOL:
                self._keep(Run.from_dict(record["run"]), record["result"], record["machine"])

    def choosing(self) -> dict[str, Result]:
        """The results that settings are chosen from."""
        return {key: result for key, result in self.results.items() if json.loads(key)["test"] == 0}

    def _keep(self, run: Run, result: Result, where: dict[str, Any]) -> None:
        self.results[run.key()] = result
        name = json.dumps(where)
        self.machines[name] = self.machines.get(name, 0) + 1

    def add(self, run: Run, result: Result, where: dict[str, Any]) -> None:
        self._keep(run, result, where)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            record = {"run": json.loads(run.key()), "result": result, "machine": where}
            stream.write(self._gap + json.dumps(record) + "\n")
        self._gap = ""
