"""What a Batch Renorm layer costs beside native BatchNorm and the layers of others.

Every figure is a ratio of medians, taken in one interleaved run, with its target beside it. Run
``make bench``, or this file with ``--rounds N``, ``--only layers,models,compile,memory`` and ``--json FILE``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from renormify import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, renormify

SHAPES = (
    (32, 64, 56, 56),
    (4, 256, 56, 56),
    (2, 64, 112, 112),
    (32, 512, 7, 7),
    (4, 2048, 7, 7),
    (2, 32, 16, 64, 64),
    (8, 64, 4096),
    (256, 1024),
    (16, 256),
)
MILLION = 1_000_000
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
RENORMS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}

Run = Callable[[], object]


class Floor(nn.BatchNorm2d):
    """BatchNorm's three kernels in a custom Function, without any renorm mathematics.

    What pure PyTorch cannot go below, whatever the layer computes.
    """

    class Kernels(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, running: Sequence[Tensor]
        ) -> Tensor:
            mean, var = torch.batch_norm_update_stats(input, *running, 0.1)
            ctx.save_for_backward(input, weight, mean, (var + 1e-5).rsqrt_())
            return torch.native_batch_norm(input, weight, bias, mean, var, False, 0.0, 1e-5)[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            input, weight, mean, invstd = ctx.saved_tensors
            back = torch.ops.aten.native_batch_norm_backward.default
            return *back(grad, input, weight, None, None, mean, invstd, True, 1e-5, [True] * 3), None

    def forward(self, input: Tensor) -> Tensor:
        return self.Kernels.apply(input, self.weight, self.bias, (self.running_mean, self.running_var))


def peers(channels: int, dims: int) -> dict[str, nn.Module]:
    """The layers of others that take this many dimensions, past their warm-up."""
    from avalanche.models.batch_renorm import BatchRenorm2D
    from sb3_contrib.common.torch_layers import BatchRenorm1d as StableBaselines
    from torchrl.modules import BatchRenorm1d as TorchRL

    if dims == 4:
        return {"Avalanche": BatchRenorm2D(channels, r_max=3.0, d_max=5.0)}
    if dims == 2:
        return {
            "torchrl": TorchRL(channels, warmup_steps=1),
            "sb3": StableBaselines(channels, warmup_steps=1),
        }
    return {}


def medians(runs: dict[str, Run], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Seconds of each run, interleaved round by round; the first rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            if round_ >= 3:
                times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def ratios(runs: dict[str, Run], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Each run's median over that of the first."""
    times = medians(runs, rounds, repeats)
    base = next(iter(times.values()))
    return {name: value / base for name, value in times.items()}


def training(layer: nn.Module, x: Tensor, grad: Tensor) -> Run:
    def run() -> None:
        x.grad = None
        output = layer(x)
        output.backward(grad)

    return run


def evaluation(layer: nn.Module, x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> None:
        layer(x)

    return run


def layers(rounds: int, compiled: bool = False) -> list[dict[str, Any]]:
    """Forward + backward and evaluation of each shape, layout and dtype."""
    cases = [
        (dtype, shape, layout)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
        for layout in ("contiguous", "channels_last")
        if layout == "contiguous" or len(shape) in CHANNELS_LAST
    ]
    rows = []
    for dtype, shape, layout in track(cases, "compiled layers" if compiled else "layers", transient=True):
        dims, channels = len(shape), shape[1]
        x = torch.randn(shape, dtype=dtype)
        x = x if layout == "contiguous" else x.to(memory_format=CHANNELS_LAST[dims])
        x.requires_grad_()
        grad = torch.randn_like(x)
        subjects: dict[str, nn.Module] = {"BatchNorm": NORMS[dims](channels), "ours": RENORMS[dims](channels)}
        if compiled:
            torch.compiler.reset()
            subjects = {name: torch.compile(layer, fullgraph=True) for name, layer in subjects.items()}
        else:
            subjects |= {"floor": Floor(channels)}
            subjects |= peers(channels, dims) if dtype == torch.float32 else {}
        repeats = max(1, 300_000 // x.numel())
        row: dict[str, Any] = {"dtype": str(dtype)[6:], "shape": shape, "layout": layout, "numel": x.numel()}
        row["train"] = ratios(
            {name: training(layer, x, grad) for name, layer in subjects.items()}, rounds, repeats
        )
        if not compiled:
            for layer in subjects.values():
                layer.eval()
            pair = {name: evaluation(subjects[name], x) for name in ("BatchNorm", "ours")}
            row["eval"] = ratios(pair, rounds, repeats)["ours"]
        rows.append(row)
    return rows


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def models(rounds: int) -> list[dict[str, Any]]:
    """A whole training step of three networks, at batch 4 and 128 pixels."""
    import torchvision

    rows = []
    for name in ("resnet50", "mobilenet_v2", "densenet121"):
        original = torchvision.models.get_model(name, weights=None)
        x, labels = torch.randn(4, 3, 128, 128), torch.randint(1000, (4,))
        runs = {}
        for label, model in (("BatchNorm", original), ("ours", renormify(original))):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

            runs[label] = partial(step, model, optimizer, x, labels)
        rows.append({"model": name, "ratio": ratios(runs, rounds)["ours"]})
    return rows


def memory() -> list[dict[str, Any]]:
    """Bytes kept for backward, of one layer."""

    def kept(layer: nn.Module, x: Tensor) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layer(x)
        del output
        return sum(storages.values())

    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        norm, ours = (kept(kinds[len(shape)](shape[1]), x) for kinds in (NORMS, RENORMS))
        rows.append(
            {"shape": shape, "BatchNorm": norm, "ours": ours, "vectors": (ours - norm) / shape[1] / 4}
        )
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def verdict(value: float, target: float) -> str:
    return (
        f"{value:.2f} [{'green' if value <= target else 'red'}]{'<=' if value <= target else '>'} {target}[/]"
    )


def show_layers(console: Console, rows: list[dict[str, Any]], compiled: bool) -> None:
    columns = [] if compiled else ["floor", "Avalanche", "torchrl", "sb3"]
    table = Table(title="forward + backward over BatchNorm" + (", both compiled" if compiled else ""))
    for header in ("dtype", "shape", "layout", "ours", *columns, *([] if compiled else ["evaluation"])):
        table.add_column(header)
    for row in rows:
        target = 1.05 if compiled else 1.10 if row["numel"] >= MILLION else 1.5
        others = [f"{row['train'][name]:.2f}" if name in row["train"] else "" for name in columns]
        shape = "x".join(map(str, row["shape"]))
        last = [] if compiled else [verdict(row["eval"], 1.02)]
        table.add_row(
            row["dtype"], shape, row["layout"], verdict(row["train"]["ours"], target), *others, *last
        )
    console.print(table)
    for dtype in ("float32", "bfloat16"):
        for large in (True, False):
            chosen = [r for r in rows if r["dtype"] == dtype and (r["numel"] >= MILLION) == large]
            mean = geometric_mean([r["train"]["ours"] for r in chosen])
            size = "a million elements and more" if large else "smaller inputs"
            target = 1.05 if compiled else 1.0 if large else 1.5
            console.print(f"  geometric mean, {dtype}, {size}: {verdict(mean, target)}")
    if not compiled:
        mean = geometric_mean([row["eval"] for row in rows])
        console.print(f"  geometric mean, evaluation: {verdict(mean, 1.02)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="layers,models,compile,memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=None if Console().is_terminal else 140)
    chosen = options.only.split(",")
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    console.print(f"torch {results['torch']}, {results['machine']}, medians of {options.rounds}")
    if "layers" in chosen:
        results["layers"] = layers(options.rounds)
        show_layers(console, results["layers"], compiled=False)
    if "models" in chosen:
        results["models"] = models(options.rounds)
        for row in results["models"]:
            console.print(f"  training step, {row['model']}: {verdict(row['ratio'], 1.03)}")
    if "compile" in chosen:
        results["compile"] = layers(options.rounds, compiled=True)
        show_layers(console, results["compile"], compiled=True)
    if "memory" in chosen:
        results["memory"] = memory()
        for row in results["memory"]:
            console.print(
                f"  kept for backward, {row['shape']}: {row['ours']:,} bytes, "
                f"BatchNorm {row['BatchNorm']:,}, {row['vectors']:g} vectors of (C) more"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
