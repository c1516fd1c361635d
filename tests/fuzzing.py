"""Mutated checkpoints: each loads or is refused in one line, and nothing is written or run on the way.

    make fuzz FILES=20000

A process of its own does the work and is measured, so that a crash of a reader in C is seen too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

MOST_MEMORY = 2**30
SOURCE = "fuzzing:network"


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def seeds() -> list[bytes]:
    """Sound checkpoints of each container."""
    torch.manual_seed(0)
    state = network().state_dict()
    said = {"model": "timm:resnet18", "input_shape": [[1, 3, 8, 8]], "kwargs": {}, "settings": {"r_max": 3.0}}
    found = [save(dict(state)), save(dict(state), metadata={"renormify": json.dumps(said)})]
    program = torch.export.export(network().eval(), (torch.randn(2, 3, 8, 8),))
    for value, options in (
        (state, {}),
        ({"state_dict": state, "epoch": 3, "renormify": said}, {}),
        ({"model": {"module." + key: value for key, value in state.items()}}, {}),
        ({"state_dict": state, "args": argparse.Namespace(lr=1), "best": np.float64(3.5)}, {}),
        (state, {"_use_new_zipfile_serialization": False}),
    ):
        file = io.BytesIO()
        torch.save(value, file, **options)
        found.append(file.getvalue())
    file = io.BytesIO()
    torch.export.save(program, file)
    return [*found, file.getvalue()]


def mutate(content: bytes, draws: random.Random) -> bytes:
    """A damaged variant: bytes, blocks and numbers changed, most of them where the structure is."""
    data = bytearray(content)
    for _ in range(draws.choice((1, 1, 2, 4, 16))):
        kind = draws.randrange(7)
        # Headers are at the start of safetensors and pickles, and at the end of zip archives.
        place = draws.choice((draws.randrange(len(data)), draws.randrange(min(600, len(data)))))
        place = draws.choice((place, len(data) - 1 - draws.randrange(min(900, len(data)))))
        if kind == 0:
            data[place] = draws.randrange(256)
        elif kind == 1:
            data[place] ^= 1 << draws.randrange(8)
        elif kind == 2:
            width = draws.choice((1, 2, 4, 8))
            number = draws.choice(
                (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, draws.getrandbits(64))
            )
            data[place : place + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 3:
            del data[place : place + draws.randint(1, 64)]
        elif kind == 4:
            start = draws.randrange(len(data))
            data[place:place] = data[start : start + draws.randint(1, 200)]
        elif kind == 5:
            digits = [index for index, byte in enumerate(data[:3000]) if 48 <= byte <= 57]
            if digits:
                data[draws.choice(digits)] = draws.choice(b"0123456789-eE.")
        else:
            del data[draws.randrange(len(data)) :]
        if not data:
            return b""
    return bytes(data)


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def work(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Runs the command on mutated files; fails at the first that is not met as it should be."""
    from typer.testing import CliRunner

    from renormify.cli import app

    warnings.simplefilter("ignore")
    draws, sound, codes = random.Random(seed), seeds(), {0: 0, 1: 0, 2: 0}
    path, out = folder / "in.ckpt", folder / "out.safetensors"
    runner, model = CliRunner(), ("--model", SOURCE, "--input-shape", "1,3,8,8")
    for number in range(count):
        content = mutate(draws.choice(sound), draws)
        path.write_bytes(content)
        arguments = draws.choice(
            (
                ["inspect", str(path)],
                ["inspect", str(path), *model],
                ["convert", str(path), *model, "-o", str(out)],
                ["convert", str(path), *model, "-o", str(out), "--no-proof"],
            )
        )
        result = runner.invoke(app, arguments)
        codes[result.exit_code] = codes.get(result.exit_code, 0) + 1
        said = result.stderr
        failed = result.exit_code not in (0, 1, 2) or "Traceback" in result.output
        failed |= result.exit_code == 2 and (said.count("\n") != 1 or len(said) > 2000)
        failed |= path.read_bytes() != content or peak() > MOST_MEMORY
        written = set(os.listdir(folder)) - {path.name}
        failed |= bool(written) != (result.exit_code == 0 and arguments[0] == "convert")
        if failed:
            kept = Path(tempfile.gettempdir()) / f"renormify-fuzz-{seed}-{number}"
            shutil.copy(path, kept)
            raise SystemExit(
                f"{arguments} on {kept}: {result.exit_code} {written} {peak():,}\n{result.output[-3000:]}"
            )
        out.unlink(missing_ok=True)
    return codes | {"peak": peak()}


def fuzz(count: int, seed: int) -> dict[str, int]:
    """The same in a process of its own.

    Raises:
        AssertionError: a file was not met as it should be, or the process crashed.
    """
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", folder, str(count), str(seed)]
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, (
            f"exit code {result.returncode}\n{result.stdout}\n{result.stderr[-4000:]}"
        )
        counts = json.loads(result.stdout.splitlines()[-1])
    return {str(key): int(value) for key, value in counts.items()}


def main() -> None:
    if sys.argv[1] == "--work":
        print(json.dumps(work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    total, done, started = int(sys.argv[1]), 0, time.monotonic()
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    while done < total:
        counts = fuzz(min(500, total - done), first + done)
        done += min(500, total - done)
        print(f"{done} files, {time.monotonic() - started:.0f} s: {counts}", flush=True)


if __name__ == "__main__":
    main()
