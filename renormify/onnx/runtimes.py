"""What runs an ONNX file: one class for each runtime, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

__all__ = ["RUNTIMES", "Runtime"]


class Runtime(ABC):
    """A loaded file that answers inputs with outputs, both by position.

    Args:
        path: the ONNX file.

    Raises:
        Exception: of the runtime's own type, where it cannot load the file.
    """

    name: ClassVar[str]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @abstractmethod
    def run(self, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the outputs in the file's order; raises what the runtime raises."""


class OnnxRuntime(Runtime):
    """onnxruntime on the CPU, at its default optimisation level: what a user's own session would do."""

    name = "onnxruntime"

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = (
            4  # its errors come back as exceptions; its log would go to stderr as well
        )
        options.intra_op_num_threads = 2
        # Idle threads that spin would take the cores from torch, which runs in between.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        feed = dict(zip(self.input_names, inputs, strict=True))
        return [np.asarray(output) for output in self._session.run(None, feed)]


RUNTIMES: dict[str, type[Runtime]] = {runtime.name: runtime for runtime in (OnnxRuntime,)}
