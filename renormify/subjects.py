"""The model that a command is about: which one, with which weights, on what input."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from renormify import __version__, sources
from renormify.checkpoints import Checkpoint, check_weights, fit_keys, load_checkpoint, load_weights
from renormify.errors import CheckpointError, InputError
from renormify.exported import load_program
from renormify.formats import PROGRAM, locate, recognise
from renormify.proof import example_inputs
from renormify.writers import Progress, silent

__all__ = [
    "Request",
    "Shapes",
    "Subject",
    "available_memory",
    "load_subject",
    "names_program",
    "read_checkpoint",
]

Shapes = tuple[tuple[int, ...], ...]
_MOST_VALUES = 2**26  # of an input whose shape a file says; more is for the user to ask for


@dataclasses.dataclass(frozen=True)
class Request:
    """Which model is meant.

    Args:
        checkpoint: the file with its weights, or None for fresh ones.
        source: the model source, or None for the one that the checkpoint names.
        shapes: of its inputs, or None for what the checkpoint or the source say.
        progress: is told each step that may take a while.
        kwargs: keyword arguments of the source, or None for those that the checkpoint names.
        key: where in the file the state dict is, or None to look for it.
        prefix: take only the keys that begin with this.
        trust_pickle: whether code in the file may run.
    """

    checkpoint: Path | None = None
    source: str | None = None
    shapes: Shapes | None = None
    progress: Progress = silent
    kwargs: Mapping[str, Any] | None = None
    key: str | None = None
    prefix: str = ""
    trust_pickle: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that this request reads, as far as that is known beforehand."""
        return () if self.checkpoint is None else (self.checkpoint,)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its weights.

    Args:
        model: the module; on the meta device where only its structure is asked for.
        source: where it came from, as text.
        checkpoint: its weights under the model's own keys, as stored.
        weights: the file that was given.
        shapes: of its inputs.
        recorded: what of the source a file must say so that the model can be built again.
        example: the input that a program was exported with.
        program: the program, where the model is one.
    """

    model: nn.Module
    source: str
    checkpoint: Checkpoint | None
    weights: Path | None
    shapes: Shapes | None
    recorded: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    program: ExportedProgram | None = None

    def args(self) -> tuple[Tensor, ...]:
        """Random inputs of those shapes, in the model's dtype; of a program, its example.

        Raises:
            InputError: no shape is known.
        """
        if self.example is not None:
            return self.example[0]
        if self.shapes is None:
            raise InputError(
                f"{self.source} does not tell its input's shape: give it, as --input-shape 1,3,224,224"
            )
        floating = (p.dtype for p in self.model.parameters() if p.dtype.is_floating_point)
        return example_inputs(self.shapes, dtype=next(floating, torch.float32))

    def document(self, command: str) -> dict[str, Any]:
        """What every command's document begins with."""
        notes = () if self.checkpoint is None else self.checkpoint.notes
        return {
            "command": command,
            "renormify": __version__,
            "model": self.source,
            **self.recorded,
            "weights": None if self.weights is None else str(self.weights),
            "input_shape": self.shapes,
            **({"notes": list(notes)} if notes else {}),
        }

    def inputs(self, request: Request) -> tuple[Path, ...]:
        """Every file that was read."""
        return request.inputs if self.checkpoint is None else (*request.inputs, *self.checkpoint.files)


def read_checkpoint(request: Request, *, stream: bool = True) -> Checkpoint | None:
    """Reads the request's checkpoint, or the one in the folder that its source names."""
    path = request.checkpoint
    if path is None and request.source is not None:
        path = _beside_configuration(request.source)
    if path is None:
        return None
    request.progress(f"Reading {path}")
    return load_checkpoint(
        path, key=request.key, prefix=request.prefix, trust_pickle=request.trust_pickle, stream=stream
    )


def load_subject(
    request: Request, checkpoint: Checkpoint | None = None, *, structure_only: bool = False
) -> Subject:
    """Builds the model that is meant and loads its weights.

    Args:
        request: what is asked for.
        checkpoint: the request's, where it is read already.
        structure_only: build on the meta device, without memory for weights, and check only that the
            checkpoint's keys and shapes are the model's. A source that cannot be built so is built as ever.

    Raises:
        RenormifyError: what is given names no model, or does not fit.
    """
    if names_program(request):
        assert request.checkpoint is not None
        return _load_program(request, request.checkpoint)
    if checkpoint is None:
        checkpoint = read_checkpoint(request)
    metadata = {} if checkpoint is None else checkpoint.metadata
    source = _source(request, checkpoint)
    kwargs, config = _recorded_arguments(request, source, metadata)
    request.progress(f"Building {source}")
    if request.source is None and checkpoint is not None and (kwargs or config):
        # What a file says of a model must be what it holds, before memory is given to it.
        structure, stored = _fitted(_build_without_memory(source, kwargs, config), checkpoint)
        check_weights(structure, stored)
        _check_stored(stored)
    if structure_only:
        model = _build_without_memory(source, kwargs, config)
    else:
        model = sources.build_model(source, kwargs, config)
    fitted = None
    if checkpoint is not None:
        _, fitted = _fitted(model, checkpoint)
        if structure_only:
            check_weights(model, fitted)
        else:
            load_weights(model, fitted)
            fitted = fitted.without_values()
    shapes = request.shapes or _recorded_shapes(metadata) or sources.input_shapes(source, model)
    config = sources.configuration_of(model)
    recorded = ({"kwargs": dict(kwargs)} if kwargs else {}) | ({"config": config} if config else {})
    return Subject(model, source, fitted, request.checkpoint, shapes, recorded)


def names_program(request: Request) -> bool:
    """Whether the model that is meant is the program in the file."""
    if request.checkpoint is None or request.source is not None:
        return False
    return recognise(locate(request.checkpoint)) == PROGRAM


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return None


def _check_stored(checkpoint: Checkpoint) -> None:
    # A tensor may be one number that is repeated without end: its shape says nothing of the file's size.
    for key, value in checkpoint.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            continue
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{checkpoint.path} names its model itself, but holds fewer values of {key[:80]!r} than its "
                f"shape {tuple(value.shape)} has: where you trust it, add --model"
            )


def _fitted(model: nn.Module, checkpoint: Checkpoint) -> tuple[nn.Module, Checkpoint]:
    fitted = fit_keys(model, checkpoint)
    assert isinstance(fitted, Checkpoint)
    return model, fitted


def _build_without_memory(source: str, kwargs: Mapping[str, Any], config: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return sources.build_model(source, kwargs, config)
    except InputError:  # one that computes with its own weights while it is built
        return sources.build_model(source, kwargs, config)


def _load_program(request: Request, path: Path) -> Subject:
    request.progress(f"Reading {path}")
    program = load_program(path, trust_pickle=request.trust_pickle)
    module = program.module(check_guards=False)
    example = program.example_inputs
    if example is None:
        raise CheckpointError(f"{path} holds no example input, without which nothing can be proven of it")
    shapes = tuple(tuple(value.shape) for value in example[0] if isinstance(value, Tensor))
    return Subject(module, f"program:{path.name}", None, path, shapes, {}, example, program)


def _beside_configuration(source: str) -> Path | None:
    folder = sources.folder_of(source)
    if folder is None or not folder.is_dir():  # building the model says so
        return None
    try:
        return locate(folder)
    except CheckpointError:  # a configuration alone
        return None


def _source(request: Request, checkpoint: Checkpoint | None) -> str:
    if request.source is not None:
        return request.source
    recorded = None if checkpoint is None else checkpoint.metadata.get("model")
    if checkpoint is None or not isinstance(recorded, str) or len(recorded) > 1000:
        raise InputError(
            "which model? Give --model torchvision:NAME, timm:NAME, transformers:DIR or "
            "package.module:factory"
            + (f"; {checkpoint.path} does not name its own" if checkpoint is not None else "")
        )
    if sources.names_code(recorded):
        # A file may come from anyone. What it names is run only when the user says so.
        raise InputError(
            f"{checkpoint.path} names the model {recorded!r}, which is code that a file may not start: "
            f"where you trust it, add --model {recorded}"
        )
    if sources.folder_of(recorded) is not None and not isinstance(checkpoint.metadata.get("config"), dict):
        raise InputError(
            f"{checkpoint.path} names the folder of its model, not its configuration: add --model {recorded}"
        )
    return recorded


def _recorded_arguments(
    request: Request, source: str, metadata: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The keywords and the configuration to build with: the user's, or what the file says."""
    same = request.source is None or metadata.get("model") == request.source
    kwargs = metadata.get("kwargs") if same and request.kwargs is None else request.kwargs
    # Of a folder that the user names, the configuration there counts; a file's stands for one that is away.
    config = metadata.get("config") if request.source is None else None
    return kwargs if isinstance(kwargs, Mapping) else {}, config if isinstance(config, Mapping) else None


def _recorded_shapes(metadata: Mapping[str, Any]) -> Shapes | None:
    recorded = metadata.get("input_shape")
    if not isinstance(recorded, list) or not 0 < len(recorded) <= 64:
        return None
    sound = all(
        isinstance(shape, list)
        and 0 < len(shape) <= 16
        and all(type(length) is int and length > 0 for length in shape)
        for shape in recorded
    )
    if not sound:
        return None
    if sum(map(math.prod, recorded)) > _MOST_VALUES:
        raise InputError(
            f"the file names an input of shape {', '.join(map(str, recorded))[:200]}, which is very large: "
            "where you mean it, give it by --input-shape"
        )
    return tuple(tuple(shape) for shape in recorded)
