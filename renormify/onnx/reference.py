"""What torch says: the model's own outputs, the float64 model's, and the noise between the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from renormify import errors
from renormify.modes import evaluating
from renormify.onnx.examples import batch_size, has_batch, leaf_names, map_tensors, tensors_of
from renormify.onnx.noise import FALLBACK, Noise, comparable, largest_of, measure
from renormify.onnx.rounding import rounded_otherwise

__all__ = ["KINDS", "Answer", "Reference", "ask_torch", "to_numpy"]

Array = npt.NDArray[Any]
Arguments = tuple[Any, ...]

# The largest error of a handful of numbers says little about the next one, so the floor is taken over at
# least this many rows.
FLOOR_ROWS = 10
#: The kinds of input: the example itself and rows like it; standard normal; the example a hundred times as
#: large, where what saturates does; zeros. Integers are the example's in each of them.
KINDS = ("example", "normal", "large", "zeros")
_LARGE = 100.0
#: How often the model is run again, rounded otherwise, to see more of its noise.
REPEATS = 2


@dataclass(frozen=True)
class Answer:
    """What torch says at one batch size.

    Attributes:
        arguments: of forward: the example, resized.
        inputs: their tensors, as the file takes them.
        outputs: the model's own output tensors, in pytree order.
        truth: the float64 model's, or None where there is no such model.
        names: of the outputs, from the keys of the dict that the model returns; "" where it returns none.
    """

    arguments: Arguments
    inputs: list[Array]
    outputs: list[Tensor]
    truth: list[Tensor] | None
    names: list[str]


@dataclass(frozen=True)
class Returned:
    """What a forward returned.

    Attributes:
        tensors: in pytree order.
        names: of each, as in ``Answer``.
        odd: whether there was anything else.
    """

    tensors: list[Tensor]
    names: list[str]
    odd: bool


@dataclass(frozen=True)
class Reference:
    """What torch says at every batch size.

    Attributes:
        answers: by batch size.
        noise: for each output, what is known of its noise; None where it is no plain array of floats.
        random: the positions of outputs that differ from one call to the next.
        notes: what was out of the ordinary.
    """

    answers: dict[int, Answer]
    noise: list[Noise | None]
    random: frozenset[int]
    notes: tuple[str, ...]

    @property
    def finite(self) -> bool:
        """Whether every float of the model's own outputs is finite."""
        return all(
            bool(output.isfinite().all())
            for answer in self.answers.values()
            for output in (*answer.outputs, *(answer.truth or ()))
            if comparable(output)
        )


def ask_torch(
    model: torch.nn.Module | Callable[..., Any],
    arguments: Arguments,
    sizes: tuple[int, ...],
    kind: str = "example",
) -> Reference:
    """Run the model, and its float64 copy, at every batch size.

    Args:
        model: the model.
        arguments: the example.
        sizes: the batch sizes.
        kind: of the inputs, one of ``KINDS``.

    Raises:
        errors.InputError: the model's own forward fails.
    """
    batches = [
        (size, _of_kind(kind, arguments, resized(arguments, size, seed=size), seed=size))
        for size in dict.fromkeys(sizes)
    ]
    # Zeros are one row many times, and one row's errors do not tell the noise: rows like the example do.
    rows = 0 if kind == "zeros" else sum(size for size, _ in batches)
    # More rows come as more batches of the sizes asked for: the model may take no other.
    while rows < FLOOR_ROWS:
        size, _ = batches[len(batches) % len(set(sizes))]
        more = resized(arguments, size, seed=1000 + rows, own_rows=False)
        batches.append((size, more if kind == "zeros" else _of_kind(kind, arguments, more, seed=1000 + rows)))
        rows += size
    notes: list[str] = []
    truth: list[list[Tensor]] | None = None
    others: list[list[Tensor]] = []
    with torch.no_grad(), evaluating(model) if isinstance(model, torch.nn.Module) else nullcontext():
        own = [_own_outputs(model, size, batch) for size, batch in batches]
        outputs = [returned.tensors for returned in own]
        random = _random(model, batches[0][1], outputs[0])
        if isinstance(model, torch.nn.Module):
            truth, drawn = _truth(model, [batch for _, batch in batches], outputs, notes)
            random |= drawn
        else:
            notes.append(_no_truth("a plain callable has no float64 copy"))
        if isinstance(model, torch.nn.Module) and truth is not None:
            for seed in range(REPEATS):
                other = rounded_otherwise(model, seed)
                others += [_outputs(other, batch).tensors for _, batch in batches]
    if any(returned.odd for returned in own):
        notes.append("outputs of the model that are no tensors were left out")
    answers: dict[int, Answer] = {}
    for index, (size, batch) in enumerate(batches[: len(set(sizes))]):
        inputs = [to_numpy(tensor) for tensor in tensors_of(batch)]
        real = None if truth is None else truth[index]
        answers[size] = Answer(batch, inputs, outputs[index], real, own[index].names)
    positions = range(max(map(len, outputs)))
    noise = [_noise(position, [*outputs, *others], truth) for position in positions]
    return Reference(answers, noise, random, tuple(notes))


def _noise(position: int, samples: list[list[Tensor]], truth: list[list[Tensor]] | None) -> Noise | None:
    """Measure the noise of one output over all batches, and over all times that they were run."""
    own, real = [], []
    for index, outputs in enumerate(samples):
        if position >= len(outputs):
            continue
        true = None if truth is None else truth[index % len(truth)][position]
        # Rounded otherwise, a detector may find one box less.
        if true is None or true.shape == outputs[position].shape:
            own.append(outputs[position])
            real += [] if true is None else [true]
    if not all(map(comparable, [*own, *real])):
        return None
    return measure(own, None if truth is None else real)


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


def _of_kind(kind: str, example: Arguments, arguments: Arguments, *, seed: int) -> Arguments:
    """Return the arguments with the floats that have a batch made into that kind."""
    generator = torch.Generator().manual_seed(seed)

    def change(given: Tensor, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not has_batch(given, size):
            return tensor
        if kind == "normal":
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return torch.zeros_like(tensor) if kind == "zeros" else tensor * _LARGE

    if kind == "example":
        return arguments
    size, given = batch_size(example), iter(tensors_of(example))
    return map_tensors(lambda tensor: change(next(given), tensor), arguments)


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as NumPy has it, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array


def _own_outputs(model: Callable[..., Any], size: int, arguments: Arguments) -> Returned:
    try:
        return _outputs(model, arguments)
    except Exception as error:  # the user's forward
        name = type(model).__name__ if isinstance(model, torch.nn.Module) else "the callable"
        raise errors.InputError(
            f"{name} fails at batch size {size}: {errors.one_line(error)}; give an example input and batch "
            "sizes that its forward takes"
        ) from error


def _outputs(model: Callable[..., Any], arguments: Arguments) -> Returned:
    result = model(*arguments)
    leaves = pytree.tree_leaves(result)
    pairs = [
        (leaf.detach().cpu(), "" if name[:1].isdigit() else name)
        for leaf, name in zip(leaves, leaf_names(result), strict=True)
        if isinstance(leaf, Tensor)
    ]
    return Returned([tensor for tensor, _ in pairs], [name for _, name in pairs], len(pairs) < len(leaves))


def _random(model: Callable[..., Any], batch: Arguments, outputs: list[Tensor]) -> frozenset[int]:
    """Return which outputs are others when the model is asked again."""
    again = _outputs(model, batch).tensors
    if len(again) != len(outputs):
        return frozenset(range(len(outputs)))
    return frozenset(index for index, pair in enumerate(zip(outputs, again, strict=True)) if not _same(*pair))


def _same(output: Tensor, again: Tensor) -> bool:
    if comparable(output):
        if output.shape != again.shape:
            return False
        # A sum in another order, as several cores make it, is not the chance that is meant.
        change = output.double() - again.double()
        return largest_of(change) <= FALLBACK.get(output.dtype, FALLBACK[torch.float32]) * largest_of(output)
    whole = not output.is_floating_point() and not output.is_complex() and output.layout is torch.strided
    return not whole or torch.equal(output, again)


def _truth(
    model: torch.nn.Module, batches: list[Arguments], own: list[list[Tensor]], notes: list[str]
) -> tuple[list[list[Tensor]] | None, frozenset[int]]:
    """Return the outputs of a float64 copy, or None and a note where there is none, and which are random."""
    try:
        double = copy.deepcopy(model).double()
        batches = [
            map_tensors(lambda x: x.double() if x.is_floating_point() else x, batch) for batch in batches
        ]
        truth = [_outputs(double, batch).tensors for batch in batches]
        random = _random(double, batches[0], truth[0])  # in float64 even a little chance shows
    except Exception as error:  # deepcopy and forward run the user's code
        notes.append(_no_truth(errors.one_line(error)))
        return None, frozenset()
    for mine, real in zip(own, truth, strict=True):
        if len(mine) != len(real) or any(
            tensor.shape != other.shape
            for tensor, other in zip(mine, real, strict=True)
            if comparable(tensor)
        ):
            notes.append(_no_truth("in float64 its outputs have other shapes"))
            return None, frozenset()
        if any(tensor.is_floating_point() and tensor.dtype is not torch.float64 for tensor in real):
            notes.append(_no_truth("its forward casts to a type of its own"))
            return None, frozenset()
    return truth, random


def _no_truth(why: str) -> str:
    return (
        f"no float64 model to compare with ({why}): the yardstick is torch's own output, and a difference of "
        f"{FALLBACK[torch.float32]:g} of its largest value is allowed in float32"
    )
