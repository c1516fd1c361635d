"""Checkpoints: reading them without running what is in them, loading them strictly, and writing them."""

from __future__ import annotations

import os

from torch import nn

from renormify import sources
from renormify.fitting import check_weights, fit_keys, load_weights
from renormify.reading import Checkpoint, load_checkpoint
from renormify.writers import check_checkpoint_output, save_checkpoint

__all__ = [
    "Checkpoint",
    "check_checkpoint_output",
    "check_weights",
    "fit_keys",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "save_checkpoint",
]


def load_model(source: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Builds the model that a source names and loads a checkpoint into it, strictly.

    Args:
        source: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
        weights: a checkpoint file; without it the model keeps the fresh weights that it was built with.

    Raises:
        ModelSourceError: the source names nothing, or its factory fails.
        CheckpointError: the file cannot be read, or does not fit.
        MissingExtraError: torchvision or timm is not installed.
    """
    # The file first: reading it takes less time than building a model, and is as likely to fail.
    checkpoint = None if weights is None else load_checkpoint(weights)
    model = sources.build_model(source)
    return model if checkpoint is None else load_weights(model, checkpoint)
