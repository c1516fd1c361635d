"""Norm classes that a user has taught the pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from renormify.errors import InputError
from renormify.settings import Settings

__all__ = ["Rule", "register_rule", "rule_for"]

Rule = Callable[[nn.Module, Settings], nn.Module]
"""Makes a Batch Renorm layer of a norm layer, with the same names in its state dict."""

_rules: dict[type[nn.Module], Rule] = {}


def register_rule(norm_class: type[nn.Module], rule: Rule) -> None:
    """Teaches :func:`renormify.convert` a norm class of your own.

    Args:
        norm_class: the class; a class derived from it follows the same rule, unless it has one of its own.
        rule: ``rule(module, settings)`` returns the Batch Renorm layer to put in the module's place, such as
            a :class:`renormify.BatchRenorm2d`, which holds the module's tensors under the same names.
            ``settings`` has ``r_max``, ``d_max``, ``momentum`` (a number, None or ``"keep"``) and ``stat``.

    Raises:
        InputError: where ``norm_class`` is no class of modules, or ``rule`` cannot be called.
    """
    if not (isinstance(norm_class, type) and issubclass(norm_class, nn.Module)):
        raise InputError(f"register_rule expects a class of modules (got {norm_class!r})")
    if not callable(rule):
        raise InputError(f"register_rule expects a function, rule(module, settings) (got {rule!r})")
    _rules[norm_class] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule registered for the module's class, or for the nearest class that it derives from."""
    return next((_rules[cls] for cls in type(module).__mro__ if cls in _rules), None)
