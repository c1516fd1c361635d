"""What runs an ONNX file: one class for each runtime, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from renormify import errors

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
    level: ClassVar[str] = "ORT_ENABLE_ALL"

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, self.level)
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


class OnnxRuntimeBasic(OnnxRuntime):
    """onnxruntime with only those optimisations that keep the file's own operators."""

    name = "onnxruntime-basic"
    level = "ORT_ENABLE_BASIC"


class OnnxRuntimeOff(OnnxRuntime):
    """onnxruntime with its optimisations off: the file as it is written."""

    name = "onnxruntime-off"
    level = "ORT_DISABLE_ALL"


class OpenVino(Runtime):
    """OpenVINO's CPU plugin, held to the precision of the file: by itself it may compute in half of it.

    Raises:
        errors.MissingExtraError: openvino is not installed.
    """

    name = "openvino"

    def __init__(self, path: Path) -> None:
        try:
            import openvino
        except ImportError as error:
            raise errors.MissingExtraError("openvino", "openvino", "to run the file with OpenVINO") from error
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
        self._compiled = core.compile_model(core.read_model(path), "CPU", settings)
        self.input_names = tuple(value.any_name for value in self._compiled.inputs)
        self.output_names = tuple(value.any_name for value in self._compiled.outputs)

    def run(self, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        results = self._compiled(inputs)
        return [np.asarray(results[index]) for index in range(len(self.output_names))]


RUNTIMES: dict[str, type[Runtime]] = {
    runtime.name: runtime for runtime in (OnnxRuntime, OnnxRuntimeBasic, OnnxRuntimeOff, OpenVino)
}
