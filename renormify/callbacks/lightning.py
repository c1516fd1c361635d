"""The callback for Lightning's Trainer."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from renormify.callbacks.road import Road
from renormify.errors import MissingExtraError, NothingToConvertError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError("lightning", "lightning", "for its Trainer's callback") from error

__all__ = ["RenormCallback"]


class RenormCallback(Callback):
    """Converts a LightningModule before it is trained, moves its limits, logs its figures, and exports it.

    The module is converted in place in ``setup``, before the optimizers are configured and a checkpoint is
    loaded, and what its own ``setup`` and ``configure_model`` make after that in ``on_fit_start``; parameters
    stay the objects that the optimizers have. Evaluation alone converts nothing. The schedule follows
    ``trainer.global_step``, Lightning's count of optimizer steps (of all optimizers together), and goes on
    with it when ``fit(ckpt_path=...)`` resumes; its state is in the checkpoint as well. The figures of
    :class:`renormify.Monitor` go to the module's loggers.

    Args:
        **options: see :class:`renormify.callbacks.road.Road`.

    Raises:
        NothingToConvertError: when training starts, where the module has neither BatchNorm nor Batch Renorm.
        ProofError: at the end of training, where the exported file differs from the model; it is not kept.

    Examples::

        >>> callback = RenormCallback(export_to="model.onnx", example=torch.randn(1, 3, 224, 224))
        >>> Trainer(callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, **options: Any) -> None:
        self._road = Road(**options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts what there is of the module, where it is going to be trained."""
        if stage == "fit":
            with suppress(NothingToConvertError):  # as yet
                self._road.convert(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Converts what the module has made of itself since, and applies the limits."""
        self._road.begin(pl_module, trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies the limits of the step that a checkpoint has brought."""
        self._road.step(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follows the optimizer, and logs the figures."""
        self._road.step(trainer.global_step)
        if figures := self._road.sample():
            pl_module.log_dict(figures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports, on one process."""
        if trainer.is_global_zero:
            self._road.end(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state."""
        return {} if self._road.scheduler is None else self._road.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the schedule's state up."""
        if self._road.scheduler is not None and state_dict:
            self._road.scheduler.load_state_dict(state_dict)
