"""The step-0 proof: a converted model computes in evaluation mode what the original computes, bit for bit.

It knows two callables and an input, and nothing of how one was made from the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from renormify.errors import InputError, one_line
from renormify.modes import evaluating

__all__ = ["Proof", "example_inputs", "prove_unchanged", "run"]

_PLAIN = (bool, int, float, complex, str, bytes, type, np.generic, torch.dtype, torch.device, torch.Size)
_DEEPEST = 20


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the comparison of two models showed.

    Args:
        identical: whether every output has the same structure, dtype, shape and bits. This is the verdict.
        max_abs_difference: the largest difference of two values; infinite where they cannot be compared. It
            can be 0 for outputs that are not identical: 0.0 and -0.0 are two bit patterns.
        outputs: the number of tensors compared.
        values: the number of values in them.
        nan_values: how many of the values are NaN; equal bits count as identical, but say little.
        deterministic: whether the original gave the same outputs twice. Where it draws random numbers, both
            models were compared on the same draws.
        reason: why the models are not identical, or what weakens the proof; None otherwise.
    """

    identical: bool
    max_abs_difference: float
    outputs: int
    values: int
    nan_values: int
    deterministic: bool
    reason: str | None = None

    @property
    def passed(self) -> bool:
        """The same as ``identical``."""
        return self.identical

    def to_dict(self) -> dict[str, Any]:
        """The proof as JSON knows it: a difference that is not finite becomes None."""
        record = dataclasses.asdict(self)
        if not math.isfinite(self.max_abs_difference):
            record["max_abs_difference"] = None
        return record


def example_inputs(
    shapes: Iterable[Sequence[int]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """Inputs drawn from a normal distribution: finite, and the same on every call.

    Args:
        shapes: the shape of each input.
        seed: another seed gives other inputs.
        dtype: of the inputs; drawn in float32 and then cast.
        device: where they are put; the draws are the CPU's in any case.

    Raises:
        InputError: there is no memory for such a shape.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for shape in map(tuple, shapes):
        try:
            inputs.append(torch.randn(shape, generator=generator).to(device=device, dtype=dtype))
        except (RuntimeError, TypeError, MemoryError) as error:  # more than the memory, or than 64 bits, hold
            raise InputError(f"cannot make an input of shape {shape}: {one_line(error)}") from error
    return tuple(inputs)


def prove_unchanged(
    original: nn.Module,
    converted: nn.Module,
    args: Tensor | tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Proof:
    """Runs both models in evaluation mode on the same input and compares every bit of their outputs.

    Each submodule's own training flag, the random state and the arguments are as they were afterwards, also
    when a model fails. The original runs twice, with different seeds, so that a model that never gives the
    same output twice is told apart from a changed one.

    Args:
        original: the model as it was.
        converted: the model as it is now.
        args: the positional arguments; a single tensor may be given bare.
        kwargs: the keyword arguments.

    Raises:
        InputError: the original itself fails on this input.
    """
    first = run(original, args, kwargs, seed=0)
    own = _compare(first, run(original, args, kwargs, seed=1))
    try:
        result = _compare(first, run(converted, args, kwargs, seed=0))
    except InputError as error:
        result = _Difference(reason=f"the original runs, but once converted {error}")
    return _judge(own, result)


def run(
    model: nn.Module,
    args: Tensor | tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Any:
    """Runs a model once in evaluation mode and leaves no trace of it: flags, random state, arguments.

    Args:
        model: the model.
        args: the positional arguments; a single tensor may be given bare.
        kwargs: the keyword arguments.
        seed: of the random numbers that the model may draw.

    Raises:
        InputError: the model fails on this input.
    """
    inputs = (args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
    # Cloned for each run, and so are the outputs: a model may write into its input or return its own buffer.
    own_args, own_kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            outputs = model(*own_args, **own_kwargs)
            return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), outputs)
    except Exception as error:  # a user's model may raise anything
        raise InputError(f"the model fails on {_describe(inputs)}: {one_line(error)}") from error


def _judge(own: _Difference, result: _Difference) -> Proof:
    reason = result.reason
    if reason is None and result.outputs == 0:
        reason = "the model returns no tensor, so nothing was compared"
    elif reason is None and result.values == 0:
        reason = "every output is empty, so nothing was compared"
    identical = reason is None
    if identical and own.reason is not None:
        reason = (
            "the model's outputs differ from run to run; both models were compared on the same random draws"
        )
    elif identical and result.nan_values:
        reason = f"{result.nan_values} of {result.values} values compared are NaN"
    elif not identical and own.reason is not None:
        reason = f"the original is not deterministic, so nothing can be proven ({own.reason})"
    return Proof(
        identical=identical,
        max_abs_difference=result.max_abs,
        outputs=result.outputs,
        values=result.values,
        nan_values=result.nan_values,
        deterministic=own.reason is None,
        reason=reason,
    )


@dataclasses.dataclass
class _Difference:
    """What is found while two outputs are walked side by side; ``reason`` is the first difference."""

    reason: str | None = None
    max_abs: float = 0.0
    outputs: int = 0
    values: int = 0
    nan_values: int = 0

    def __post_init__(self) -> None:
        if self.reason is not None:
            self.max_abs = math.inf

    def note(self, reason: str, max_abs: float = math.inf) -> None:
        self.reason = self.reason or reason
        self.max_abs = max(self.max_abs, max_abs)


def _compare(first: Any, second: Any) -> _Difference:
    found = _Difference()
    _walk(first, second, "output", found)
    return found


def _walk(first: Any, second: Any, name: str, found: _Difference, depth: int = 0) -> None:
    leaves_1, spec_1 = pytree.tree_flatten_with_path(first)
    leaves_2, spec_2 = pytree.tree_flatten_with_path(second)
    if spec_1 != spec_2 or depth > _DEEPEST:
        found.note(f"{name} has another structure" if spec_1 != spec_2 else f"{name} is nested too deeply")
        return
    for (path, leaf_1), (_, leaf_2) in zip(leaves_1, leaves_2, strict=True):
        where = name + pytree.keystr(path)
        if type(leaf_1) is not type(leaf_2):
            found.note(f"{where} is of type {type(leaf_2).__name__}, not {type(leaf_1).__name__}")
        elif isinstance(leaf_1, Tensor):
            _compare_tensors(leaf_1, leaf_2, where, found)
        elif isinstance(leaf_1, np.ndarray):
            _compare_tensors(torch.from_numpy(leaf_1), torch.from_numpy(leaf_2), where, found)
        elif isinstance(leaf_1, _PLAIN) or leaf_1 is None:
            if repr(leaf_1) != repr(leaf_2):  # repr and not ==: NaN equals itself, 0.0 is not -0.0
                found.note(f"{where} is {leaf_2!r:.40}, not {leaf_1!r:.40}")
        elif getattr(leaf_1, "__dict__", None):
            # A result object that pytree does not know: its attributes are its outputs.
            _walk(dict(vars(leaf_1)), dict(vars(leaf_2)), where, found, depth + 1)
        else:
            found.note(f"{where} is of type {type(leaf_1).__name__}, which cannot be compared")


def _compare_tensors(first: Tensor, second: Tensor, name: str, found: _Difference) -> None:
    for what in ("dtype", "shape", "layout", "device"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours != theirs:
            found.note(f"{name} has {what} {_plain(theirs)}, not {_plain(ours)}")
            return
    first, second = _strided(first), _strided(second)
    found.outputs += 1
    found.values += first.numel()
    if first.is_floating_point() or first.is_complex():
        found.nan_values += int(torch.isnan(first).sum())
    if torch.equal(_bits(first), _bits(second)):
        return
    max_abs = _max_abs(first, second)
    if max_abs > 0:
        found.note(f"{name} differs by up to {max_abs:.3g}", max_abs)
    else:
        found.note(
            f"{name} differs in its bits, though not in value (0.0 and -0.0, or two kinds of NaN)", 0.0
        )


def _strided(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().contiguous()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _max_abs(first: Tensor, second: Tensor) -> float:
    wide = torch.complex128 if first.is_complex() else torch.float64
    a, b = first.to(wide), second.to(wide)
    difference = (a - b).abs()
    # Infinities of one sign and pairs of NaN agree; a NaN beside a number is as far off as can be.
    difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
    largest = float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())
    if first.is_floating_point() or first.is_complex():
        return largest
    return max(largest, 1.0)  # integers that differ, differ by one at least, also beyond float64's 53 bits


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


def _describe(inputs: Any) -> str:
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return f"an input of shape {', '.join(map(str, shapes))}" if shapes else "these arguments"
