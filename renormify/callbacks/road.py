"""What every trainer's callback does: convert, follow the schedule, monitor, and export with a proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from renormify.errors import InputError, NothingToConvertError, ProofError
from renormify.layers import bears_limits
from renormify.monitoring import Monitor
from renormify.outputs import check_output, staged
from renormify.rewriting import convert
from renormify.schedules import ConstantSchedule, Limits, RenormScheduler, Schedule

__all__ = ["Road"]


@dataclass
class Road:
    """One run of training, from the conversion to the ONNX file.

    Args:
        schedule: of r_max and d_max; an object with ``at(step)``, or a function of the step.
        convert_options: keyword arguments of :func:`renormify.convert`, but for ``inplace``.
        monitor_every: as many forwards from one sample of :class:`renormify.Monitor` to the next; None for no
            monitor.
        export_to: the ONNX file to write when training ends, or None.
        example: the model's positional arguments for the export, or a single tensor.
        force: whether an existing file may be replaced.

    Raises:
        InputError: ``export_to`` without an example, or a file that cannot be written.
    """

    schedule: Schedule | Callable[[int], Limits] = ConstantSchedule()  # noqa: RUF009 - it is frozen
    convert_options: Mapping[str, Any] = field(default_factory=dict)
    monitor_every: int | None = 100
    export_to: str | Path | None = None
    example: Any = None
    force: bool = False
    scheduler: RenormScheduler | None = field(default=None, init=False)
    monitor: Monitor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.export_to is not None:
            if self.example is None:
                raise InputError(
                    "export_to needs an example of the model's arguments, as example=torch.randn(...)"
                )
            check_output(self.export_to, force=self.force)  # not only after days of training

    def convert(self, model: nn.Module) -> None:
        """Converts the model in place, as far as it is not.

        In place, so that parameters stay the objects that an optimizer may have already.

        Raises:
            NothingToConvertError: it has neither BatchNorm nor Batch Renorm.
        """
        try:
            convert(model, inplace=True, **self.convert_options)
        except NothingToConvertError:
            if not any(bears_limits(module) for module in model.modules()):
                raise

    def begin(self, model: nn.Module, step: int = 0) -> None:
        """Converts the model as far as it is not, and applies the limits of a step.

        Raises:
            NothingToConvertError: it has neither BatchNorm nor Batch Renorm.
        """
        self.convert(model)
        self.scheduler = RenormScheduler(model, self.schedule)
        self.scheduler.load_state_dict({"step": step})
        self.monitor = None if self.monitor_every is None else Monitor(model, every=self.monitor_every)

    def step(self, step: int) -> None:
        """Applies the limits after so many steps of the optimizer; it may be as many as before."""
        assert self.scheduler is not None, "begin() comes first"
        last = self.scheduler.state_dict()["step"]
        if step == last + 1:
            self.scheduler.step()
        elif step != last:
            self.scheduler.load_state_dict({"step": step})

    def sample(self) -> dict[str, float]:
        """The monitor's figures after a forward, where it has some."""
        return {} if self.monitor is None else self.monitor.step()

    def end(self, model: nn.Module) -> None:
        """Exports the model where that was asked for, and keeps the file only if it agrees with the model.

        Raises:
            ProofError: it does not.
            ExportError: the model cannot be exported.
        """
        if self.export_to is None:
            return
        from renormify.onnx import export_onnx, verify_onnx

        device = next((p.device for p in model.parameters()), None)
        args = self.example if isinstance(self.example, tuple) else (self.example,)
        args = pytree.tree_map_only(Tensor, lambda value: value.to(device), args)
        with staged(self.export_to, force=self.force) as target:
            export_onnx(model, args, target)
            parity = verify_onnx(model, target, args)
            if not parity.passed:
                first = next(record for record in parity.outputs if not record.passed)
                where = f"{first.name} at batch size {first.batch_size}"
                raise ProofError(f"{self.export_to} was not written: {where}: {first.reason}")
