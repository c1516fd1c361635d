"""What a command leaves on stdout, on stderr and in the folder, whatever goes on inside it or around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import renormify
from renormify.checkpoints import load_checkpoint
from renormify.cli import app

MINE = """
import os, signal, sys
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def parallel():
    return nn.DataParallel(net())

class Own(nn.BatchNorm2d):
    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)

def skipped():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Own(4), Own(4))

def talks():
    print("python talks")
    os.system("echo a program talks")
    return net()

def goes():
    os.chdir("/")
    return net()

def double():
    return net().double()

def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    return net()

def ended():
    os.kill(os.getpid(), signal.SIGTERM)
    return net()

def diverges():
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    return model
"""
SHAPE = ("--input-shape", "1,3,8,8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine_for_sessions", None)
    Path("mine_for_sessions.py").write_text(MINE)
    return tmp_path


def written(folder):
    return sorted(
        file.name for file in folder.iterdir() if file.suffix != ".py" and file.name != "__pycache__"
    )


def source(factory):
    return "--model", f"mine_for_sessions:{factory}"


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def process(*arguments, shell=None):
    """The command in a process of its own; ``shell`` is what follows it there."""
    command = [sys.executable, "-c", "import renormify.cli; renormify.cli.main()", *arguments]
    if shell is not None:
        command = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(renormify.__file__).parent.parent)},
        # A shell lets its background jobs ignore the interrupt; what is tested is one in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def state():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


PREFIXED = {
    "dict": lambda state, path: torch.save(dict(state), path),
    "OrderedDict": lambda state, path: torch.save(OrderedDict(state), path),
    "nested": lambda state, path: torch.save({"state_dict": dict(state)}, path),
    "nested OrderedDict": lambda state, path: torch.save({"model": OrderedDict(state)}, path),
    "safetensors": lambda state, path: save_file(dict(state), path),
}


@pytest.mark.parametrize("kind", PREFIXED)
def test_a_module_prefix_goes_through_convert_and_inspect(folder, kind):
    PREFIXED[kind]({f"module.{key}": value for key, value in state().items()}, "in.ckpt")
    document = json.loads(invoke("inspect", "in.ckpt", *source("net"), "--json").stdout)
    assert document["checkpoint"]["norms"] == 1
    assert document["report"]["converted"] == ["1"]
    invoke("convert", "in.ckpt", *source("net"), *SHAPE, "-o", "out.safetensors")
    assert {key: value.tolist() for key, value in load_file("out.safetensors").items()} == {
        key: value.tolist() for key, value in state().items()
    }


def test_convert_reads_back_what_it_wrote_of_a_parallel_model(folder):
    save_file(
        {key: value.half() if value.is_floating_point() else value for key, value in state().items()}, "a"
    )
    invoke("convert", "a", *source("parallel"), *SHAPE, "-o", "b.safetensors")
    invoke("convert", "b.safetensors", *source("parallel"), "-o", "c.safetensors")
    first, second = load_file("b.safetensors"), load_file("c.safetensors")
    assert set(first) == set(second) == {f"module.{key}" for key in state()}
    assert all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )
    assert first["module.0.weight"].dtype == torch.float16


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_where_all_are_skipped_each_site_is_listed_with_its_reason(folder, command):
    output = ("-o", "out.pt", *SHAPE) if command == "convert" else ()
    result = invoke(command, *source("skipped"), *output, "--json", code=1)
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert [site["name"] for site in document["report"]["sites"]] == ["1", "2"]
    assert all("forward of its own" in site["reason"] for site in document["report"]["sites"])
    assert result.stderr.startswith(
        "renormify: error: found no BatchNorm to convert in Sequential: 2 skipped"
    )
    assert result.stderr.count("\n") == 1
    assert command == "inspect" or document["output"] is None
    text = invoke(command, *source("skipped"), *output, code=1).stdout
    assert "0 converted, 2 skipped" in text
    assert "forward of its own" in text
    assert written(folder) == []


def test_infinite_limits_are_written_and_read_back(folder):
    limits = ("--r-max", "inf", "--d-max", "inf")
    for name in ("a.safetensors", "a.pt"):
        result = invoke("convert", *source("net"), *SHAPE, *limits, "-o", name, "--json")
        settings = json.loads(result.stdout)["settings"]
        assert settings == load_checkpoint(name).metadata["settings"]
        assert float(settings["r_max"]) == float(settings["d_max"]) == float("inf")
        assert "inf" in invoke("inspect", name).stdout


def test_a_file_that_is_not_the_model_says_why(folder):
    result = invoke("export", *source("diverges"), *SHAPE, "-o", "a.onnx", "--batch-sizes", "1", code=1)
    assert "own output is" in result.stderr
    assert result.stderr.count("\n") == 1
    assert written(folder) == []


def test_a_factory_cannot_move_the_output(folder):
    invoke("convert", *source("goes"), *SHAPE, "-o", "out.pt")
    assert written(folder) == ["out.pt"]


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_stdout_is_the_document_alone_whoever_talks(folder, command):
    output = ("-o", "out.pt", *SHAPE) if command == "convert" else ()
    result = process(command, *source("talks"), *output, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["command"] == command
    assert sorted(result.stderr.splitlines()) == ["a program talks", "python talks"]


@pytest.mark.parametrize(
    ("factory", "code", "said"),
    [("interrupted", 130, "renormify: error: interrupted; nothing was written\n"), ("ended", 143, "")],
)
def test_signals_inside_a_factory(folder, factory, code, said):
    result = process("convert", *source(factory), *SHAPE, "-o", "out.pt")
    assert (result.returncode, result.stdout, result.stderr) == (code, "", said)
    assert written(folder) == []


def test_ctrl_c_while_it_writes(folder, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("renormify.writers.torch.save", interrupt)
    result = invoke("convert", *source("net"), *SHAPE, "-o", "out.pt", code=130)
    assert result.stderr == "renormify: error: interrupted; nothing was written\n"
    assert written(folder) == []


@pytest.mark.parametrize("extra", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 2, "renormify: error: OSError: [Errno 28] No space left on device\n"),
        ("| true", 141, ""),
    ],
)
def test_a_stdout_that_takes_nothing(folder, shell, code, said, extra):
    result = process("convert", *source("net"), *SHAPE, "-o", "out.pt", *extra, shell=shell)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", said)
    assert load_checkpoint("out.pt").metadata["proof"]["identical"] is True
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
