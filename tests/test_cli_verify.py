"""``renormify export`` and ``verify`` where more is asked for: kinds of input, own data, other runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from renormify.cli import app

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    model[1].running_var.uniform_(0.5, 2.0)
    return model
"""
NET = ("--model", "net_for_verify:build", "--input-shape", "1,3,8,8")


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "net_for_verify.py").write_text(FACTORY)
    return folder


@pytest.fixture(autouse=True)
def _on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[Path, dict[str, object]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        result = invoke("export", *NET, "-o", folder / "net.onnx", "--thorough", "--json")
    return folder / "net.onnx", json.loads(result.stdout)


def test_a_thorough_export_compares_all_that_was_made(exported: tuple[Path, dict[str, object]]) -> None:
    path, document = exported
    parity = document["parity"]
    assert isinstance(parity, dict)
    assert parity["passed"] is True
    records = parity["outputs"]
    assert {record["variant"] for record in records} == {"", "converted model", "unfolded file"}
    assert {record["inputs"] for record in records} == {"example", "normal", "large", "zeros"}
    assert len(records) == 3 * 4 * (3 + 3 + 1)
    assert [layer["name"] for layer in parity["layers"]] == ["1", "2", "3", "4"]
    assert [file.name for file in path.parent.glob("*.onnx")] == ["net.onnx"]  # the unfolded one is gone


def test_a_long_comparison_lists_what_is_nearest_to_its_limit(exported: tuple[Path, object]) -> None:
    short = invoke("verify", exported[0], *NET, "--thorough").stdout
    assert "agrees with the model on 36 comparisons" in short
    assert "listed: the 12 that take the most of their tolerance" in short
    long = invoke("verify", exported[0], *NET, "--thorough", "--verbose").stdout
    assert "1 - cosine" in long
    assert "listed" not in long


def test_a_users_own_array(exported: tuple[Path, object], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(3, 2, (5, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x=rows)
    data = ("--data", tmp_path / "mine.npz", "--batch-sizes", "1,4", "--json")
    document = json.loads(invoke("verify", exported[0], *NET, *data).stdout)
    assert document["data"]["path"] == str(tmp_path / "mine.npz")
    records = document["parity"]["outputs"]
    assert [record["batch_size"] for record in records if record["inputs"] == "example"] == [1, 4]
    assert {record["inputs"] for record in records} == {"example", "normal", "large", "zeros"}
    invoke("verify", exported[0], *NET, "--data", tmp_path / "none.npz", code=2)


def test_another_runtime_and_an_unknown_one(exported: tuple[Path, object]) -> None:
    result = invoke("verify", exported[0], *NET, "--runtime", "openvino", "--json")
    assert {record["runtime"] for record in json.loads(result.stdout)["parity"]["outputs"]} == {"openvino"}
    result = invoke("verify", exported[0], *NET, "--runtime", "tensorrt", code=2)
    assert (
        "expected runtimes among onnxruntime, onnxruntime-basic, onnxruntime-off, openvino" in result.stderr
    )
    assert result.stderr.count("\n") == 1


def test_other_weights_are_told_with_the_layer(exported: tuple[Path, object], tmp_path: Path) -> None:
    import net_for_verify  # type: ignore[import-not-found]

    model: nn.Module = net_for_verify.build()
    with torch.no_grad():
        next(model[4].parameters())[0, 0] += 1e-3  # type: ignore[index]
    torch.save(model.state_dict(), tmp_path / "other.pth")
    result = invoke("verify", exported[0], tmp_path / "other.pth", *NET, code=1)
    assert "the first layer that diverges is 4" in result.stderr


def test_what_large_inputs_alone_show(exported: tuple[Path, object], tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    proto = onnx.load(exported[0])
    name = proto.graph.output[0].name
    last = next(node for node in proto.graph.node if name in node.output)
    last.output[:] = ["before"]
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(20.0), "limit"))
    proto.graph.node.append(helper.make_node("Clip", ["before", "", "limit"], [name]))
    onnx.save(proto, tmp_path / "clipped.onnx")
    result = invoke("verify", tmp_path / "clipped.onnx", *NET, "--json", code=1)
    records = json.loads(result.stdout)["parity"]["outputs"]
    assert {record["inputs"] for record in records if not record["passed"]} == {"large"}
