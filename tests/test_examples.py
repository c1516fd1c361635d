"""Each example runs, shortened, prints what it promises, and can be read in five minutes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@dataclass(frozen=True)
class Short:
    """A shortened run.

    Args:
        arguments: of the example.
        prints: regular expressions, each to be found in what it prints.
        needs: a module from the extra that it names.
        writes: the files that it leaves in the folder it runs in.
        processes: more than one go through torchrun.
    """

    arguments: tuple[str, ...]
    prints: tuple[str, ...]
    needs: str
    writes: tuple[str, ...] = ()
    processes: int = 1


ACCURACY = r"accuracy in evaluation mode: \d+\.\d%"
RUNS = {
    "01_finetune.py": Short(
        ("--steps", "2", "--output", "digits.onnx"),
        (
            "49 sites converted, 0 skipped",
            r"largest difference at step 0: 0\.0, identical: True",
            ACCURACY,
            "parity passed",
        ),
        needs="efficientnet_lite_pytorch",
        writes=("digits.onnx",),
    ),
    "02_from_scratch.py": Short(
        ("--steps", "16"),
        (
            "limits: the running statistics of 4 of 4 layers are those they were made with",
            r"step 16: r_max 3\.00, d_max 5\.00",
            r"accuracy in evaluation mode, statistics as trained: \d",
            r"accuracy in evaluation mode, statistics recalibrated: \d",
        ),
        needs="sklearn.datasets",
    ),
    "03_metric_learning.py": Short(
        ("--steps", "150"),
        (
            r"BatchNorm: recall at 1 \d+\.\d%, training and evaluation are 0\.[5-9]\d apart",
            "diagnose says renormify: ",
            r"Batch Renorm: recall at 1 \d+\.\d%, training and evaluation are 0\.[0-3]\d apart",
        ),
        needs="sklearn.datasets",
    ),
    "04_unet_one_volume.py": Short(
        ("--steps", "1", "--held-out", "1", "--size", "4", "16", "16"),
        (
            r"before: Dice [01]\.\d+ in training mode, [01]\.\d+ in evaluation mode",
            r"BatchNorm: Dice [01]\.\d+ in training mode, [01]\.\d+ in evaluation mode",
            r"Batch Renorm: Dice [01]\.\d+ in training mode, [01]\.\d+ in evaluation mode",
        ),
        needs="plateseg",
    ),
    "05_two_processes.py": Short(
        ("--steps", "20"),
        (
            "process 0 of 2: same state as the first: True",
            "process 1 of 2: same state as the first: True",
            ACCURACY,
        ),
        needs="sklearn.datasets",
        processes=2,
    ),
    "06_crossq.py": Short(
        ("--steps", "200", "--episodes", "1"),
        (
            r"before training: -\d+",
            r"sb3-contrib's layer, after 200 steps: -\d+",
            r"renormify's layer, after 200 steps: -\d+",
        ),
        needs="sb3_contrib",
    ),
    "07_lightning.py": Short(
        ("--epochs", "2", "--output", "digits.onnx"),
        (
            r"logged by step 350: r_max \d\.\d\d, d_max \d\.\d\d, r clipped \d",
            r"logged by step 700: r_max 3\.00, d_max 5\.00",
            ACCURACY,
            r"digits\.onnx: [\d,]+ bytes, confirmed by onnxruntime",
        ),
        needs="lightning.pytorch",
        writes=("digits.onnx",),
    ),
    "08_transformers.py": Short(
        ("--steps", "12", "--output", "digits.onnx"),
        (
            r"step 12: r_max 3\.00, d_max 5\.00",
            ACCURACY,
            r"digits\.onnx: [\d,]+ bytes, confirmed by onnxruntime",
        ),
        needs="transformers",
        writes=("digits.onnx",),
    ),
}


def test_every_example_is_tested():
    assert sorted(RUNS) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    run, torchrun = RUNS[name], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher = [*torchrun, str(run.processes)] if run.processes > 1 else []
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / name), *run.arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    for expected in run.prints:
        assert re.search(expected, result.stdout), f"{expected!r} is not in:\n{result.stdout}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(run.writes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_can_be_read_in_five_minutes(name):
    text = (ROOT / "examples" / name).read_text()
    assert len(text.splitlines()) <= 100
    docstring = text.split('"""')[1]
    assert f"examples/{name}" in docstring, "it says how it is run"
    assert re.search(r"\bprints\b", docstring, re.IGNORECASE), "it says what it prints"


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_its_extra_the_command_is_named(name, monkeypatch):
    """In one line, and the same as in the docstring."""
    example = ROOT / "examples" / name
    monkeypatch.setitem(sys.modules, RUNS[name].needs, None)
    monkeypatch.setattr(sys, "argv", [str(example)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(example), run_name="__main__")
    (command,) = re.findall(r"pip install .+", stopped.value.code)
    assert command in example.read_text().split('"""')[1]
