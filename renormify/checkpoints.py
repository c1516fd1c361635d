"""Reading checkpoints without running what is in them, and writing checkpoints that explain themselves."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from renormify import sources
from renormify.errors import CheckpointError, KeyMismatchError, OutputError, one_line
from renormify.formats import OUR_KEY, SAFETENSORS, TORCH, read_safetensors, read_torch, recognise
from renormify.outputs import check_output, staged

__all__ = [
    "Checkpoint",
    "check_checkpoint_output",
    "fit_keys",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "save_checkpoint",
]

# Where people put the state dict in what they save, in the order in which it is looked for.
_NESTS = ("state_dict", "model_state_dict", "model")
_PREFIX = "module."  # of DataParallel and DistributedDataParallel
_SUFFIXES = {".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH}


class Checkpoint(dict[str, Tensor]):
    """The tensors of a checkpoint by their keys, with what the file says of itself.

    Args:
        tensors: the state dict.
        path: the file that it came from.
        metadata: what :func:`save_checkpoint` wrote beside the tensors; empty for a file of another origin.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, path: Path, metadata: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(tensors)
        self.path = path
        self.metadata: dict[str, Any] = dict(metadata or {})
        # torch's own record of each module's version, by which load_state_dict() knows old checkpoints.
        self._metadata: Any = getattr(tensors, "_metadata", None)

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors under other names, and so the record of each module's version."""
        tensors = OrderedDict((rename(key), value) for key, value in self.items())
        if self._metadata is not None:
            # A module's name is a prefix of its keys, but for the dot.
            tensors._metadata = {  # type: ignore[attr-defined]
                rename(f"{name}." if name else "").removesuffix("."): version
                for name, version in self._metadata.items()
            }
        return Checkpoint(tensors, path=self.path, metadata=self.metadata)


def load_model(source: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Builds the model that a source names and loads a checkpoint into it, strictly.

    Args:
        source: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
        weights: a checkpoint file; without it the model keeps the fresh weights that it was built with.

    Raises:
        ModelSourceError: the source names nothing, or its factory fails.
        CheckpointError: the file cannot be read, or does not fit.
        MissingExtraError: torchvision or timm is not installed.
    """
    # The file first: reading it takes less time than building a model, and is as likely to fail.
    checkpoint = None if weights is None else load_checkpoint(weights)
    model = sources.build_model(source)
    return model if checkpoint is None else load_weights(model, checkpoint)


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
    single = _floating(own) == {torch.float32}
    if single and _floating(loaded) == {torch.float64} and _not_held(own, loaded) is not None:
        model.double()
        own = _tensors(model.state_dict())
    if (key := _not_held(own, loaded)) is not None:
        theirs, ours = (str(tensors[key].dtype).removeprefix("torch.") for tensors in (loaded, own))
        raise KeyMismatchError(
            f"{_name(checkpoint)} does not fit the model: {key} is {theirs} in the file and {ours} in the "
            f"model, which would change its values; build the model in {theirs}, or cast the file's tensors "
            f"to {ours} where that is meant"
        )
    try:
        result = model.load_state_dict(checkpoint, strict=False)
    except Exception as error:  # RuntimeError from torch, and anything from a model's own hooks
        missing = [key for key in own if key not in checkpoint]
        unexpected = [key for key in checkpoint if key not in own]
        raise _mismatch(checkpoint, missing, unexpected, _other_shapes(own, checkpoint), error) from error
    # Files from before torch 0.4.1 have no such counter, and evaluation does not look at it.
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        raise _mismatch(checkpoint, missing, result.unexpected_keys, [], None)
    return model


def fit_keys(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The checkpoint with the prefix ``module.`` taken off or put on where that makes more keys the model's.

    DataParallel and DistributedDataParallel put it on; but a model may also have a part of that name. A plain
    mapping comes back as it is.
    """
    if not isinstance(checkpoint, Checkpoint):
        return checkpoint
    known = model.state_dict().keys()
    candidates = [checkpoint, checkpoint.renamed(lambda key: _PREFIX + key)]
    if all(key.startswith(_PREFIX) for key in checkpoint):
        candidates.append(checkpoint.renamed(lambda key: key.removeprefix(_PREFIX)))
    return max(candidates, key=lambda candidate: len(candidate.keys() & known))  # the first of equals


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the state dict in a safetensors file or in one that ``torch.save`` wrote.

    What kind of file it is, its content tells and not its suffix. Nothing in it is ever executed. A state
    dict nested under ``state_dict``, ``model_state_dict`` or ``model`` is found. Its keys are as they are
    stored: whether a prefix ``module.`` belongs to them, :func:`load_weights` can tell by the model. Tensors
    are mapped into memory where the format allows it.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict.
        UnsafeCheckpointError: loading it would run code.
    """
    path = Path(path)
    return _read_safetensors(path) if recognise(path) == SAFETENSORS else _read_torch(path)


def save_checkpoint(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Writes a state dict: all of it or, upon any failure or interrupt, nothing.

    Args:
        path: ending in ``.safetensors``, ``.pt`` or ``.pth``, which decides the format.
        state_dict: tensors by their keys; shared and non-contiguous tensors are fine, none is changed.
        metadata: what the file shall say of itself, as JSON knows it. It goes into the header of a
            safetensors file under the key ``renormify``, and beside ``state_dict`` in the others.
        force: whether an existing file may be replaced.
        inputs: files that must not be replaced, not even with ``force``.

    Raises:
        OutputError: the path cannot be written, or its suffix is unknown.
    """
    path = Path(path)
    kind = check_checkpoint_output(path, force=force, inputs=inputs)
    document = json.dumps(metadata or {}, allow_nan=False)
    with staged(path, force=force, inputs=[Path(source) for source in inputs]) as target:
        try:
            if kind == SAFETENSORS:
                from safetensors.torch import save_file

                header = {"format": "pt"} | ({OUR_KEY: document} if metadata else {})
                save_file(_unshared(state_dict, path), target, metadata=header)
            else:
                torch.save(
                    {"state_dict": state_dict} | ({OUR_KEY: json.loads(document)} if metadata else {}),
                    target,
                )
        except OSError:
            raise
        except Exception as error:  # safetensors and torch have their own names for a full disk
            raise OutputError(f"cannot write {path}: {one_line(error)}") from error
    return path


def check_checkpoint_output(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> str:
    """Says before any work whether a checkpoint can be written there, and in which format.

    Raises:
        OutputError: see :func:`renormify.outputs.check_output`; also for an unknown suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(
            f"cannot write {path}: the suffix {path.suffix!r} names no format; "
            f"expected {', '.join(_SUFFIXES)}"
        )
    check_output(path, force=force, inputs=[Path(source) for source in inputs])
    return _SUFFIXES[path.suffix.lower()]


def _read_safetensors(path: Path) -> Checkpoint:
    tensors, ours = read_safetensors(path)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Checkpoint(tensors, path=path, metadata=ours if isinstance(ours, dict) else {})


def _read_torch(path: Path) -> Checkpoint:
    loaded = read_torch(path)
    tensors = _find_state_dict(loaded)
    if tensors is None:
        raise CheckpointError(f"{path} holds no state dict: {_contents(loaded)}")
    ours = loaded.get(OUR_KEY) if isinstance(loaded, Mapping) else None
    return Checkpoint(tensors, path=path, metadata=ours if isinstance(ours, dict) else {})


def _find_state_dict(loaded: Any) -> Mapping[str, Tensor] | None:
    if not isinstance(loaded, Mapping):
        return None
    for key in _NESTS:
        if isinstance(nested := loaded.get(key), Mapping):
            return _find_state_dict(nested)
    named = all(isinstance(key, str) for key in loaded)
    tensors = sum(isinstance(value, Tensor) for value in loaded.values())
    extra = sum(str(key).endswith("_extra_state") for key in loaded)
    return loaded if named and tensors and tensors + extra >= len(loaded) else None


def _contents(loaded: Any) -> str:
    if isinstance(loaded, Tensor):
        return "it is a single tensor"
    if isinstance(loaded, Mapping):
        keys = ", ".join(repr(key)[:40] for key in list(loaded)[:5])
        return f"its keys are {keys}" if keys else "it is an empty mapping"
    return f"it is of type {type(loaded).__name__}"


def _unshared(state_dict: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, and no two in one storage."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise OutputError(
                f"cannot write {path}: safetensors cannot hold {key!r}, which is no tensor; use .pt"
            )
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


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


def _not_held(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str | None:
    """The first key whose values the model's dtype cannot hold to the bit."""
    for key, value in loaded.items():
        dtype = own[key].dtype
        if dtype == value.dtype:
            continue
        if dtype.is_floating_point and not value.is_floating_point():
            return key  # integers as weights are quantised, and complex numbers would lose a part
        back = value.to(dtype).to(value.dtype)
        if not torch.equal(
            *(x.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (value, back))
        ):
            return key
    return None


def _name(checkpoint: Mapping[str, Tensor]) -> str:
    return str(getattr(checkpoint, "path", "the checkpoint"))


def _other_shapes(own: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} ({tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model)"
        for key, value in checkpoint.items()
        if key in own and isinstance(value, Tensor) and value.shape != own[key].shape
    ]


def _mismatch(
    checkpoint: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    error: Exception | None,
) -> KeyMismatchError:
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    parts = [
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if keys
    ]
    if not parts and error is not None:
        parts = [one_line(error)]
    return KeyMismatchError(
        f"{_name(checkpoint)} does not fit the model: {'; '.join(parts)}; is --model the right one?"
    )
