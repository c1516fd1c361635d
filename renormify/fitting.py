"""Loading checkpoints into models: which key is which, and no value changed by it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from renormify.errors import CheckpointError, KeyMismatchError, one_line
from renormify.reading import Checkpoint

__all__ = ["check_weights", "fit_keys", "load_weights", "tied_to"]

_PREFIX = "module."  # of DataParallel and DistributedDataParallel
# What wrappers put in front of the names of what they wrap, wherever in a model that is.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTER = "n_averaged"  # of torch's AveragedModel, beside the model that it keeps under "module."


def load_weights(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> nn.Module:
    """Loads a state dict into a model in place; every key must fit, ``num_batches_tracked`` excepted.

    A :class:`Checkpoint` may have the prefix ``module.`` where the model has none, or the other way round.
    No value is rounded: a model in float32 becomes float64 for a checkpoint that is in float64 throughout and
    needs it, and where a value would change all the same, nothing is loaded.

    Raises:
        KeyMismatchError: keys are missing, unexpected or of another shape; the message names the first few.
            Also where the model's dtype cannot hold what the checkpoint has.
        CheckpointError: a tensor is sparse or quantised, and the model's is not.
    """
    checkpoint = fit_keys(model, checkpoint)
    own = _tensors(model.state_dict())
    loaded = {key: value for key, value in _tensors(checkpoint).items() if key in own}
    _check_kinds(own, loaded, _name(checkpoint))
    if (shapes := _other_shapes(own, loaded)) or _streamed(checkpoint):
        check_weights(
            model, checkpoint
        )  # before any value is looked at, which may be many more than announced
    read: Callable[[str], Tensor] = (
        checkpoint.read if isinstance(checkpoint, Checkpoint) else loaded.__getitem__
    )
    single = _floating(own) == {torch.float32}
    if single and _floating(loaded) == {torch.float64} and _not_held(own, loaded, read) is not None:
        model.double()
        own = _tensors(model.state_dict())
    if (key := _not_held(own, loaded, read)) is not None:
        raise _other_dtype(_name(checkpoint), key, loaded[key], own[key])
    if _streamed(checkpoint):
        with torch.no_grad():
            for key in loaded:
                own[key].copy_(read(key))
        extra = {key: value for key, value in checkpoint.items() if key not in loaded}
        try:  # a module's own state, which is no tensor, is for the module to take
            model.load_state_dict(extra, strict=False)
        except Exception as error:
            raise CheckpointError(
                f"{_name(checkpoint)} does not fit: the model does not take its state: {one_line(error)}"
            ) from error
        return model
    try:
        result = model.load_state_dict(checkpoint, strict=False)
    except Exception as error:  # RuntimeError from torch, and anything from a model's own hooks
        missing = _missing(model, own, checkpoint)
        unexpected = [key for key in checkpoint if key not in own]
        raise _mismatch(model, checkpoint, missing, unexpected, shapes, error) from error
    missing = _missing(model, result.missing_keys, checkpoint)
    if missing or result.unexpected_keys:
        raise _mismatch(model, checkpoint, missing, result.unexpected_keys, [], None)
    return model


def check_weights(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> None:
    """Checks keys, shapes and kinds of tensors, all that can be said without their values.

    The model may be on the meta device.

    Raises:
        KeyMismatchError, CheckpointError: see :func:`load_weights`.
    """
    own = model.state_dict()
    missing = _missing(model, own, checkpoint)
    unexpected = [key for key in checkpoint if key not in own]
    shapes = _other_shapes(_tensors(own), checkpoint)
    if missing or unexpected or shapes:
        raise _mismatch(model, checkpoint, missing, unexpected, shapes, None)
    _check_kinds(_tensors(own), _tensors(checkpoint), _name(checkpoint))


def fit_keys(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The checkpoint under the model's own keys, where a prefix or a wrapper's name is all that differs.

    ``module.`` is of DataParallel and DistributedDataParallel, ``_orig_mod.`` of torch.compile, ``model.`` of
    Lightning's modules, and so on: a prefix is taken off where every key has it and the model has not, and
    ``module.`` also put on. A model may have a part of such a name, so what makes more keys the model's is
    taken, and of equals the least change. A plain mapping comes back as it is.
    """
    if not isinstance(checkpoint, Checkpoint):
        return checkpoint
    known = model.state_dict().keys()
    candidates = [checkpoint, checkpoint.renamed(lambda key: _PREFIX + key)]
    if any(_WRAPPERS.search(key) for key in checkpoint):
        candidates.append(checkpoint.renamed(lambda key: _WRAPPERS.sub("", key)))
    for candidate in tuple(candidates[:1] + candidates[2:]):
        candidates += [_without(candidate, prefix) for prefix in _prefixes(candidate)]
    return max(candidates, key=lambda candidate: len(candidate.keys() & known))  # the first of equals


def _without(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    kept = {key: None for key in checkpoint if key != _COUNTER}
    return checkpoint.renamed(lambda key: key.removeprefix(prefix), kept)


def _prefixes(checkpoint: Mapping[str, Tensor]) -> Iterator[str]:
    """The parts that all keys have in front, shortest first."""
    keys = [key for key in checkpoint if key != _COUNTER]
    if not keys:
        return
    first, last = min(keys)[:200], max(keys)[:200]  # what these two share, all share
    for dot in re.finditer(r"\.", first):
        if last.startswith(first[: dot.end()]):
            yield first[: dot.end()]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    # A module's extra state may be anything.
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _floating(tensors: Mapping[str, Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in tensors.values() if value.is_floating_point()}


def _check_kinds(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], where: str) -> None:
    for key, value in loaded.items():
        if value.layout != own[key].layout or value.is_quantized != own[key].is_quantized:
            kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
            remedy = "dequantize()" if value.is_quantized else "to_dense()"
            raise CheckpointError(
                f"{where} holds {key} as a {kind} tensor, and the model does not; save {remedy} of it instead"
            )
        if own[key].is_floating_point() and not value.is_floating_point():
            # Integers as weights are quantised, and complex numbers would lose a part.
            raise _other_dtype(where, key, value, own[key])


def _other_dtype(where: str, key: str, theirs: Tensor, ours: Tensor) -> KeyMismatchError:
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (theirs, ours)]
    return KeyMismatchError(
        f"{where} does not fit the model: {key} is {kinds[0]} in the file and {kinds[1]} in the model, which "
        f"would change its values; build the model in {kinds[0]}, or cast the file's tensors to {kinds[1]} "
        "where that is meant"
    )


def _not_held(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> str | None:
    """The first key whose values the model's dtype cannot hold to the bit."""
    for key, announced in loaded.items():
        dtype = own[key].dtype
        if dtype == announced.dtype:
            continue
        value = read(key)
        back = value.to(dtype).to(value.dtype)
        if not torch.equal(
            *(x.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (value, back))
        ):
            return key
    return None


def tied_to(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names of each parameter and buffer that has several."""
    names: dict[int, list[str]] = {}
    for walk in (model.named_parameters, model.named_buffers):
        for name, tensor in walk(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in names.values()
        for name in group
        if len(group) > 1
    }


def _missing(model: nn.Module, keys: Iterable[str], checkpoint: Mapping[str, Tensor]) -> list[str]:
    """The keys that a checkpoint lacks, but for those that are not needed."""
    # Files from before torch 0.4.1 have no such counter, and evaluation does not look at it.
    absent = [key for key in keys if key not in checkpoint and not key.endswith("num_batches_tracked")]
    tied = tied_to(model) if absent else {}  # safetensors' writer keeps one name of a tensor that has several
    return [key for key in absent if not any(other in checkpoint for other in tied.get(key, ()))]


def _streamed(checkpoint: Mapping[str, Tensor]) -> bool:
    return isinstance(checkpoint, Checkpoint) and checkpoint.streamed


def _name(checkpoint: Mapping[str, Tensor]) -> str:
    return str(getattr(checkpoint, "path", "the checkpoint"))


def _other_shapes(own: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} ({tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model)"
        for key, value in checkpoint.items()
        if key in own and isinstance(value, Tensor) and value.shape != own[key].shape
    ]


def _mismatch(
    model: nn.Module,
    checkpoint: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    error: Exception | None,
) -> KeyMismatchError:
    parts = [
        f"{len(keys)} {what}: {', '.join(map(_short, keys[:3]))}{', ...' if len(keys) > 3 else ''}"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if keys
    ]
    if not parts and error is not None:
        parts = [one_line(error)]
    return KeyMismatchError(
        f"{_name(checkpoint)} does not fit the model: {'; '.join(parts)}; {_advice(model, checkpoint)}"
    )


def _short(key: str) -> str:
    return key if len(key) <= 160 else f"{key[:80]}... ({len(key):,} characters)"


def _advice(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> str:
    """What to do of a mismatch: a prefix to give, where the model's keys are all there beside others."""
    own = set(model.state_dict())
    counts: Counter[str] = Counter()
    for key in checkpoint:
        for dot in re.finditer(r"\.", key[:200]):
            if key[dot.end() :] in own:
                counts[key[: dot.end()]] += 1
    needed = len([key for key in own if not key.endswith("num_batches_tracked")])
    found = [prefix for prefix, count in counts.items() if count >= needed]
    if not found or len(checkpoint) == len(own):
        return "is --model the right one?"
    return f"the model's keys are all there under {' and '.join(found[:4])}: add --prefix {found[0]}"
