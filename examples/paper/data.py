"""Fashion-MNIST, whole: 60,000 images to learn from, 10,000 to test on, and microbatches of them."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paper.settings import LABELS

FOLDER = Path("/usr/share/datasets/fashion-mnist")
PARTS = ("train", "t10k")
VALIDATION = 5_000

OWN = (0.2860, 0.3530)
"""Mean and standard deviation of Fashion-MNIST's training images."""


def missing(folder: Path) -> str | None:
    """What to do where the data is not there; None where it is."""
    if all(file.is_file() for part in PARTS for file in _files(folder, part)):
        return None
    return (
        f"Fashion-MNIST is not in {folder}: install it with 'sudo apt-get install dataset-fashion-mnist' "
        "(Debian, Ubuntu), or name the folder of its four .gz files with --data"
    )


def _files(folder: Path, part: str) -> tuple[Path, Path]:
    return folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"


@dataclass(frozen=True)
class Images:
    """Images and labels, read as they are needed.

    Args:
        pixels: uint8, :math:`(N, 28, 28)`.
        labels: int64, :math:`(N)`.
        size: of the images given out, if other than 28.
        channels: of the images given out, all alike.
        scale: mean and standard deviation that they are normalised by.
    """

    pixels: Tensor
    labels: Tensor
    size: int = 28
    channels: int = 1
    scale: tuple[float, float] = OWN

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Float images :math:`(N, C, S, S)` and their labels."""
        mean, std = self.scale
        images = (self.pixels[index].unsqueeze(1).float() / 255 - mean) / std
        if self.size != images.shape[-1]:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear")
        return images.expand(-1, self.channels, -1, -1).contiguous(), self.labels[index]

    def first(self, number: int) -> Images:
        return self.part(slice(number))

    def part(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index], self.size, self.channels, self.scale)


@dataclass(frozen=True)
class Data:
    """The training images without those for validation, these, and the test images."""

    train: Images
    validation: Images
    test: Images


def load(folder: Path, *, size: int = 28, channels: int = 1, scale: tuple[float, float] = OWN) -> Data:
    """Reads the four files; the validation images are the same 5,000 in every run."""
    known, test = (Images(*_read(folder, part), size, channels, scale) for part in PARTS)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(12345))
    return Data(known.part(order[VALIDATION:]), known.part(order[:VALIDATION]), test)


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images, labels = (gzip.decompress(file.read_bytes()) for file in _files(folder, part))
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return torch.tensor(pixels), torch.tensor(np.frombuffer(labels, np.uint8, offset=8)).long()


class Sampler:
    """Draws steps of microbatches, each from so many labels chosen anew.

    Args:
        labels: of all images to draw from, :math:`(N)`.
        microbatch: images of a microbatch.
        kinds: how many of the labels are in it, in equal shares; all of them means that images are drawn
            without regard to their label.
        seed: of the order.
    """

    def __init__(self, labels: Tensor, microbatch: int, kinds: int, seed: int) -> None:
        if kinds != LABELS and microbatch % kinds:
            raise ValueError(f"a microbatch of {microbatch} has no equal shares of {kinds} labels")
        self.number, self.microbatch, self.kinds = len(labels), microbatch, kinds
        self.of_label = [(labels == label).nonzero().squeeze(1) for label in range(LABELS)]
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, batch: int) -> Tensor:
        """Indices of a step's images, one microbatch after the other."""
        if self.kinds == LABELS:
            return torch.randint(self.number, (batch,), generator=self.generator)
        share = self.microbatch // self.kinds
        parts = []
        for _ in range(math.ceil(batch / self.microbatch)):
            for label in torch.randperm(LABELS, generator=self.generator)[: self.kinds].tolist():
                members = self.of_label[label]
                parts.append(members[torch.randint(len(members), (share,), generator=self.generator)])
        return torch.cat(parts)
