"""The demonstration, shortened."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from renormify import demo
from renormify.checkpoints import load_checkpoint
from renormify.cli import app
from renormify.errors import MissingExtraError, OutputError


def test_demo_goes_the_whole_road(tmp_path: Path) -> None:
    output = tmp_path / "out"
    console = Console(file=io.StringIO(), width=200)
    returned = demo.run(output, console, steps=4)
    result = json.loads((output / "result.json").read_text())
    assert result["converted"] == 49
    assert result["skipped"] == 0
    assert result["max_abs_difference"] == 0
    assert result["batch_norm_nodes"] == 0
    assert result["parity_passed"] is True
    assert sorted({record["batch_size"] for record in result["parity"]["outputs"]}) == [1, 2, 7]
    assert result["fine_tuning"]["steps"] == [1, 2, 3, 4]
    assert returned["converted"] == 49
    printed = console.file.getvalue()
    for name in ("renorm.safetensors", "model.onnx", "report.html", "result.json"):
        assert (output / name).stat().st_size > 0
        assert str(output / name) in printed
    assert {file.name for file in tmp_path.rglob("*")} == {
        "out",
        "renorm.safetensors",
        "model.onnx",
        "report.html",
        "result.json",
    }
    # What was fine-tuned is what was written: ten classes now.
    assert load_checkpoint(output / "renorm.safetensors")["_fc.weight"].shape == (10, 1280)


def test_demo_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot make the folder"):
        demo.run(tmp_path / "file", Console(file=io.StringIO()))
    with pytest.raises(OutputError, match="cannot make the folder"):
        demo.run(tmp_path / "no" / "such", Console(file=io.StringIO()))
    assert (tmp_path / "file").read_text() == "kept"


def test_demo_takes_json_and_writes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("renorm.safetensors", "model.onnx", "report.html", "result.json")
    output = tmp_path / "out"
    output.mkdir()
    for name in names:
        (tmp_path / name).write_text("kept")
        (output / name).symlink_to(tmp_path / name)
    monkeypatch.setattr(demo, "run", partial(demo.run, steps=4))
    result = CliRunner().invoke(app, ["demo", "-o", str(output), "--json"])
    assert result.exit_code == 0, result.output
    assert result.stdout == (output / "result.json").read_text()
    assert json.loads(result.stdout)["parity_passed"] is True
    assert result.stderr == ""
    for name in names:
        assert (tmp_path / name).read_text() == "kept"
        assert not (output / name).is_symlink()


def test_demo_keeps_no_onnx_file_that_fails_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = demo.verify_onnx

    def faulty(*arguments: Any) -> Any:
        parity = genuine(*arguments)
        worse = dataclasses.replace(parity.outputs[0], passed=False, reason="made to fail")
        return dataclasses.replace(parity, outputs=(worse, *parity.outputs[1:]))

    monkeypatch.setattr(demo, "verify_onnx", faulty)
    monkeypatch.setattr(demo, "run", partial(demo.run, steps=4))
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path), "--json"])
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["parity_passed"] is False
    assert result.stderr.startswith("renormify: error: the ONNX file differs")
    assert result.stderr.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"renorm.safetensors", "report.html", "result.json"}


@pytest.mark.parametrize("name", ["renorm.safetensors", "model.onnx", "report.html", "result.json"])
def test_demo_looks_at_its_files_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(demo, "_fine_tune", lambda *_: pytest.fail("it trained"))
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        demo.run(tmp_path, Console(file=io.StringIO()), steps=4)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("package", ["sklearn.datasets", "efficientnet_lite_pytorch", "jinja2"])
def test_demo_names_the_extra_before_it_starts(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'renormify\[(demo|report)\]'"):
        demo.run(tmp_path / "out", Console(file=io.StringIO()), steps=4)
    assert not (tmp_path / "out").exists()
