"""What torch says: the model's own outputs, the float64 model's, and the noise between the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from renormify import errors
from renormify.onnx.examples import batch_size, evaluating, has_batch, map_tensors, tensors_of
from renormify.onnx.noise import FALLBACK, Noise, comparable, measure

__all__ = ["Answer", "Reference", "ask_torch", "to_numpy"]

Array = npt.NDArray[Any]
Arguments = tuple[Any, ...]

# The largest error of a handful of numbers says little about the next one, so the floor is taken over at
# least this many rows.
FLOOR_ROWS = 10


@dataclass(frozen=True)
class Answer:
    """What torch says at one batch size.

    Attributes:
        inputs: the tensors of the example, resized.
        outputs: the model's own output tensors, in pytree order.
        truth: the float64 model's, or None where there is no such model.
    """

    inputs: list[Array]
    outputs: list[Tensor]
    truth: list[Tensor] | None


@dataclass(frozen=True)
class Reference:
    """What torch says at every batch size.

    Attributes:
        answers: by batch size.
        noise: for each output, what is known of its noise; None where it is no plain array of floats.
        notes: what was out of the ordinary.
    """

    answers: dict[int, Answer]
    noise: list[Noise | None]
    notes: tuple[str, ...]


def ask_torch(
    model: torch.nn.Module | Callable[..., Any], arguments: Arguments, sizes: tuple[int, ...]
) -> Reference:
    """Run the model, and its float64 copy, at every batch size.

    Raises:
        errors.InputError: the model's own forward fails.
    """
    batches = [(size, resized(arguments, size, seed=size)) for size in dict.fromkeys(sizes)]
    rows = sum(size for size, _ in batches)
    # More rows come as more batches of the sizes asked for: the model may take no other.
    while rows < FLOOR_ROWS:
        size, _ = batches[len(batches) % len(set(sizes))]
        batches.append((size, resized(arguments, size, seed=1000 + rows, own_rows=False)))
        rows += size
    notes: list[str] = []
    with torch.no_grad():
        if isinstance(model, torch.nn.Module):
            with evaluating(model):
                own = [_own_outputs(model, size, batch) for size, batch in batches]
                truth = _truth(model, [batch for _, batch in batches], [tensors for tensors, _ in own], notes)
        else:
            own = [_own_outputs(model, size, batch) for size, batch in batches]
            truth = None
            notes.append(_no_truth("a plain callable has no float64 copy"))
    if any(others for _, others in own):
        notes.append("outputs of the model that are no tensors were left out")
    answers: dict[int, Answer] = {}
    for index, (size, batch) in enumerate(batches[: len(set(sizes))]):
        inputs = [to_numpy(tensor) for tensor in tensors_of(batch)]
        answers[size] = Answer(inputs, own[index][0], None if truth is None else truth[index])
    noise: list[Noise | None] = []
    for position in range(max(len(tensors) for tensors, _ in own)):
        there = [index for index, (tensors, _) in enumerate(own) if position < len(tensors)]
        mine = [own[index][0][position] for index in there]
        real = None if truth is None else [truth[index][position] for index in there]
        noise.append(measure(mine, real) if all(map(comparable, [*mine, *(real or [])])) else None)
    return Reference(answers, noise, tuple(notes))


def resized(arguments: Arguments, size: int, *, seed: int, own_rows: bool = True) -> Arguments:
    """Return the arguments with ``size`` rows: the example's own first, then noise like them.

    Noise has the example's mean and standard deviation and stays within its range; integers are the example's
    rows again, since a number never seen may not be a valid one.
    """
    given = batch_size(arguments)
    generator = torch.Generator().manual_seed(seed)

    def resize(tensor: Tensor) -> Tensor:
        if not has_batch(tensor, given) or not tensor.numel():
            return tensor
        rows = tensor.detach()[torch.arange(size, device=tensor.device) % tensor.shape[0]].clone()
        kept = tensor.shape[0] if own_rows else 0
        if tensor.is_floating_point() and size > kept:
            example = tensor.detach().double().cpu()
            spread = float(example.std(correction=0)) or 1.0
            noise = torch.randn((size - kept, *tensor.shape[1:]), generator=generator, dtype=torch.float64)
            noise = noise * spread + example.mean()
            if example.min() < example.max():  # a model that takes a logarithm must not be given a negative
                noise = noise.clamp(example.min(), example.max())
            rows[kept:] = noise.to(tensor)
        return rows

    return map_tensors(resize, arguments)


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as NumPy has it, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array


def _own_outputs(model: Callable[..., Any], size: int, arguments: Arguments) -> tuple[list[Tensor], bool]:
    try:
        return _outputs(model, arguments)
    except Exception as error:  # the user's forward
        name = type(model).__name__ if isinstance(model, torch.nn.Module) else "the callable"
        raise errors.InputError(
            f"{name} fails at batch size {size}: {errors.one_line(error)}; give an example input and batch "
            "sizes that its forward takes"
        ) from error


def _outputs(model: Callable[..., Any], arguments: Arguments) -> tuple[list[Tensor], bool]:
    """Return the tensors of the result in pytree order, and whether there was anything else."""
    leaves = pytree.tree_leaves(model(*arguments))
    tensors = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, len(tensors) < len(leaves)


def _truth(
    model: torch.nn.Module, batches: list[Arguments], own: list[list[Tensor]], notes: list[str]
) -> list[list[Tensor]] | None:
    """Return the outputs of a float64 copy, or None and a note where there can be none."""
    try:
        double = copy.deepcopy(model).double()
        truth = [
            _outputs(double, map_tensors(lambda x: x.double() if x.is_floating_point() else x, batch))[0]
            for batch in batches
        ]
    except Exception as error:  # deepcopy and forward run the user's code
        notes.append(_no_truth(errors.one_line(error)))
        return None
    for mine, real in zip(own, truth, strict=True):
        if len(mine) != len(real) or any(
            tensor.shape != other.shape
            for tensor, other in zip(mine, real, strict=True)
            if comparable(tensor)
        ):
            notes.append(_no_truth("in float64 its outputs have other shapes"))
            return None
        if any(tensor.is_floating_point() and tensor.dtype is not torch.float64 for tensor in real):
            notes.append(_no_truth("its forward casts to a type of its own"))
            return None
    return truth


def _no_truth(why: str) -> str:
    return (
        f"no float64 model to compare with ({why}): the yardstick is torch's own output, and a difference of "
        f"{FALLBACK[torch.float32]:g} of its largest value is allowed in float32"
    )
