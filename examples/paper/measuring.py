"""How a trained network does: in evaluation mode, by batch statistics, recalibrated, and in onnxruntime."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paper.data import Images, Sampler
from paper.networks import for_deployment
from paper.settings import AFTERWARDS, AS_IS, Run
from renormify import recalibrate
from renormify.errors import InputError
from renormify.onnx import export_onnx

CHUNK = 50
FLOAT_NOISE = 1e-5
"""Two logits that lie closer than this, relative to the largest, are a tie."""


def accuracy(model: nn.Module, images: Images) -> float:
    """In evaluation mode, a fraction."""
    return _right(logits(model, images), images)


def _right(found: Tensor, images: Images) -> float:
    return float((found.argmax(1) == images.labels).float().mean())


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> Tensor:
    """In evaluation mode, :math:`(N, 10)`."""
    model.eval()
    starts = range(0, len(images), CHUNK)
    return torch.cat([model(images.at(slice(start, start + CHUNK))[0]) for start in starts])


def tested(model: nn.Module, run: Run, test: Images, unlabelled: list[Tensor]) -> dict[str, Any]:
    """What the test images say of a trained model.

    Args:
        model: as training left it.
        run: that it comes from.
        test: the images.
        unlabelled: batches to count running statistics on; without any this is not done.

    Returns:
        ``test``, the accuracy in evaluation mode; of what was trained from scratch also ``test_by_batch``,
        with every microbatch normalised as in training, drawn from as many labels, and ``test_of_drawn``, of
        the same images in evaluation mode; where running statistics move and were not counted first
        ``test_recalibrated``, with these counted anew on training images, or as they are where training
        diverged; with seed 0 ``onnx``, how the exported file classifies.
    """
    expected = logits(model, test)
    result: dict[str, Any] = {AS_IS: _right(expected, test)}
    if run.from_scratch:
        result |= _by_batch(model, run, test)
    if unlabelled and run.is_counted_afterwards:
        result[AFTERWARDS] = _recalibrated(model, test, unlabelled)
    if run.seed == 0 and _is_finite(model):
        result["onnx"] = _exported(model, test, expected)
    return result


def _is_finite(model: nn.Module) -> bool:
    """Whether its training did not diverge."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@torch.no_grad()
def _by_batch(model: nn.Module, run: Run, test: Images) -> dict[str, float]:
    """In training mode, each microbatch by itself, and in evaluation mode; no statistics are moved."""
    state = copy.deepcopy(model.state_dict())
    sampler = Sampler(test.labels, run.microbatch, run.labels, run.seed)
    right: dict[str, list[Tensor]] = {"test_by_batch": [], "test_of_drawn": []}
    for _ in range(len(test) // run.batch):
        images, labels = test.at(sampler.step(run.batch))
        for name, found in right.items():
            found.append(model.train(name == "test_by_batch")(images).argmax(1) == labels)
        model.load_state_dict(state)
    return {name: float(torch.cat(found).float().mean()) for name, found in right.items()}


def _recalibrated(model: nn.Module, test: Images, unlabelled: list[Tensor]) -> float:
    plain = for_deployment(model)
    with contextlib.suppress(InputError):  # training has diverged
        recalibrate(plain, unlabelled)
    return accuracy(plain, test)


def _exported(model: nn.Module, test: Images, expected: Tensor) -> dict[str, Any]:
    """How many test images the exported file puts where torch does, and why the others differ."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(for_deployment(model), (test.at(slice(2))[0],), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    chunks = [test.at(slice(start, start + CHUNK))[0].numpy() for start in range(0, len(test), CHUNK)]
    found = torch.tensor(np.concatenate([session.run(None, {name: chunk})[0] for chunk in chunks]))
    differ = (found.argmax(1) != expected.argmax(1)).nonzero().squeeze(1)
    best = expected[differ].topk(2).values
    ties = (best[:, 0] - best[:, 1]) <= FLOAT_NOISE * expected.abs().max()
    return {
        "images": len(test),
        "same": len(test) - len(differ),
        "ties": int(ties.sum()),
        "largest_difference": float((found - expected).abs().max()),
    }
