"""Where a model comes from: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.

Nothing is ever downloaded: the zoos give the architecture, a checkpoint gives the weights.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from renormify.errors import MissingExtraError, ModelSourceError, one_line

__all__ = ["build_model", "input_shapes", "names_code", "nearest"]

_GRAMMAR = "torchvision:NAME, timm:NAME or package.module:factory"


def build_model(source: str) -> nn.Module:
    """Builds the model that a source names, with fresh weights.

    A factory runs with the current directory importable, as under ``python -m``.

    Args:
        source: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``; the factory may be a dotted
            path (``module:Class.method``), takes no arguments and returns an ``nn.Module``.

    Raises:
        ModelSourceError: the source names nothing, or its factory fails or returns something else.
        MissingExtraError: torchvision or timm is not installed.
    """
    kind, colon, name = source.strip().partition(":")
    if not colon or not kind or not name:
        raise ModelSourceError(f"{source!r} is not a model source; expected {_GRAMMAR}{_hint(source)}")
    return _BUILDERS[kind](name) if kind in _BUILDERS else _from_factory(kind, name)


def input_shapes(source: str, model: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of one example's inputs, with a batch of 1, as far as source or model tell them.

    torchvision tells through the transforms of its weights, timm through the model's own configuration. None
    where neither does.
    """
    kind, _, name = source.partition(":")
    shape = _torchvision_shape(name) if kind == "torchvision" else _configured_shape(model)
    return None if shape is None else (shape,)


def names_code(source: str) -> bool:
    """Whether building this source runs code of the user's, rather than a zoo's."""
    return source.partition(":")[0] not in _BUILDERS


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: ``"; did you mean a, b?"``, or nothing where nothing is near."""
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(by_lower[key] for key in near)}?" if near else ""


def _from_torchvision(name: str) -> nn.Module:
    models = _zoo("torchvision", "torchvision.models")
    if name not in models.list_models():
        raise ModelSourceError(f"torchvision has no model {name!r}{nearest(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # Detection and segmentation models would otherwise fetch the weights of their backbone.
    kwargs = {"weights": None} | (
        {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    )
    return _checked(lambda: builder(**kwargs), f"torchvision:{name}")


def _from_timm(name: str) -> nn.Module:
    timm = _zoo("timm", "timm")
    # is_model() is asked first, so that create_model() never sees a name that it would look up on the hub.
    if "/" in name or ":" in name or not timm.is_model(name):
        raise ModelSourceError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    return _checked(lambda: timm.create_model(name, pretrained=False), f"timm:{name}")


def _from_transformers(name: str) -> nn.Module:
    raise ModelSourceError(
        f"transformers:{name}: models of transformers are not supported yet; write a function that builds "
        "the model and give it as --model package.module:factory"
    )


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
}


def _zoo(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, "zoo", f"for --model {package}:NAME") from error


def _from_factory(module_name: str, path: str) -> nn.Module:
    source = f"{module_name}:{path}"
    with _current_directory():
        module = _import(module_name, source)
        return _checked(_resolve(module, path, source), source)


def _import(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            # The module is there; something that it imports is not.
            raise ModelSourceError(
                f"--model {source}: importing {name} failed: no module {missing!r}"
            ) from error
        here = {file.stem for file in Path.cwd().glob("*.py")}
        near = nearest(name, here | set(_BUILDERS))
        raise ModelSourceError(
            f"--model {source}: no module {missing!r}{near or f'; expected {_GRAMMAR}'}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ModelSourceError(f"--model {source}: importing {name} failed: {one_line(error)}") from error


def _resolve(module: ModuleType, path: str, source: str) -> Callable[[], Any]:
    found: Any = module
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            where = getattr(found, "__name__", module.__name__)
            raise ModelSourceError(
                f"--model {source}: {where} has no {attribute!r}{nearest(attribute, dir(found))}"
            ) from error
    if isinstance(found, nn.Module):  # a model made at import; calling it would run its forward
        return lambda: found
    if not callable(found):
        raise ModelSourceError(
            f"--model {source}: {path} is of type {type(found).__name__}; "
            "expected a function that returns a model"
        )
    factory: Callable[[], Any] = found
    return factory


def _checked(factory: Callable[[], Any], source: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # What a zoo or a user's factory warns of while it builds is no business of this conversion.
            warnings.simplefilter("ignore")
            model = factory()
    except (Exception, SystemExit) as error:
        raise ModelSourceError(f"--model {source}: the factory failed with {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"--model {source}: the factory returned {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


@contextmanager
def _current_directory() -> Iterator[None]:
    # In front while the factory runs, so that the user's own models.py is found; behind everything
    # afterwards, where a late import of the model still finds it and it can shadow nothing. And current again
    # afterwards, wherever the user's code went: what was given by relative paths is meant from here.
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        os.chdir(here)
        if here in sys.path:  # the user's code may have taken it out itself
            sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _torchvision_shape(name: str) -> tuple[int, ...] | None:
    from torchvision.models import get_model_weights

    try:
        default = next(iter(get_model_weights(name)))
    except (ValueError, StopIteration):
        return None
    transforms = default.transforms()
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if not size:
        return None
    if len(size) == 1:
        return (1, 3, size[0], size[0])
    # Two sizes are a video's; 16 frames is what most of torchvision's were trained on.
    return (1, 3, max(16, default.meta.get("min_temporal_size", 16)), size[0], size[1])


def _configured_shape(model: nn.Module) -> tuple[int, ...] | None:
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        if size:
            return (1, *(int(length) for length in size))
    return None


def _hint(source: str) -> str:
    return f"; perhaps torchvision:{source} or timm:{source}" if source.isidentifier() else ""
