"""Many files at once, and what a command shows: progress, colours, little or nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import renormify
from renormify.checkpoints import load_checkpoint
from renormify.cli import app

MINE = """
import os
from torch import nn

def net(width=4):
    if os.path.exists("die"):
        os.kill(os.getpid(), 9)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
"""
NET = ("--model", "mine_for_folders:net", "--input-shape", "1,3,8,8")
PACKAGE = Path(renormify.__file__).parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    sys.modules.pop("mine_for_folders", None)
    Path("mine_for_folders.py").write_text(MINE)
    return tmp_path


def state(width=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.BatchNorm2d(width))
    return model.state_dict()


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_folder_is_converted_and_a_failed_file_stops_nothing(folder):
    Path("in/deep").mkdir(parents=True)
    torch.save(state(), "in/a.pth")
    save_file(state(), "in/deep/b.safetensors")
    Path("in/c.pth").write_text("no weights")
    Path("in/notes.txt").write_text("no checkpoint")
    result = invoke("convert", "in", *NET, "-o", "out", "--jobs", "2", code=1)
    lines = sorted(result.stdout.splitlines())
    assert [line.split()[:2] for line in lines] == [
        ["Files", "FAILED"],
        ["converted", "a.pth"],
        ["converted", "deep/b.safetensors"],
        ["failed", "c.pth:"],
    ]
    assert "in/c.pth is a text file" in lines[3]
    assert result.stderr == "renormify: error: 1 of 3 files failed, the others are done\n"
    for name in ("a", "deep/b"):
        assert torch.equal(load_file(f"out/{name}.safetensors")["0.weight"], state()["0.weight"])
    # What is done is not done again, and what was mended is.
    before = Path("out/a.safetensors").stat().st_mtime_ns
    torch.save(state(), "in/c.pth")
    document = json.loads(invoke("convert", "in", *NET, "-o", "out", "--json").stdout)
    assert {record["input"]: record["status"] for record in document["files"]} == {
        "a.pth": "done before",
        "deep/b.safetensors": "done before",
        "c.pth": "converted",
    }
    assert document["counts"] == {"done before": 2, "converted": 1}
    assert Path("out/a.safetensors").stat().st_mtime_ns == before


def test_what_is_there_but_not_done_is_not_replaced(folder):
    Path("in").mkdir()
    Path("out").mkdir()
    for name in ("a", "b", "c"):
        torch.save(state(), f"in/{name}.pth")
    save_file(state(), "out/a.safetensors")
    invoke("convert", "in/b.pth", *NET, "-o", "out/b.safetensors", "--r-max", "2")
    invoke("convert", "in/c.pth", *NET, "-o", "out/c.safetensors")
    os.utime("in/c.pth", (time.time() + 10,) * 2)
    result = invoke("convert", "in", *NET, "-o", "out", "--quiet", "--json", code=1)
    reasons = [record["reason"] for record in json.loads(result.stdout)["files"]]
    assert "is not from renormify" in reasons[0]
    assert "with other settings" in reasons[1]
    assert "older than its source" in reasons[2]


def test_a_process_that_is_killed_is_one_failed_file(folder):
    Path("in").mkdir()
    torch.save(state(), "in/a.pth")
    Path("die").touch()
    result = invoke("convert", "in", *NET, "-o", "out", code=1)
    assert "failed       a.pth: its process ended with -9" in result.stdout
    assert os.listdir("out") == []


def test_an_empty_folder_is_an_error(folder):
    Path("in").mkdir()
    assert "has no checkpoint in it" in invoke("convert", "in", *NET, "-o", "out", code=2).stderr
    assert "give -o a folder" in invoke("convert", "in", *NET, "-o", "out.pt", code=2).stderr
    assert "for one file" in invoke("convert", "in", *NET, "-o", "out", "--html", "a.html", code=2).stderr


def test_the_folder_itself_is_no_place_for_what_comes_out(folder):
    Path("in").mkdir()
    torch.save(state(), "in/a.pth")
    assert (
        "the folder of the checkpoints itself"
        in invoke("convert", "in", *NET, "-o", "./in/../in", code=2).stderr
    )
    assert os.listdir("in") == ["a.pth"]


def test_no_two_files_go_to_one_place(tmp_path):
    from renormify.folders import _pairs

    for name in ("a.pt", "a.pth", "model.safetensors", "model.safetensors.index.json", "b.bin"):
        (tmp_path / name).write_text("{}")
    targets = {source.name: target.name for source, target in _pairs(tmp_path, tmp_path / "out")}
    assert targets == {
        "a.pt": "a.pt.safetensors",
        "a.pth": "a.pth.safetensors",
        "b.bin": "b.safetensors",
        "model.safetensors": "model.safetensors.safetensors",
        "model.safetensors.index.json": "model.safetensors.index.json.safetensors",
    }


def test_keywords_go_to_the_factory_and_into_the_file(folder):
    torch.save(state(6), "a.pth")
    invoke("convert", "a.pth", *NET, "--kwargs", '{"width": 6}', "-o", "b.safetensors")
    assert load_checkpoint("b.safetensors").metadata["kwargs"] == {"width": 6}
    invoke("export", "b.safetensors", "--model", NET[1], "-o", "b.onnx", "--batch-sizes", "1")
    for given, words in (
        ("{", "is no JSON"),
        ("[1]", "expected a JSON object"),
        ('{"widht": 6}', "did you mean width?"),
    ):
        result = invoke("convert", "a.pth", *NET, "--kwargs", given, "-o", "c.pt", code=2)
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_zoo_model_with_keywords_is_exported_from_the_file_alone(folder):
    model = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.25)
    torch.save(model.state_dict(), "a.pth")
    given = ("--model", "torchvision:mobilenet_v2", "--kwargs", '{"num_classes": 7, "width_mult": 0.25}')
    invoke("convert", "a.pth", *given, "--input-shape", "1,3,32,32", "-o", "b.safetensors")
    assert "Parity ok" in invoke("export", "b.safetensors", "-o", "b.onnx", "--batch-sizes", "2").stdout


def test_a_model_of_transformers_goes_from_its_folder_to_a_file_that_needs_nothing_else(folder):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    model.save_pretrained("hf", max_shard_size="3KB")
    assert Path("hf/model.safetensors.index.json").is_file()
    shape = ("--input-shape", "1,3,32,32")
    invoke("convert", "--model", "transformers:hf", *shape, "-o", "b.safetensors")
    written = load_file("b.safetensors")
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())
    Path("hf/config.json").unlink()
    assert "Parity ok" in invoke("export", "b.safetensors", "-o", "b.onnx", "--batch-sizes", "2").stdout
    Path("hf/config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}}')
    refused = invoke("inspect", "--model", "transformers:hf", code=2)
    assert "no model of type 'mine'" in refused.stderr


def test_quiet_prints_nothing(folder):
    torch.save(state(), "a.pth")
    result = invoke("convert", "a.pth", *NET, "-o", "b.pt", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")
    assert invoke("convert", "a.pth", *NET, "-o", "b.pt", "-q", code=2).stderr.count("\n") == 1


def test_doctor_tells_versions_extras_and_devices():
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert document["extras"]["zoo"]["timm"]
    assert document["devices"][0].startswith("cpu, ")
    assert "torchvision" in invoke("doctor").stdout


def test_report_renders_a_result_again(folder):
    torch.save(state(), "a.pth")
    Path("r.json").write_text(invoke("convert", "a.pth", *NET, "-o", "b.pt", "--json").stdout)
    assert "1 converted, 0 skipped" in invoke("report", "r.json").stdout
    invoke("report", "r.json", "-o", "page.html")
    assert "1 converted, 0 skipped" in Path("page.html").read_text()
    for text in ("", "[]", "{}", '{"command": "x", "passed": 1, "report": 3}', "[" * 100_000):
        Path("bad.json").write_text(text)
        refused = invoke("report", "bad.json", code=2)
        assert "is not the result of a renormify command" in refused.stderr
        assert refused.stderr.count("\n") == 1


def terminal(*arguments, **environment):
    """What a command shows on a terminal of its own."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "renormify", *arguments],
        stdin=other,
        stdout=other,
        stderr=other,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment,
    )
    os.close(other)
    shown = b""
    try:
        while part := os.read(main, 65536):
            shown += part
    except OSError:  # how a terminal ends
        pass
    os.close(main)
    assert process.wait() == 0, shown
    return shown.decode()


def test_a_terminal_shows_progress_and_colours_unless_told_otherwise(folder):
    wide = 1500
    torch.save(state(wide), "a.pth")
    given = ("convert", "a.pth", *NET, "--kwargs", f'{{"width": {wide}}}', "--force", "-o", "b.safetensors")
    shown = terminal(*given)
    assert "Proving that the outputs are unchanged" in shown
    assert "Writing b.safetensors" in shown
    assert "\x1b[1m" in shown or "\x1b[32m" in shown
    plain = terminal(*given, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)
    assert terminal(*given, "--quiet") == ""
