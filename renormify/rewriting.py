"""The rewriting of BatchNorm into Batch Renorm, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.parameter import UninitializedBuffer

from renormify.errors import NothingToConvertError, RenormifyWarning, UnsupportedModelError
from renormify.forwards import traces_shared
from renormify.functions import (
    calls_renorm,
    check_restorable,
    convert_forward,
    convert_graph,
    restore_forward,
)
from renormify.layers import Renormalised, is_batch_renorm
from renormify.programs import is_program_module, make_trainable
from renormify.registry import register_rule, rule_for
from renormify.rules import (
    apply_rule,
    convert_layer,
    original_of,
    refusal,
    revert_layer,
    synchronise_layer,
    take_back,
)
from renormify.selection import Selection
from renormify.settings import Momentum, Settings
from renormify.sites import Site, find_sites
from renormify.snapshots import undone_upon_error
from renormify.tracing import is_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Conversion",
    "Filter",
    "Report",
    "SiteReport",
    "convert",
    "convert_sync",
    "register_rule",
    "renormify",
    "revert",
    "rewrite",
]

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class SiteReport:
    """What became of one BatchNorm.

    Attributes:
        name: the path of its module ("" for the root), or of the module whose forward calls the function.
        kind: its class, or ``batch_norm()`` for a functional call.
        action: ``"converted"`` or ``"skipped"``.
        reason: why it was skipped; of a converted one a remark, mostly empty.
        channels: how many, None where that is not known.
    """

    name: str
    kind: str
    action: Literal["converted", "skipped"]
    reason: str
    channels: int | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """What became of every BatchNorm of a model, in the order of its module tree.

    Attributes:
        sites: each BatchNorm.
        notes: what else the user should know, a sentence each: of an exported program, what does not follow
            train() and eval().
    """

    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[str, ...]:
        """The names of the sites that are Batch Renorm now."""
        return tuple(site.name for site in self.sites if site.action == "converted")

    @property
    def skipped(self) -> tuple[str, ...]:
        """The names of the sites that were left as they are."""
        return tuple(site.name for site in self.sites if site.action == "skipped")

    def to_dict(self) -> dict[str, Any]:
        """The names, and each site in full, as plain values."""
        return {
            "converted": list(self.converted),
            "skipped": list(self.skipped),
            "sites": [site.to_dict() for site in self.sites],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what became of each of its BatchNorms."""

    model: nn.Module
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """The report, as plain values."""
        return self.report.to_dict()


def convert(
    model: nn.Module | ExportedProgram,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    momentum: Momentum = 0.01,
    stat: str = "sigma",
    filter_fn: Filter | None = None,
    include_frozen: bool = False,
    inplace: bool = False,
) -> Conversion:
    r"""Turns every BatchNorm of a model into Batch Renorm, and reports on each.

    Running statistics, weights and every other tensor stay what they were, so in evaluation nothing changes;
    the state dict keeps its keys. In place, parameters stay the same objects: an optimizer built before goes
    on working.

    Args:
        model: any module; a GraphModule, which goes through the pass as a graph; or an exported program, of
            which a GraphModule comes back that can be trained.
        r_max: the layers' limit on r, at least 1. A pretrained model starts at the paper's final limits: its
            statistics are good already, and without r and d its first steps would be BatchNorm's.
        d_max: the layers' limit on d, at least 0.
        momentum: the share :math:`\alpha` of each batch in the running statistics, None for a cumulative
            average, or ``"keep"`` for each layer's own.
        stat: ``"sigma"`` (the paper) or ``"var"``: see :class:`renormify.BatchRenorm2d`.
        filter_fn: ``filter_fn(module, name) -> bool`` says which sites to convert; by default all.
        include_frozen: also convert frozen BatchNorm, layers whose class is one and calls with
            ``training=False``. Their weight and bias become parameters.
        inplace: convert the model itself rather than a copy.

    Returns:
        The converted model, of the class it was, and a report with every site, converted or skipped.

    Raises:
        NothingToConvertError: when no site is left to convert; the model is as it was.
        UnsupportedModelError: for something that is none of these, a scripted module, one that cannot be
            copied, or a BatchNorm itself with ``inplace=True``.
        InputError: for a setting out of range.
    """
    settings = Settings(r_max, d_max, momentum, stat, include_frozen)
    with _conversion():
        if isinstance(model, ExportedProgram):
            model = model.module()
        _check_model(model)
        verdicts = _judge(find_sites(model), settings, filter_fn)
        _require_some(model, verdicts)
        target = _target(model, inplace)
        with undone_upon_error(target, _changing(verdicts)) if inplace else nullcontext():
            notes = [make_trainable(module) for module in target.modules() if is_program_module(module)]
            target = _apply(target, verdicts, settings)
    return Conversion(target, _report(verdicts, tuple(chain(*notes))))


@contextmanager
def _conversion() -> Iterator[None]:
    """Makes tensors that can be trained, in inference mode too, and traces modules that are alike once."""
    with torch.inference_mode(False), traces_shared():
        yield


def renormify(
    model: nn.Module | ExportedProgram,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    momentum: Momentum = 0.01,
    stat: str = "sigma",
    filter_fn: Filter | None = None,
    include_frozen: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Turns every BatchNorm of a model into Batch Renorm; :func:`convert` without the report.

    Examples::

        >>> model = renormify(torchvision.models.resnet18(weights="DEFAULT"))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # and train at batch 2
    """
    return convert(
        model,
        r_max=r_max,
        d_max=d_max,
        momentum=momentum,
        stat=stat,
        filter_fn=filter_fn,
        include_frozen=include_frozen,
        inplace=inplace,
    ).model


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turns every Batch Renorm layer back into BatchNorm; weights and statistics stay, evaluation does too.

    Each layer gets back the class and the momentum it had before it was converted.

    Raises:
        NothingToConvertError: when the model holds no Batch Renorm.
        UnsupportedModelError: as for :func:`convert`, for a layer that derives from one of ours, and for a
            forward that was wrapped since.
    """
    _check_model(model)
    for _, layer in _layers(model):
        if "replaces" not in vars(layer):
            original_of(layer)  # before any is changed
    for module in model.modules():
        check_restorable(module)
    target = _target(model, inplace)
    layers = list(_layers(target))
    calls = [module for module in target.modules() if restore_forward(module)]
    if not layers and not calls:
        raise NothingToConvertError(f"found no Batch Renorm in {type(model).__name__} to revert")
    for name, layer in layers:
        if "replaces" in vars(layer):
            target = _put(target, name, take_back(layer))
        else:
            revert_layer(layer)
    return target


def convert_sync(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Turns every Batch Renorm layer of a model into :class:`renormify.SyncBatchRenorm`, in place.

    Args:
        model: a model with Batch Renorm layers, as :func:`renormify` returns it.
        process_group: the processes to join. Default: all

    Functional calls have no layer that could join processes; a warning names those that there are.

    Raises:
        NothingToConvertError: when it has none.

    Returns:
        The model itself.
    """
    layers = list(_layers(model))
    if not layers:
        raise NothingToConvertError(
            f"found no Batch Renorm layer in {type(model).__name__}; first convert it, with renormify()"
        )
    for _, layer in layers:
        synchronise_layer(layer, process_group)
    alone = [name or "the model itself" for name, module in model.named_modules() if calls_renorm(module)]
    if alone:
        warnings.warn(
            f"functional calls stay with the batch of their own process: those of {', '.join(alone)}. "
            "Make them call a layer to synchronise them.",
            RenormifyWarning,
            stacklevel=2,
        )
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, Renormalised]]:
    for name, module in model.named_modules():
        if is_batch_renorm(module):
            yield name, module


def rewrite(graph_module: fx.GraphModule, settings: Settings = Settings()) -> PassResult:  # noqa: B008
    """The FX pass, for a pipeline of passes: converts the norm nodes of a GraphModule, in place.

    It serves calls of modules, of torch's functions and of ATen operators. A graph without BatchNorm passes
    through unmodified.

    Raises:
        UnsupportedModelError: for a module that is not a GraphModule.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise UnsupportedModelError(
            f"expected a GraphModule (got {type(graph_module).__name__}); see convert()"
        )
    with _conversion():
        verdicts = _judge(find_sites(graph_module), settings, None)
        with undone_upon_error(graph_module, _changing(verdicts)):
            _apply(graph_module, verdicts, settings)
    return PassResult(graph_module, any(reason is None for _, reason in verdicts))


_Verdicts = list[tuple[Site, str | None]]  # a site, and why it is skipped


def _judge(sites: tuple[Site, ...], settings: Settings, filter_fn: Filter | None) -> _Verdicts:
    return [(site, refusal(site, settings) or _deselection(site, filter_fn)) for site in sites]


def _deselection(site: Site, filter_fn: Filter | None) -> str | None:
    if filter_fn is None or filter_fn(site.module, site.name):
        return None
    return filter_fn.why_not(site.name) if isinstance(filter_fn, Selection) else "left out by filter_fn"


def _changing(verdicts: _Verdicts) -> list[nn.Module]:
    return [site.module for site, reason in verdicts if reason is None]


def _apply(model: nn.Module, verdicts: _Verdicts, settings: Settings) -> nn.Module:
    """Converts the chosen sites of the model they were found in, or of a copy of it."""
    chosen = [site for site, reason in verdicts if reason is None]
    for path in dict.fromkeys(site.path for site in chosen):
        module = model.get_submodule(path)
        calls = [site for site in chosen if site.path == path and site.calls]
        if isinstance(module, fx.GraphModule) and calls:
            convert_graph(module, calls, path, settings)
        elif calls:
            left = [site for site, why in verdicts if why and site.path == path and site.calls]
            convert_forward(module, calls, left, settings)
        elif rule_for(module) is not None:
            model = _put(model, path, apply_rule(module, settings))
        else:
            convert_layer(module, settings)
    return model


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Puts a module in the place of another, wherever that is registered; returns the root."""
    replaced = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is replaced:
                parent._modules[name] = module
    return model if path else module


def _report(verdicts: _Verdicts, notes: tuple[str, ...] = ()) -> Report:
    return Report(
        tuple(
            SiteReport(
                site.name,
                site.kind,
                "skipped" if reason else "converted",
                reason or _remark(site),
                site.channels,
            )
            for site, reason in verdicts
        ),
        notes,
    )


def _remark(site: Site) -> str:
    recorded = any(not call.trains for call in site.calls)
    return "recorded as evaluation; it trains where the model does" if recorded else ""


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected an nn.Module (got {type(model).__name__})")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "a scripted module cannot be rewritten; convert the Python module it came from"
        )


def _target(model: nn.Module, inplace: bool) -> nn.Module:
    """The module to change: the model, or a copy."""
    if not inplace:
        return _copied(model)
    if is_norm(model):
        raise UnsupportedModelError(
            f"a {type(model).__name__} itself cannot become another layer in place; "
            "use what is returned with inplace=False"
        )
    return model


def _copied(model: nn.Module) -> nn.Module:
    lazy = [buffer for buffer in model.buffers() if isinstance(buffer, UninitializedBuffer)]
    memo: dict[int, Any] = {  # torch copies lazy parameters, but not lazy buffers
        id(buffer): UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
        for buffer in lazy
    }
    try:
        copied = copy.deepcopy(model, memo)
        for module in model.modules():
            if isinstance(module, fx.GraphModule):
                _complete(memo[id(module)], copy.deepcopy(module.__dict__, memo))
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        what = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {what}); "
            "convert it in place, with inplace=True"
        ) from error
    return copied


def _complete(graph_module: fx.GraphModule, attributes: dict[str, Any]) -> None:
    """Gives the copy of a GraphModule what its ``__deepcopy__`` leaves out: hooks and plain attributes."""
    for name, value in attributes.items():
        if name not in graph_module.__dict__ or "_hooks" in name:
            graph_module.__dict__[name] = value


def _require_some(model: nn.Module, verdicts: _Verdicts) -> None:
    if any(reason is None for _, reason in verdicts):
        return
    message = f"found no BatchNorm to convert in {type(model).__name__}"
    if verdicts:
        site, reason = verdicts[0]
        message += f": {len(verdicts)} skipped, the first {site.name or 'the model itself'} ({reason})"
    raise NothingToConvertError(message, _report(verdicts) if verdicts else None)
