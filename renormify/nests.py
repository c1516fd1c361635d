"""Where in a checkpoint the state dict is: under which of its keys, and under which prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from renormify.errors import CheckpointError
from renormify.sources import nearest

__all__ = ["describe", "find_state_dict"]

# Where people put the state dict in what they save, in the order in which it is looked for.
_NESTS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "params_ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
)
_AVERAGES = tuple(name for name in _NESTS if "ema" in name)
_DEEPEST = 8


def find_state_dict(loaded: Any, key: str | None = None) -> tuple[Mapping[str, Any], tuple[str, ...]] | None:
    """The state dict in what a file held, and what to say of the choice; None where there is none.

    Args:
        loaded: what the file held. A module in it, which only a trusted file has, gives its state dict.
        key: where to look, dotted where nested; without it, the names that people use are tried.

    Raises:
        CheckpointError: nothing of a state dict is under ``key``.
    """
    if key is None:
        return _search(loaded, 0)
    found = loaded
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            known = [name for name in found if isinstance(name, str)] if isinstance(found, Mapping) else []
            raise CheckpointError(
                f"--key {key!r}: there is no {part!r}{nearest(part, known)}; it holds {describe(found)}"
            )
        found = found[part]
    if (tensors := _state_dict(found)) is None:
        raise CheckpointError(f"--key {key!r}: there is no state dict, but {describe(found)}")
    return tensors, ()


def describe(loaded: Any) -> str:
    """What a file held, for the end of a message."""
    if isinstance(loaded, Tensor):
        return "a single tensor"
    if isinstance(loaded, Mapping):
        if any(isinstance(value, Tensor) for value in loaded.values()) and (odd := _odd_ones(loaded)):
            return f"beside tensors {_shown(odd[0])}, of type {type(loaded[odd[0]]).__name__}"
        keys = ", ".join(map(_shown, list(loaded)[:5]))
        parts = [key for key, value in loaded.items() if _search(value, 0) and _shown(key) == repr(key)]
        several = f"; state dicts are under {', '.join(parts[:5])}: add --key {parts[0]}" if parts else ""
        return f"the keys {keys}{several}" if keys else "an empty mapping"
    return f"an object of type {type(loaded).__name__}"


def _shown(key: Any) -> str:
    # One that is no text may be nested too deeply to be shown.
    return repr(key[:40]) if isinstance(key, str) else type(key).__name__


def _odd_ones(loaded: Mapping[Any, Any]) -> list[Any]:
    """The keys of what is in no state dict."""
    return [
        key
        for key, value in loaded.items()
        if not isinstance(key, str) or not (isinstance(value, Tensor) or key.endswith("_extra_state"))
    ]


def _search(loaded: Any, depth: int) -> tuple[Mapping[str, Any], tuple[str, ...]] | None:
    if (tensors := _state_dict(loaded)) is not None:
        return tensors, ()
    if not isinstance(loaded, Mapping) or depth > _DEEPEST:
        return None
    for name in _NESTS:
        nested = loaded.get(name)
        if nested is not None and (found := _search(nested, depth + 1)) is not None:
            return found[0], (*_choice(loaded, name), *found[1])
    maps = [value for value in loaded.values() if isinstance(value, Mapping) and value]
    return _search(maps[0], depth + 1) if len(maps) == 1 else None


def _state_dict(loaded: Any) -> Mapping[str, Any] | None:
    if isinstance(loaded, nn.Module):
        return loaded.state_dict()
    if not isinstance(loaded, Mapping):
        return None
    tensors = any(isinstance(value, Tensor) for value in loaded.values())
    return loaded if tensors and not _odd_ones(loaded) else None


def _choice(loaded: Mapping[Any, Any], chosen: str) -> tuple[str, ...]:
    others = [
        name for name in _AVERAGES if name != chosen and isinstance(loaded.get(name), (Mapping, nn.Module))
    ]
    if not others:
        return ()
    return (f"took the weights under {chosen!r}; the file has others too: --key {' or --key '.join(others)}",)
