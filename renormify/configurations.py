"""Models of transformers, from the ``config.json`` beside their weights or from a recorded copy of it.

Nothing is fetched, and no code in the folder is run: a configuration chooses among the classes that the
installed package has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from renormify.errors import MissingExtraError, ModelSourceError, one_line

__all__ = ["build_configured", "configuration_of", "configured_shape"]

_LARGEST = 2**22  # bytes of a config.json


def build_configured(
    folder: str, overrides: Mapping[str, Any], recorded: Mapping[str, Any] | None = None
) -> nn.Module:
    """Builds the model of a folder's ``config.json``, with fresh weights.

    Args:
        folder: with ``config.json`` in it; not looked at where ``recorded`` is given.
        overrides: settings of the configuration to change.
        recorded: the configuration itself, as :func:`configuration_of` gave it.

    Raises:
        ModelSourceError: the folder has none, or it names a class that transformers does not have.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", "for --model transformers:DIR") from error
    source = f"--model transformers:{folder}"
    settings = dict(_read(Path(folder), source) if recorded is None else recorded)
    names = settings.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else None
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ModelSourceError(
            f"{source}: transformers {transformers.__version__} has no model of type {str(kind)[:80]!r}; "
            "code beside a configuration is not run: give a function of yours, --model package.module:factory"
        )
    try:
        # Never weights of a backbone from elsewhere: the checkpoint has them all.
        config = transformers.CONFIG_MAPPING[kind].from_dict(settings | {"use_pretrained_backbone": False})
        unknown = [key for key in overrides if not hasattr(config, key)]
        if unknown:
            raise ModelSourceError(f"{source}: {kind} has no setting {unknown[0][:80]!r} to give by --kwargs")
        for key, value in overrides.items():
            setattr(config, key, value)
        with _offline():
            model = _class(transformers, name, source)(config)
    except ModelSourceError:
        raise
    except Exception as error:
        raise ModelSourceError(f"{source}: building the model failed with {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelSourceError(f"{source}: {name} is not a model")
    return model


def configuration_of(model: nn.Module) -> dict[str, Any] | None:
    """The configuration that a model of transformers was built from, as JSON knows it."""
    config = getattr(model, "config", None)
    if config is None or not type(config).__module__.startswith("transformers."):
        return None
    settings: dict[str, Any] = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return settings | {"architectures": [type(model).__name__], "model_type": config.model_type}


def configured_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one image, as a configuration of transformers or timm tells it."""
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if size is None and channels is not None and type(config).__module__.startswith("transformers."):
        size = 224  # a network of convolutions takes any size, and its configuration names none
    if size is not None:
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        return (1, int(channels or 3), *map(int, sides))
    for attribute in ("pretrained_cfg", "default_cfg"):
        settings = getattr(model, attribute, None)
        size = settings.get("input_size") if isinstance(settings, Mapping) else None
        if size:
            return (1, *(int(length) for length in size))
    return None


@contextmanager
def _offline() -> Iterator[None]:
    # Some classes look a backbone up on the hub while they are built, by a name in the configuration.
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _read(folder: Path, source: str) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        if file.stat().st_size > _LARGEST:
            raise ModelSourceError(f"{source}: {file} is too large for a configuration")
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelSourceError(
            f"{source}: cannot read {file} ({error.strerror or error}); expected a folder with the "
            "config.json of a model, as save_pretrained() writes it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelSourceError(f"{source}: {file} is no JSON: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ModelSourceError(f"{source}: {file} is not a configuration")
    return settings


def _class(transformers: Any, name: Any, source: str) -> Any:
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ModelSourceError(
            f"{source}: transformers {transformers.__version__} has no model class {str(name)[:80]!r}"
        )
    return found
