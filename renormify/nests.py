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
        # A key that is no text may be nested too deeply to be shown.
        keys = ", ".join(
            repr(key[:40]) if isinstance(key, str) else type(key).__name__ for key in list(loaded)[:5]
        )
        return f"the keys {keys}" if keys else "an empty mapping"
    return f"an object of type {type(loaded).__name__}"


def _search(loaded: Any, depth: int) -> tuple[Mapping[str, Any], tuple[str, ...]] | None:
    if (tensors := _state_dict(loaded)) is not None:
        return tensors, ()
    if not isinstance(loaded, Mapping) or depth > _DEEPEST:
        return None
    for name in _NESTS:
        nested = loaded.get(name)
        if nested is not None and (found := _search(nested, depth + 1)) is not None:
            return found[0], (*_choice(loaded, name), *found[1])
    maps = [value for value in loaded.values() if isinstance(value, Mapping)]
    return _search(maps[0], depth + 1) if len(maps) == 1 else None


def _state_dict(loaded: Any) -> Mapping[str, Any] | None:
    if isinstance(loaded, nn.Module):
        return loaded.state_dict()
    if not isinstance(loaded, Mapping):
        return None
    named = all(isinstance(key, str) for key in loaded)
    tensors = sum(isinstance(value, Tensor) for value in loaded.values())
    extra = sum(str(key).endswith("_extra_state") for key in loaded) if named else 0
    return loaded if named and tensors and tensors + extra >= len(loaded) else None


def _choice(loaded: Mapping[Any, Any], chosen: str) -> tuple[str, ...]:
    others = [
        name for name in _AVERAGES if name != chosen and isinstance(loaded.get(name), (Mapping, nn.Module))
    ]
    if not others:
        return ()
    return (f"took the weights under {chosen!r}; the file has others too: --key {' or --key '.join(others)}",)
