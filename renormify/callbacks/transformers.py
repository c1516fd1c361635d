"""The callback for the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from renormify.callbacks.road import Road
from renormify.errors import MissingExtraError

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError("transformers", "transformers", "for its Trainer's callback") from error

__all__ = ["RenormCallback"]


class RenormCallback(TrainerCallback):
    """Converts the model of a Trainer, moves its limits, logs its figures, and exports it.

    The model is converted in place when the Trainer is made, before there is an optimizer and a checkpoint is
    loaded. The schedule follows ``state.global_step``, which a checkpoint holds, and so goes on with
    ``train(resume_from_checkpoint=...)``. The figures of :class:`renormify.Monitor` go into
    ``state.log_history``, and to ``log``.

    Args:
        log: also called with the figures, as ``wandb.log``.
        **options: see :class:`renormify.callbacks.road.Road`.

    Raises:
        NothingToConvertError: where the model has neither BatchNorm nor Batch Renorm.
        ProofError: at the end of training, where the exported file differs from the model; it is not kept.

    Examples::

        >>> Trainer(model, arguments, train_dataset=data, callbacks=[RenormCallback()]).train()
    """

    def __init__(self, *, log: Callable[[dict[str, float]], Any] | None = None, **options: Any) -> None:
        self._log = log
        self._road = Road(**options)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Converts the model."""
        self._road.begin(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Converts the model, where the callback was added later, and applies the limits of the step."""
        self._road.begin(kwargs["model"], state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Samples a forward whose gradient is accumulated."""
        self._sample(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follows the optimizer, and logs the figures."""
        self._sample(state)
        self._road.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Exports, on one process."""
        if state.is_world_process_zero:
            self._road.end(kwargs["model"])

    def _sample(self, state: TrainerState) -> None:
        if figures := self._road.sample():
            state.log_history.append({**figures, "step": state.global_step})
            if self._log is not None:
                self._log(figures)
