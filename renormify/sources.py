"""Where a model comes from: a zoo's name, a folder of transformers, or a function ``package.module:factory``.

Nothing is ever downloaded: the zoos give the architecture, a checkpoint gives the weights.
"""

from __future__ import annotations

import difflib
import functools
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

from renormify.configurations import build_configured, configuration_of, configured_shape
from renormify.errors import MissingExtraError, ModelSourceError, one_line

__all__ = ["build_model", "configuration_of", "folder_of", "input_shapes", "names_code", "nearest"]

_GRAMMAR = "torchvision:NAME, timm:NAME, transformers:DIR or package.module:factory"
# What a zoo would fetch, or read from anywhere; a file may carry keywords, and must not choose that.
_FETCHING = frozenset(
    {"cache_dir", "checkpoint_path", "hub_id", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
    | {"pretrained_backbone", "trust_remote_code", "use_pretrained_backbone", "weights", "weights_backbone"}
)
_FARTHEST = 100  # characters of a name that is worth comparing with others


def build_model(
    source: str, kwargs: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None
) -> nn.Module:
    """Builds the model that a source names, with fresh weights.

    A factory runs with the current directory importable, as under ``python -m``.

    Args:
        source: ``torchvision:NAME``, ``timm:NAME``, ``transformers:DIR`` (with a ``config.json``) or
            ``package.module:factory``; the factory may be a dotted path (``module:Class.method``) and returns
            an ``nn.Module``.
        kwargs: keyword arguments of the zoo's builder or the factory; settings of a configuration to change.
        config: a configuration of transformers that was recorded, taken instead of the folder's.

    Raises:
        ModelSourceError: the source names nothing, or its factory fails or returns something else.
        MissingExtraError: torchvision, timm or transformers is not installed.
    """
    kwargs = dict(kwargs or {})
    kind, colon, name = source.strip().partition(":")
    if not colon or not kind or not name:
        raise ModelSourceError(f"{source!r} is not a model source; expected {_GRAMMAR}{_hint(source)}")
    if kind not in _BUILDERS:
        return _from_factory(kind, name, kwargs)
    if fetching := sorted(_FETCHING & kwargs.keys()):
        raise ModelSourceError(
            f"--kwargs: {fetching[0]!r} is not for here: the model is built without weights, and a "
            "checkpoint brings them"
        )
    if kind == "transformers":
        with _silence():
            return build_configured(name, kwargs, config)
    return _BUILDERS[kind](name, kwargs)


def input_shapes(source: str, model: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of one example's inputs, with a batch of 1, as far as source or model tell them.

    torchvision tells through the transforms of its weights, timm through the model's own configuration. None
    where neither does.
    """
    kind, _, name = source.partition(":")
    shape = _torchvision_shape(name) if kind == "torchvision" else configured_shape(model)
    return None if shape is None else (shape,)


def names_code(source: str) -> bool:
    """Whether building this source runs code of the user's, rather than a zoo's."""
    return source.partition(":")[0] not in _BUILDERS


def folder_of(source: str) -> Path | None:
    """The folder that a source names, which may hold the weights too."""
    kind, _, name = source.partition(":")
    return Path(name) if kind == "transformers" else None


def nearest(name: str, names: Iterable[str], *, files: bool = False) -> str:
    """The end of an error message: ``"; did you mean a, b?"``, or nothing where nothing is near.

    Args:
        name: what was given.
        names: what there is.
        files: whether they name files; a suffix that two have in common then makes them no nearer.
    """
    if len(name) > _FARTHEST:
        return ""

    def key(known: str) -> str:
        return (Path(known).stem if files else known).lower()

    by_key: dict[str, list[str]] = {}
    for known in names:
        by_key.setdefault(key(known), []).append(known)
    matches = difflib.get_close_matches(key(name), by_key, n=3, cutoff=0.6)
    closest = functools.partial(sorted, key=lambda known: -difflib.SequenceMatcher(None, known, name).ratio())
    near = [known for match in matches for known in closest(by_key[match])][:3]
    return f"; did you mean {', '.join(near)}?" if near else ""


def _from_torchvision(name: str, given: Mapping[str, Any]) -> nn.Module:
    models = _zoo("torchvision", "torchvision.models")
    if name not in models.list_models():
        near = nearest(name, models.list_models())
        raise ModelSourceError(f"torchvision has no model {name[:_FARTHEST]!r}{near}")
    builder = models.get_model_builder(name)
    # Detection and segmentation models would otherwise fetch the weights of their backbone.
    kwargs = {"weights": None} | (
        {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    )
    return _checked(builder, kwargs | dict(given), f"torchvision:{name}")


def _from_timm(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    timm = _zoo("timm", "timm")
    # is_model() is asked first, so that create_model() never sees a name that it would look up on the hub.
    if "/" in name or ":" in name or not timm.is_model(name):
        raise ModelSourceError(f"timm has no model {name[:_FARTHEST]!r}{nearest(name, timm.list_models())}")
    given = {"pretrained": False} | dict(kwargs)
    return _checked(functools.partial(timm.create_model, name), given, f"timm:{name}")


_BUILDERS: dict[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": build_configured,
}


def _zoo(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, "zoo", f"for --model {package}:NAME") from error


def _from_factory(module_name: str, path: str, kwargs: Mapping[str, Any]) -> nn.Module:
    source = f"{module_name}:{path}"
    with _current_directory():
        module = _import(module_name, source)
        return _checked(_resolve(module, path, source), kwargs, source)


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


def _resolve(module: ModuleType, path: str, source: str) -> Callable[..., Any]:
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
    factory: Callable[..., Any] = found
    return factory


def _checked(factory: Callable[..., Any], kwargs: Mapping[str, Any], source: str) -> nn.Module:
    try:
        with _silence():
            model = factory(**kwargs)
    except (Exception, SystemExit) as error:
        raise ModelSourceError(
            f"--model {source}: the factory failed with {one_line(error)}{_unknown_keyword(factory, kwargs)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"--model {source}: the factory returned {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


def _unknown_keyword(factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> str:
    try:
        names = list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return ""
    return next((near for key in kwargs if key not in names and (near := nearest(key, names))), "")


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


@contextmanager
def _silence() -> Iterator[None]:
    # What a zoo or a user's factory warns of while it builds is no business of this conversion.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _hint(source: str) -> str:
    return f"; perhaps torchvision:{source} or timm:{source}" if source.isidentifier() else ""
