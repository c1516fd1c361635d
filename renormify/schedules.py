r"""How r_max and d_max move while a model trains.

From scratch, a model begins as BatchNorm (r_max = 1, d_max = 0) and the limits rise once its running
statistics mean something; raised too early they gave the paper loss spikes. A pretrained model needs no ramp:
its statistics are good, and :class:`ConstantSchedule` keeps the paper's final limits.
"""

from __future__ import annotations

import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from torch import nn

from renormify.errors import InputError, NothingToConvertError, RenormifyWarning, UnsupportedModelError
from renormify.layers import Renormalised, bears_limits, is_batch_renorm
from renormify.rewriting import Filter
from renormify.settings import check_whole

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "PaperSchedule",
    "RenormScheduler",
    "Schedule",
]

Limits = tuple[float, float]

_PAPER_STEPS = 130_000


@runtime_checkable
class Schedule(Protocol):
    """Anything with ``at(step) -> (r_max, d_max)``; a plain function of the step serves as well."""

    def at(self, step: int) -> Limits:
        """The limits r_max and d_max after so many steps."""
        ...


@dataclass(frozen=True)
class ConstantSchedule:
    """The same limits at every step, for a model whose running statistics are good from the start.

    Args:
        r_max: at least 1. Default: 3.0
        d_max: at least 0. Default: 5.0

    Raises:
        InputError: for limits out of range.
    """

    r_max: float = 3.0
    d_max: float = 5.0

    def __post_init__(self) -> None:
        _check_limits(self, (self.r_max, self.d_max))

    def at(self, step: int) -> Limits:
        """The limits; they are those of every step."""
        return float(self.r_max), float(self.d_max)


class _OnClassToo:
    """A method that on the class, without an instance, is that of the default instance."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        bound: Callable[..., Any] = self._method.__get__(owner() if instance is None else instance)
        return bound


@dataclass(frozen=True)
class PaperSchedule:
    """The paper's ramp for training from scratch: BatchNorm first, then limits that rise linearly.

    r_max is 1 and d_max is 0 until ``warmup_steps``; they arrive at their final values at ``r_max_step`` and
    ``d_max_step``, and stay there. The defaults are those of the paper's run of about 130,000 steps
    (https://arxiv.org/abs/1702.03275, section 4.1).

    Args:
        warmup_steps: as many steps are BatchNorm. Default: 5000
        r_max: the final r_max, at least 1. Default: 3.0
        r_max_step: when it is reached. Default: 40000
        d_max: the final d_max, at least 0. Default: 5.0
        d_max_step: when it is reached. Default: 25000

    Raises:
        InputError: for limits out of range, or steps out of order.

    Examples::

        >>> PaperSchedule().at(25_000)
        (2.142857142857143, 5.0)
        >>> PaperSchedule.scaled(13_000).at(2_500)
        (2.142857142857143, 5.0)
    """

    warmup_steps: int = 5_000
    r_max: float = 3.0
    r_max_step: int = 40_000
    d_max: float = 5.0
    d_max_step: int = 25_000

    def __post_init__(self) -> None:
        _check_limits(self, (self.r_max, self.d_max), finite=True)
        for name in ("warmup_steps", "r_max_step", "d_max_step"):
            _check_number(self, name)
        for name in ("r_max_step", "d_max_step"):
            if not 0 <= self.warmup_steps <= getattr(self, name):
                raise InputError(f"{self}: expected 0 <= warmup_steps <= {name}")

    def at(self, step: int) -> Limits:
        """The limits after ``step`` steps."""
        return _between(
            (self.r_max, self.d_max),
            _share(step, self.warmup_steps, self.r_max_step),
            _share(step, self.warmup_steps, self.d_max_step),
        )

    @_OnClassToo
    def scaled(self, total_steps: int) -> PaperSchedule:
        """The same ramp for a run of ``total_steps`` instead of about 130,000.

        ``PaperSchedule.scaled(n)`` is ``PaperSchedule().scaled(n)``.

        Raises:
            InputError: for a number of steps below 1.
        """
        check_whole(f"{type(self).__name__}: total_steps", total_steps)
        scale = total_steps / _PAPER_STEPS
        warmup, r_max_step, d_max_step = (
            round(steps * scale) for steps in (self.warmup_steps, self.r_max_step, self.d_max_step)
        )
        return PaperSchedule(warmup, self.r_max, r_max_step, self.d_max, d_max_step)


@dataclass(frozen=True)
class _Ramp(ABC):
    total_steps: int
    r_max: float = 3.0
    d_max: float = 5.0
    start: float = 0.04
    end: float = 0.31

    def __post_init__(self) -> None:
        check_whole(f"{type(self).__name__}: total_steps", self.total_steps)
        _check_limits(self, (self.r_max, self.d_max), finite=True)
        for name in ("start", "end"):
            _check_number(self, name)
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(f"{self}: expected 0 <= start <= end <= 1")

    def at(self, step: int) -> Limits:
        """The limits after ``step`` steps."""
        share = _share(step, self.start * self.total_steps, self.end * self.total_steps)
        return _between((self.r_max, self.d_max), self._eased(share), self._eased(share))

    @staticmethod
    @abstractmethod
    def _eased(share: float) -> float: ...


_RAMP_DOC = """A ramp {shape} by fraction of the run, from BatchNorm to the final limits.

    r_max is 1 and d_max is 0 until ``start``; both arrive at their final values at ``end``. By default that
    is when the paper's ramp of r_max begins and ends.

    Args:
        total_steps: of the run, at least 1.
        r_max: the final r_max, at least 1. Default: 3.0
        d_max: the final d_max, at least 0. Default: 5.0
        start: the fraction of the run that is BatchNorm. Default: 0.04
        end: the fraction after which the limits stay. Default: 0.31

    Raises:
        InputError: for limits, fractions or a number of steps out of range.
    """


@dataclass(frozen=True)
class LinearSchedule(_Ramp):  # noqa: D101
    __doc__ = _RAMP_DOC.format(shape="in a straight line,")

    @staticmethod
    def _eased(share: float) -> float:
        return share


@dataclass(frozen=True)
class CosineSchedule(_Ramp):  # noqa: D101
    __doc__ = _RAMP_DOC.format(shape="along half a cosine, slow at both ends,")

    @staticmethod
    def _eased(share: float) -> float:
        return (1 - math.cos(math.pi * share)) / 2


class RenormScheduler:
    """Moves r_max and d_max of a model's Batch Renorm layers, as a learning-rate scheduler moves the rate.

    The limits of step 0 apply at once; call :meth:`step` after each step of the optimizer, and after n calls
    they are ``schedule.at(n)``. A compiled model neither recompiles nor breaks its graph.

    Args:
        model: with Batch Renorm layers, as :func:`renormify.renormify` returns it.
        schedule: an object with ``at(step) -> (r_max, d_max)``, or a function of the step.
        groups: pairs ``(filter_fn, schedule)`` for layers that go their own way;
            ``filter_fn(module, name) -> bool`` as in :func:`renormify.convert`. A layer belongs to the first
            group that takes it, otherwise to ``schedule``.
        watch_every: as often, in steps, the host looks for batches that layers rejected since they held inf
            or NaN, and warns of the first.

    Raises:
        NothingToConvertError: the model has no Batch Renorm layer.
        InputError: a schedule gives r_max below 1, d_max below 0 or NaN, at the step where it does; or a
            group is no such pair, or takes no layer; or the model is no module.

    Examples::

        >>> scheduler = RenormScheduler(model, PaperSchedule.scaled(total_steps))
        >>> for images, labels in loader:
        ...     train(images, labels)
        ...     scheduler.step()
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | Callable[[int], Limits],
        *,
        groups: Iterable[tuple[Filter, Schedule | Callable[[int], Limits]]] = (),
        watch_every: int = 100,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"expected an nn.Module (got {type(model).__name__})")
        self._layers = {name: module for name, module in model.named_modules() if bears_limits(module)}
        if not self._layers:
            raise NothingToConvertError(
                f"found no Batch Renorm layer in {type(model).__name__} to schedule; "
                "first convert it, with renormify()"
            )
        self._groups = _grouped(self._layers, schedule, tuple(groups))
        self._watch_every = watch_every
        self._warned = False
        self._step = 0
        self._apply(0)

    def step(self) -> None:
        """Goes on by one step.

        Raises:
            InputError: the schedule's limits for that step are out of range; those of the last one stay.
        """
        self._apply(self._step + 1)
        if self._watch_every and self._step % self._watch_every == 0:
            self._warn_of_rejected_batches()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from here: the number of steps."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a run where it was left; the limits are those of that step at once.

        Raises:
            InputError: this is not the state of such a scheduler.
        """
        step = state.get("step") if isinstance(state, Mapping) else None
        if type(step) is not int or step < 0:
            raise InputError(
                f"expected the state dict of a RenormScheduler, {{'step': n}} (got {state!r:.80})"
            )
        self._apply(step)

    def _apply(self, step: int) -> None:
        moves = [(layers, limits_at(schedule, step)) for schedule, layers in self._groups]
        for layers, (r_max, d_max) in moves:
            for layer in layers:
                if (layer.r_max, layer.d_max) != (r_max, d_max):
                    layer.r_max, layer.d_max = r_max, d_max
        self._step = step

    def _warn_of_rejected_batches(self) -> None:
        if self._warned:
            return
        counts = {
            name: int(layer.rejected_batches)
            for name, layer in self._layers.items()
            if is_batch_renorm(layer) and not layer.rejected_batches.is_meta
        }
        first = next((name for name, count in counts.items() if count), None)
        if first is not None:
            self._warned = True
            warnings.warn(
                f"{sum(count > 0 for count in counts.values())} Batch Renorm layers saw inf or NaN by step "
                f"{self._step}, the first {first!r} in {counts[first]} batches; "
                "those batches left its running statistics as they were.",
                RenormifyWarning,
                stacklevel=3,
            )


def limits_at(schedule: Schedule | Callable[[int], Limits], step: int) -> Limits:
    """The limits of a schedule or a function at a step, checked.

    Raises:
        InputError: they are not a pair of numbers in range; the message names the schedule and the step.
    """
    if isinstance(schedule, type):
        raise InputError(f"expected a schedule, not its class: {schedule.__name__}(...)")
    if not isinstance(schedule, Schedule) and not callable(schedule):
        raise InputError(f"expected a schedule or a function of the step (got {type(schedule).__name__})")
    limits = schedule.at(step) if isinstance(schedule, Schedule) else schedule(step)
    return _check_limits(schedule, limits, f" at step {step}")


def _grouped(
    layers: Mapping[str, Renormalised],
    schedule: Schedule | Callable[[int], Limits],
    groups: tuple[tuple[Filter, Schedule | Callable[[int], Limits]], ...],
) -> list[tuple[Schedule | Callable[[int], Limits], list[Renormalised]]]:
    """Each schedule with its layers; the main one last."""
    left = dict(layers)
    grouped = []
    for number, group in enumerate(groups):
        if not (isinstance(group, (tuple, list)) and len(group) == 2 and callable(group[0])):
            raise InputError(
                f"groups[{number}] of the RenormScheduler must be a pair (filter_fn, schedule), whose "
                f"filter_fn is a function of a module and its name (got {group!r:.80})"
            )
        filter_fn, own = group
        taken = [name for name, layer in left.items() if filter_fn(layer, name)]
        if not taken:
            raise InputError(
                f"groups[{number}] of the RenormScheduler, {_name(own)}, takes none of the {len(left)} "
                f"Batch Renorm layers that are left (the first is {next(iter(left), None)!r})"
            )
        grouped.append((own, [left.pop(name) for name in taken]))
    return [*grouped, (schedule, list(left.values()))]


def _between(final: Limits, r_share: float, d_share: float) -> Limits:
    r_max, d_max = final
    return 1 + (r_max - 1) * r_share, d_max * d_share


def _share(step: int, start: float, end: float) -> float:
    """How much of the way from start to end a step has gone, from 0 to 1."""
    if step >= end:
        return 1.0
    return 0.0 if step <= start else (step - start) / (end - start)


def _check_limits(schedule: object, limits: Any, where: str = "", *, finite: bool = False) -> Limits:
    name = _name(schedule)
    if not isinstance(limits, (tuple, list)) or len(limits) != 2:
        raise InputError(f"{name}{where}: expected a pair (r_max, d_max) (got {limits!r:.80})")
    r_max, d_max = limits
    for what, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not isinstance(limit, Real) or not float(limit) >= least:
            raise InputError(
                f"{name}{where}: {what} must be a number of at least {least} (got {limit!r:.80})"
            )
        if finite and math.isinf(limit):
            raise InputError(f"{name}{where}: {what} must be finite, since a ramp leads there (got {limit})")
    return float(r_max), float(d_max)


def _check_number(schedule: object, name: str) -> None:
    value = getattr(schedule, name)
    if not isinstance(value, Real):
        raise InputError(f"{_name(schedule)}: {name} must be a number (got {value!r:.80})")


def _name(schedule: object) -> str:
    if isinstance(schedule, functools.partial):
        schedule = schedule.func
    return str(getattr(schedule, "__qualname__", type(schedule).__name__))
