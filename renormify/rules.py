"""What becomes of each kind of site, or why nothing does.

A layer is converted by giving the very same object another class: it stays where it is in the tree and in
every list, closure and optimizer that refers to it, with its parameters, buffers, hooks, name and training
flag. What Batch Renorm has beyond BatchNorm's state is added to it, and taken away by :func:`revert_layer`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase

from renormify.counterparts import (
    Thawed,
    class_of,
    counterpart,
    names_given,
    set_class,
    synchronised,
    torch_base,
)
from renormify.errors import UnsupportedModelError, one_line
from renormify.forwards import calls_in_forward
from renormify.graphs import is_own, problem_of
from renormify.interception import is_rewritten
from renormify.layers import Renormalised, is_batch_renorm
from renormify.references import calls_batch_norm, calls_super_forward, method_misled_by_super
from renormify.registry import rule_for
from renormify.settings import Settings
from renormify.sites import Site

__all__ = [
    "apply_rule",
    "convert_layer",
    "original_of",
    "refusal",
    "revert_layer",
    "synchronise_layer",
    "take_back",
]


def refusal(site: Site, settings: Settings) -> str | None:
    """Why a site cannot be converted, as a phrase with what to do where something can be done; or None."""
    module = site.module
    if site.problem or site.calls:
        return site.problem or _refusal_of_call(site, settings)
    if is_batch_renorm(module):
        return "is Batch Renorm already"
    if rule_for(module) is not None:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced; convert what it came from"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if torch_base(type(module)) is None and (reason := _refusal_of_stranger(site, settings)):
        return reason
    reason = _refusal_of_names(module, names_given(class_of(module))) or _refusal_of_class(module)
    if torch_base(type(module)) is None:
        return reason
    return reason or _refusal_of_state(module) or _refusal_of_forward(module, settings)


def _refusal_of_call(site: Site, settings: Settings) -> str | None:
    in_graph = site.calls[0].node.graph.owning_module is not None
    if not in_graph and is_rewritten(site.module):
        return "is Batch Renorm already"
    if not in_graph and not settings.include_frozen and not site.calls[0].trains:
        return "frozen: the call has training=False"
    if settings.momentum is None:
        return "a functional call has no count of batches, which a cumulative average (momentum=None) needs"
    return _refusal_of_names(site.module, {"r_max", "d_max", "calls_batch_renorm"})


def _refusal_of_names(module: nn.Module, names: set[str]) -> str | None:
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    for cls in class_of(module).__mro__:
        own |= vars(cls).keys() if not cls.__module__.startswith("torch.nn.") else set()
    taken = sorted(names & own)
    return f"has an attribute {taken[0]} of its own; rename that" if taken else None


def _refusal_of_class(module: nn.Module) -> str | None:
    try:
        counterpart(class_of(module))
    except Exception as error:  # what a metaclass may raise
        return (
            f"no class can be derived from {type(module).__name__} ({one_line(error)}); see register_rule()"
        )
    return None


def _refusal_of_stranger(site: Site, settings: Settings) -> str | None:
    """Of a norm that does not derive from torch's."""
    if "frozen" not in site.kind.lower():
        return f"{site.kind} does not derive from a BatchNorm of torch.nn; see register_rule()"
    if not settings.include_frozen:
        return "frozen: its statistics and affine are constants"
    return None


def _refusal_of_state(module: Any) -> str | None:
    if module.running_mean is None or module.running_var is None or not module.track_running_stats:
        return "has no running statistics, which r and d are relative to; set track_running_stats=True"
    if module.num_batches_tracked is None:
        return "has no num_batches_tracked; its state is not BatchNorm's"
    if not module.eps > 0:
        return f"has eps={module.eps:g}; Batch Renorm divides by sigma, and needs one above 0"
    return None


def _refusal_of_forward(module: Any, settings: Settings) -> str | None:
    name = type(module).__name__
    if (method := method_misled_by_super(module)) is not None:
        return f"{name}.{method} gives super() self.__class__ or a class of torch; give it the class it is in"
    if not _normalises_itself(module):
        return None
    found = calls_in_forward(module, class_of(module).forward)
    if found.problem:
        return f"{name} has a forward of its own that cannot be traced ({found.problem}); see register_rule()"
    own = [call.arguments for call in found.calls if is_own(call) and not problem_of(call)]
    if not any(call["training"] is not False for call in own):
        does = "calls batch_norm with training=False alone" if own else "does not call batch_norm"
        return f"{name} has a forward of its own, which {does}; see register_rule()"
    if settings.momentum == "keep":
        given = {call["momentum"] for call in own if isinstance(call["momentum"], float)}
        if module.momentum is not None and given - {module.momentum}:
            return f"{name} calls batch_norm with a momentum that is not its own, which to keep is not clear"
    return None


def _normalises_itself(module: nn.Module) -> bool:
    """Whether the forward of a BatchNorm is its own, and does not leave the normalising to super()."""
    if torch_base(type(module)) is None:
        return False  # frozen: what it computes is known
    own = not class_of(module).forward.__module__.startswith("torch.nn.")
    return own and (calls_batch_norm(module) or not calls_super_forward(module))


class Original(NamedTuple):
    """What a layer was, beyond its state.

    Attributes:
        kind: its class.
        momentum: its momentum, if it had one.
        dtype: of its running statistics; None where it was that of the weight.
    """

    kind: type[nn.Module]
    momentum: float | None
    dtype: torch.dtype | None


def convert_layer(module: nn.Module, settings: Settings) -> None:
    """Turns a norm layer that :func:`refusal` lets pass into Batch Renorm, in place."""
    layer: Any = module
    kind = class_of(module)
    calls_itself = _normalises_itself(module)
    layer.converted_from = Original(kind, getattr(layer, "momentum", None), _own_dtype(layer))
    set_class(layer, counterpart(kind))
    layer.init_renorm(settings.r_max, settings.d_max, settings.stat)
    if isinstance(layer, Thawed):
        layer.thaw(0.01 if settings.momentum == "keep" else settings.momentum)
    elif settings.momentum != "keep":
        layer.momentum = settings.momentum
    if calls_itself:
        layer.calls_itself = True


def _own_dtype(layer: Any) -> torch.dtype | None:
    """The dtype of the running statistics, unless it is that of the weight, with which it may change."""
    dtype: torch.dtype = layer.running_mean.dtype
    weight = getattr(layer, "weight", None)
    return None if weight is not None and weight.dtype is dtype else dtype


def original_of(layer: Any) -> Original:
    """What a Batch Renorm layer was.

    Of a layer that was never a BatchNorm: the class of torch.nn that corresponds, and what it has now.

    Raises:
        UnsupportedModelError: for a class that derives from a layer of ours.
    """
    if "converted_from" in vars(layer):
        return layer.converted_from  # type: ignore[no-any-return]
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        if class_of(layer) is counterpart(kind):
            dtype = layer.running_mean.dtype if layer.weight is None else None
            return Original(kind, layer.momentum, dtype)
    raise UnsupportedModelError(
        f"{type(layer).__name__} derives from a Batch Renorm layer; no BatchNorm corresponds to it"
    )


def revert_layer(module: nn.Module) -> None:
    """Turns a Batch Renorm layer into what :func:`original_of` tells, in place."""
    layer: Any = module
    kind, momentum, dtype = original_of(layer)
    _lower_statistics(layer, dtype)
    layer.end_renorm()
    for name in ("converted_from", "calls_itself"):
        layer.__dict__.pop(name, None)
    if issubclass(kind, _LazyNormBase) and not isinstance(layer, _LazyNormBase):  # it has seen its input
        kind = kind.cls_to_become  # type: ignore[assignment]
    if isinstance(layer, Thawed):
        layer.freeze()
    else:
        layer.momentum = momentum
    set_class(layer, kind)
    if not issubclass(kind, nn.SyncBatchNorm):
        layer.__dict__.pop("process_group", None)


def _lower_statistics(layer: Any, dtype: torch.dtype | None) -> None:
    """Gives statistics that training, or a cast, raised to float32 their dtype again; None: the weight's."""
    dtype = dtype or layer.weight.dtype
    if dtype.itemsize < layer.running_mean.dtype.itemsize == 4:
        layer.running_mean, layer.running_var = layer.running_mean.to(dtype), layer.running_var.to(dtype)


def synchronise_layer(layer: Renormalised, process_group: Any) -> None:
    """Makes a Batch Renorm layer join the batches of a group of processes, in place."""
    kind: Any = class_of(layer)
    set_class(layer, synchronised(kind))
    vars(layer)["process_group"] = process_group


def apply_rule(module: nn.Module, settings: Settings) -> Renormalised:
    """The layer that the registered rule makes of a module.

    Raises:
        UnsupportedModelError: where it is no Batch Renorm layer, or its state dict has other names.
    """
    rule: Any = rule_for(module)
    layer = rule(module, settings)
    kind = type(module).__name__
    if not is_batch_renorm(layer):
        raise UnsupportedModelError(
            f"the rule for {kind} must return a Batch Renorm layer (got {type(layer).__name__})"
        )
    expected, names = list(module.state_dict()), list(layer.state_dict())
    if expected != names:
        raise UnsupportedModelError(
            f"the rule for {kind} must keep the names of its state: expected {expected} (got {names})"
        )
    theirs = module.state_dict()
    changed = [name for name, value in layer.state_dict().items() if not _is_equal(value, theirs[name])]
    if changed:
        raise UnsupportedModelError(
            f"the rule for {kind} must keep its tensors, but {', '.join(changed)} differ from the module's; "
            "load its state dict into the layer"
        )
    for name, hooks in vars(module).items():
        if name in _HOOKS and not vars(layer)[name]:
            vars(layer)[name] = hooks  # the same dictionary, from which who has registered one can remove it
    vars(layer)["replaces"] = (module,)  # in a tuple, it is no submodule
    return layer.train(module.training)


_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)


def _is_equal(ours: object, theirs: object) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return True  # of extra state
    return ours.shape == theirs.shape and (
        ours.is_meta or theirs.is_meta or torch.equal(ours, theirs.to(ours.device, ours.dtype))
    )


def take_back(layer: Renormalised) -> nn.Module:
    """The module that a registered rule replaced, with what the layer has learnt since."""
    (module,) = vars(layer)["replaces"]
    if isinstance(getattr(module, "running_mean", None), Tensor):
        _lower_statistics(layer, _own_dtype(module))
    parameters = dict(module.named_parameters())
    state = {
        name: value if name in parameters or not isinstance(value, Tensor) else value.detach()
        for name, value in layer.state_dict(keep_vars=True).items()
    }
    module.load_state_dict(state, assign=True)  # the layer may have been moved or cast
    return module.train(layer.training)  # type: ignore[no-any-return]
