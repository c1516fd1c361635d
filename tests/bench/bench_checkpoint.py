"""How fast a large checkpoint is converted, beside copying it, and how much memory that takes.

    make bench-checkpoint GIGABYTES=4        # the disk must hold them three times

Each run is a process of its own. Time is counted after the imports; memory is the most that was resident,
with the libraries in it, and beside it without them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

SOURCE = "bench_checkpoint:network"
WIDTH = 1024
SHAPE = (1, WIDTH, 4, 4)


def network(layers: int) -> nn.Module:
    """A chain of convolutions and norms, 38 MB each."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))
            for _ in range(layers)
        )
    )


def _state(layers: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state = network(layers).state_dict()
    one = torch.randn(WIDTH, WIDTH, 3, 3) * 0.01  # the same in all: making values takes longer
    return {
        key: one.clone() if value.dim() == 4 else torch.ones(value.shape, dtype=value.dtype)
        for key, value in state.items()
    }


def _write(folder: Path, gigabytes: float) -> int:
    from safetensors.torch import save_file

    layers = max(4, round(gigabytes * 1e9 / (WIDTH * WIDTH * 9 * 4)))
    state = _state(layers)
    save_file(state, folder / "whole.safetensors")
    (folder / "shards").mkdir()
    keys, places = list(state), {}
    for index in range(4):
        name = f"model-{index + 1:05}-of-00004.safetensors"
        part = keys[index * len(keys) // 4 : (index + 1) * len(keys) // 4]
        save_file({key: state[key] for key in part}, folder / "shards" / name)
        places |= dict.fromkeys(part, name)
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return layers


def _peak() -> int:
    # Of this program alone: what getrusage() tells begins with the program that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _copy(source: Path, target: Path) -> float:
    """As a program copies that wants the copy to be there after a power cut, as a conversion does."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - started


def _run(source: Path, target: Path, layers: int, prove: bool) -> dict[str, float]:
    from renormify import commands
    from renormify.rewriting import renormify

    renormify(nn.Sequential(nn.BatchNorm2d(1)))  # all imports done
    imported = _peak()
    request = commands.Request(source, SOURCE, (SHAPE,), kwargs={"layers": layers})
    started = time.perf_counter()
    document = commands.convert_checkpoint(request, target, commands.Settings(), prove=prove)
    assert document["passed"]
    return {"seconds": time.perf_counter() - started, "peak": _peak(), "imports": imported}


def _child(source: Path, target: Path, layers: int, prove: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", str(source), str(target), str(layers), str(int(prove))]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    target.unlink()
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=4)
    options = parser.parse_args()
    if options.run:
        source, target, layers, prove = options.run
        print(json.dumps(_run(Path(source), Path(target), int(layers), bool(int(prove)))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = _write(folder, options.gigabytes)
        whole, shards, target = folder / "whole.safetensors", folder / "shards", folder / "out.safetensors"
        size = whole.stat().st_size
        largest = max(file.stat().st_size for file in shards.iterdir())
        print(f"{size / 1e9:.2f} GB in {layers} layers; the largest of 4 shards has {largest / 1e9:.2f} GB")
        copies, runs = [], []
        for _ in range(options.repeats):  # in turn, for the disk is not the same all the time
            copies.append(_copy(whole, target))
            target.unlink()
            runs.append(_child(whole, target, layers, prove=False))
        copy, fast = min(copies), min(runs, key=lambda run: run["seconds"])
        print(f"copying: {copy:.2f} s")
        print(
            f"converting without the proof: {fast['seconds']:.2f} s, {fast['seconds'] / copy:.2f}x of copying"
        )
        _tell("  one file", fast, size, "its size")
        _tell("  four shards", _child(shards, target, layers, prove=False), largest, "its largest shard")
        _tell("with the proof", _child(whole, target, layers, prove=True), size, "the model")


def _tell(what: str, run: dict[str, float], size: int, name: str) -> None:
    extra = run["peak"] - run["imports"]
    print(
        f"{what}: {run['seconds']:.2f} s, {run['peak'] / 1e9:.2f} GB resident, "
        f"{run['peak'] / size:.2f}x {name}; beyond the libraries {extra / 1e9:.2f} GB, {extra / size:.2f}x"
    )


if __name__ == "__main__":
    main()
