"""An ONNX file as the model that another file is judged by: its inputs, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from renormify import errors
from renormify.onnx.reference import to_numpy

__all__ = ["Original"]

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(bool)": torch.bool,
}
UNPROVEN = "--no-verify (verify=False) folds it without the proof"


class Original:
    """A file that runs as a callable of tensors.

    Args:
        path: the file.
        shapes: of its inputs, or None for what the file says.

    Attributes:
        args: an example input; float inputs are drawn from a normal distribution, others are 0.
        batch_sizes: the batch sizes that the file takes, of those that were asked for.

    Raises:
        errors.InputError: onnxruntime does not run the file, or the file does not tell the shape of an input.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shapes: Sequence[Sequence[int]] | None = None,
        batch_sizes: Sequence[int] = (1, 2, 7),
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # As it is written: what a runtime's own optimiser does to it is not what the other is judged by.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of onnxruntime's own types
            raise errors.InputError(
                f"onnxruntime cannot run {path}: {errors.one_line(error)}; {UNPROVEN}"
            ) from error
        inputs = self._session.get_inputs()
        if shapes is not None and len(shapes) != len(inputs):
            raise errors.InputError(f"{path} has {len(inputs)} inputs, and {len(shapes)} shapes were given")
        generator = torch.Generator().manual_seed(0)
        args, fixed = [], []
        for index, value in enumerate(inputs):
            given = None if shapes is None else shapes[index]
            args.append(_example(path, value, given, generator))
            fixed += value.shape[:1]
        self.args: tuple[Tensor, ...] = tuple(args)
        sizes = {size for size in fixed if isinstance(size, int)}
        self.batch_sizes = tuple(sizes) if len(sizes) == 1 else tuple(batch_sizes)

    def __call__(self, *args: Tensor) -> dict[str, Tensor]:
        """Run the file on its inputs, by position, and return its outputs by name."""
        names = [value.name for value in self._session.get_inputs()]
        feed = {name: to_numpy(tensor) for name, tensor in zip(names, args, strict=True)}
        outputs = zip(self._session.get_outputs(), self._session.run(None, feed), strict=True)
        return {value.name: torch.from_numpy(output) for value, output in outputs}


def _example(path: object, value: Any, given: Sequence[int] | None, generator: torch.Generator) -> Tensor:
    dtype = _TYPES.get(value.type)
    if dtype is None:
        raise errors.InputError(f"input {value.name!r} of {path} is a {value.type}; {UNPROVEN}")
    shape = [size if isinstance(size, int) else None for size in value.shape]
    if shape and shape[0] is None:
        shape[0] = 2
    if given is not None:
        shape = list(given)
    if any(size is None or size < 1 for size in shape):
        said = ", ".join(str(size) if size else "?" for size in value.shape)
        raise errors.InputError(
            f"{path} leaves the shape of input {value.name!r} open ({said}): give it, as "
            f"--input-shape 1,3,224,224, or {UNPROVEN}"
        )
    sizes = [size for size in shape if size is not None]
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.zeros(sizes, dtype=dtype)
