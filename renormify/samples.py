"""A user's data for the command line: images in a folder, or an array in a file, as batches."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renormify.errors import InputError, MissingExtraError, one_line

__all__ = ["Samples"]

_IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_NAMES = ("x", "inputs", "input", "images", "data", "x_train")


@dataclass(frozen=True)
class Samples:
    """Which samples, how many, and in which order.

    Attributes:
        path: a folder with images, in any depth, or an ``.npz`` file with an array of shape :math:`(N, *)`.
        batch_size: of every batch; samples left over are left out.
        max_batches: as many are read.
        shuffle: whether samples are drawn at random, always the same, or come in the order of their names.
        mean: subtracted from the channels of images, whose values are from 0 to 1; an array is taken as it
            is.
        std: what they are divided by then.
    """

    path: Path
    batch_size: int = 4
    max_batches: int = 32
    shuffle: bool = True
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def check(self) -> None:
        """Says early what cannot be used.

        Raises:
            InputError: the path is neither a folder nor a file, or a number is out of range.
        """
        if not self.path.exists():
            raise InputError(f"no such file or folder: {self.path}")
        if not self.path.is_dir() and self.path.suffix != ".npz":
            raise InputError(f"{self.path} is neither a folder with images nor an .npz file")
        for name in ("batch_size", "max_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1 (got {getattr(self, name)})")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise InputError(
                f"mean {self.mean} and std {self.std}: expected one of each for each channel, std above 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)

    def batches(self, shape: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor]:
        """Reads the samples.

        Args:
            shape: of the model's input, :math:`(N, C, H, W)`; images are resized to it. None where it is not
                known, which an array does without.
            dtype: of the batches.

        Raises:
            InputError: a file cannot be read, there are fewer samples than a batch has, or there is no shape
                to resize images to.
            MissingExtraError: Pillow is not installed.
        """
        samples = self._images(shape) if self.path.is_dir() else self._array()
        return list(torch.split(samples.to(dtype), self.batch_size))

    def _chosen(self, number: int) -> list[int]:
        """Which of so many samples: whole batches."""
        batches = min(number // self.batch_size, self.max_batches)
        if batches == 0:
            raise InputError(
                f"{self.path} holds {number} samples, less than one batch of {self.batch_size}; "
                "give a smaller --batch-size"
            )
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(number, generator=generator).tolist() if self.shuffle else list(range(number))
        return order[: batches * self.batch_size]

    def _images(self, shape: Sequence[int] | None) -> Tensor:
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtraError("Pillow", "zoo", "to read images") from error
        files = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in _IMAGES)
        if not files:
            raise InputError(f"{self.path} holds no image ({', '.join(sorted(_IMAGES))})")
        if shape is None or len(shape) != 4 or shape[1] not in (1, 3):
            raise InputError(
                "images need an input shape (N, C, H, W) of one or three channels: give it, as "
                f"--input-shape 1,3,224,224 (got {'none' if shape is None else tuple(shape)})"
            )
        _, channels, height, width = shape
        if len(self.mean) not in (1, channels):
            raise InputError(
                f"mean and std have {len(self.mean)} channels, the model takes {channels}: "
                "give --mean and --std"
            )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        images = []
        for number in self._chosen(len(files)):
            try:
                with Image.open(files[number]) as image:
                    pixels = image.convert("RGB" if channels == 3 else "L").resize((width, height))
            except OSError as error:
                raise InputError(f"cannot read the image {files[number]}: {one_line(error)}") from error
            values = torch.from_numpy(np.array(pixels, dtype=np.float32)).view(height, width, channels) / 255
            images.append((values.permute(2, 0, 1) - mean) / std)
        return torch.stack(images)

    def _array(self) -> Tensor:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                name = self._name_of_array(file.files)
                array = file[name]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read {self.path}: {one_line(error)}") from error
        if array.ndim < 2 or not np.issubdtype(array.dtype, np.floating):
            raise InputError(
                f"{self.path}: expected {name!r} to be a floating-point array (N, ...), scaled as in "
                f"training (got {array.dtype} of shape {array.shape})"
            )
        return torch.from_numpy(array[self._chosen(len(array))])

    def _name_of_array(self, names: Sequence[str]) -> str:
        known = [name for name in _NAMES if name in names]
        if len(names) == 1 or known:
            return known[0] if known else names[0]
        raise InputError(
            f"{self.path} holds the arrays {', '.join(names) or 'none'}; "
            f"name the inputs one of {', '.join(_NAMES)}"
        )
