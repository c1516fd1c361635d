"""How fast our ONNX files run beside those of torch's exporter, onnxsim and OnnxSlim.

Each network is exported once by each, and all its files run in one interleaved run: onnxruntime's default
session, two threads. onnxsim and OnnxSlim get the file of ``torch.onnx.export(optimize=True)``: given the one
of ``optimize=False`` they fold nothing. Run ``make bench-onnx``, or this file with ``--rounds N``,
``--only networks,leftovers,zoo``, ``--networks NAME,...`` and ``--json FILE``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from renormify.onnx import export_onnx, fold_onnx, verify_onnx

THREADS = 2
SESSIONS = 6
FORMS = ("bn", "affine", "conv")
#: The networks of the comparison, each with the share of the best peer's time that ours may take.
NETWORKS = {
    "resnet50": 1.02,
    "densenet121": 0.87,
    "mobilenet_v3_large": 1.02,
    "efficientnet_b0": 1.02,
    "inception_v3": 1.02,
    "timm:resnetv2_50": 1.02,
    "shufflenet_v2_x1_0": 1.02,
}
TARGET = 0.95
#: What else is folded and proven, without being timed.
ZOO = (
    *NETWORKS,
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "googlenet",
    "mnasnet0_5",
    "regnet_y_400mf",
    "timm:efficientnet_lite0",
    "timm:hrnet_w18_small",
    "timm:dla34",
    "timm:ghostnet_100",
    "timm:xception41",
)


def build(name: str) -> nn.Module:
    """A network with fresh weights; its norms get statistics as training leaves them."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        model = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    else:
        import torchvision

        extra = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def side(name: str) -> int:
    return 299 if name == "inception_v3" else 224


def write_files(name: str, folder: Path) -> dict[str, Path]:
    """Export a network by ours, by torch, and simplify torch's by onnxsim and OnnxSlim."""
    import onnxsim
    import onnxslim

    model, x = build(name), torch.randn(2, 3, side(name), side(name))
    files = {
        who: folder / f"{name.replace(':', '_')}.{who}.onnx"
        for who in ("ours", "torch", "onnxsim", "onnxslim")
    }
    export_onnx(model, x, files["ours"])
    program = torch.onnx.export(
        model,
        (x,),
        dynamo=True,
        optimize=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    assert program is not None
    program.save(files["torch"])
    simplified, proven = onnxsim.simplify(onnx.load(files["torch"]))
    assert proven
    onnx.save(simplified, files["onnxsim"])
    onnx.save(onnxslim.slim(onnx.load(files["torch"])), files["onnxslim"])
    return files


def session(model: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
    )


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, round by round; the first rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for round_ in range(rounds + 3):
        # Each is first in turn: who follows whom shows in the caches.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter()
            runs[name]()
            if round_ >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each run's seconds."""
    return {name: statistics.median(values) for name, values in interleaved(runs, rounds).items()}


def runner(model: Path | bytes, x: np.ndarray) -> Callable[[], object]:
    running = session(model)
    feed = {running.get_inputs()[0].name: x}
    return lambda: running.run(None, feed)


def load_seconds(file: Path) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        session(file)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Latency, size and load time of one network's files."""
    x = np.random.default_rng(0).normal(size=(1, 3, side(name), side(name))).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(name, Path(folder))
        # Where a session's weights come to lie moves its latency by up to a quarter: each file has several.
        times: dict[str, list[float]] = {who: [] for who in files}
        for _ in range(SESSIONS):
            runs = {who: runner(file, x) for who, file in files.items()}
            for who, values in interleaved(runs, math.ceil(rounds / SESSIONS)).items():
                times[who] += values
        seconds = {who: statistics.median(values) for who, values in times.items()}
        best = min(value for who, value in seconds.items() if who != "ours")
        least = {who: min(values) for who, values in times.items()}
        return {
            "network": name,
            "milliseconds": {who: value * 1e3 for who, value in seconds.items()},
            "ratio": seconds["ours"] / best,
            # On a machine with other work, the least of many tells more than the median.
            "ratio_of_minima": least["ours"] / min(value for who, value in least.items() if who != "ours"),
            "target": NETWORKS.get(name, 1.02),
            "megabytes": {who: size_of(file) / 1e6 for who, file in files.items()},
            "load_milliseconds": {who: load_seconds(file) * 1e3 for who, file in files.items()},
            "batch_norm_nodes": {who: batch_norms(file) for who, file in files.items()},
        }


def size_of(file: Path) -> int:
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def batch_norms(file: Path) -> int:
    model = onnx.load(file, load_external_data=False)
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def leftovers(rounds: int) -> list[dict[str, Any]]:
    """The forms of an affine that does not fold, before ReLU and Conv as in DenseNet, at several ranks."""
    shapes = (
        (1, 64, 3136),
        (1, 256, 196),
        (1, 64, 56, 56),
        (1, 256, 28, 28),
        (1, 1024, 7, 7),
        (1, 32, 8, 28, 28),
    )
    rows = []
    for shape in shapes:
        for activation in (True, False):
            model = pre_activation(shape, activation)
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            forms = {form: fold_onnx(model, leftover=form).model.SerializeToString() for form in FORMS}
            seconds = medians({form: runner(file, x) for form, file in forms.items()}, rounds)
            rows.append(
                {
                    "shape": shape,
                    "relu": activation,
                    "microseconds": {form: value * 1e6 for form, value in seconds.items()},
                }
            )
    return rows


def pre_activation(shape: tuple[int, ...], activation: bool, depth: int = 6) -> onnx.ModelProto:
    """Blocks of BatchNormalization, ReLU and a padded depthwise Conv, each added to what came before.

    The Conv is depthwise so that it does not cost so much that nothing else shows.
    """
    rng, channels, kernel = np.random.default_rng(0), shape[1], [3] * len(shape[2:])
    nodes, constants, last = [], {}, "x"
    for i in range(depth):
        parts = {f"{part}{i}": rng.uniform(0.5, 1.5, channels) for part in ("scale", "bias", "mean", "var")}
        constants |= parts | {f"w{i}": rng.normal(0, 0.1, (channels, 1, *kernel))}
        nodes.append(helper.make_node("BatchNormalization", [last, *parts], [f"n{i}"], name=f"n{i}"))
        source = f"n{i}"
        if activation:
            nodes.append(helper.make_node("Relu", [source], [f"r{i}"]))
            source = f"r{i}"
        pads = [1] * 2 * len(kernel)
        nodes.append(helper.make_node("Conv", [source, f"w{i}"], [f"c{i}"], pads=pads, group=channels))
        nodes.append(helper.make_node("Add", [last, f"c{i}"], [f"a{i}"]))
        last = f"a{i}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def zoo(names: Sequence[str]) -> list[dict[str, Any]]:
    """What folding leaves of each network, and whether its file is proven."""
    rows = []
    for name in track(names, "zoo", transient=True):
        model, x = build(name), torch.randn(2, 3, side(name), side(name))
        with tempfile.TemporaryDirectory() as folder:
            export = export_onnx(model, x, Path(folder) / "model.onnx")
            parity = verify_onnx(model, export.path, x, batch_sizes=(1, 2))
        assert export.fold is not None
        reasons = Counter(site.reason for site in export.fold.sites if site.action != "folded")
        rows.append(
            {
                "network": name,
                "actions": dict(Counter(site.action for site in export.fold.sites)),
                "batch_norm_nodes": export.fold.batch_norm_nodes,
                "reasons": dict(reasons),
                "passed": parity.passed,
            }
        )
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def verdict(value: float, target: float) -> str:
    return (
        f"{value:.3f} [{'green' if value <= target else 'red'}]{'<=' if value <= target else '>'} {target}[/]"
    )


def show_networks(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    peers = ("ours", "torch", "onnxsim", "onnxslim")
    table = Table(title="milliseconds, and ours over the best of the others")
    for header in ("network", *peers, "ratio", "of minima", "BN left", "MB", "load ms"):
        table.add_column(header)
    for row in rows:
        pairs = [
            " / ".join(f"{row[key][who]:.0f}" for who in peers)
            for key in ("batch_norm_nodes", "megabytes", "load_milliseconds")
        ]
        times = [f"{row['milliseconds'][who]:.2f}" for who in peers]
        table.add_row(
            row["network"],
            *times,
            verdict(row["ratio"], row["target"]),
            f"{row['ratio_of_minima']:.3f}",
            *pairs,
        )
    console.print(table)
    console.print(f"  geometric mean: {verdict(geometric_mean([row['ratio'] for row in rows]), TARGET)}")


def show_leftovers(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        title="what is left as BatchNormalization, as Mul and Add, as a depthwise Conv: microseconds"
    )
    for header in ("shape", "ReLU behind", *FORMS, "fastest"):
        table.add_column(header)
    for row in rows:
        times = row["microseconds"]
        table.add_row(
            "x".join(map(str, row["shape"])),
            "yes" if row["relu"] else "no",
            *(f"{times[form]:.0f}" for form in FORMS),
            min(times, key=times.__getitem__),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--only", default="networks,leftovers")
    parser.add_argument("--networks", help="comma-separated; torchvision's, or timm:NAME")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=None if Console().is_terminal else 160)
    chosen = options.only.split(",")
    named = options.networks.split(",") if options.networks else None
    results: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "threads": THREADS}
    console.print(f"onnxruntime {onnxruntime.__version__}, {THREADS} threads, medians of {options.rounds}")
    if "networks" in chosen:
        results["networks"] = [
            measure(name, options.rounds)
            for name in track(named or list(NETWORKS), "networks", transient=True)
        ]
        show_networks(console, results["networks"])
    if "leftovers" in chosen:
        results["leftovers"] = leftovers(options.rounds)
        show_leftovers(console, results["leftovers"])
    if "zoo" in chosen:
        results["zoo"] = zoo(named or ZOO)
        for row in results["zoo"]:
            console.print(f"  {row['network']}: {row['actions']}, {'proven' if row['passed'] else 'FAILED'}")
            for reason, count in row["reasons"].items():
                console.print(f"    {count} x {reason}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
