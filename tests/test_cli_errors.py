"""Bad input and bad usage: one clear line, the right exit code, nothing written, no input harmed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import renormify
from renormify.cli import app
from renormify.errors import one_line

PACKAGE = Path(renormify.__file__).parent.parent
MINE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))

def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def fails():
    raise RuntimeError("no [weights] here\\nsecond line")

def double():
    return net().double()

def half():
    return net().half()

def wrong():
    return {"a": 1}
"""


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("mine_for_errors", None)
    (folder / "mine_for_errors.py").write_text(MINE)
    torch.manual_seed(0)
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).state_dict()
    torch.save(state, "good.pth")
    save_file(state, "good.safetensors")
    for name in ("good.pth", "good.safetensors"):
        content = Path(name).read_bytes()
        Path(f"cut_{name}").write_bytes(content[: len(content) // 2])
    Path("text.pth").write_text("these are not weights\n")
    Path("empty.pth").touch()
    torch.save({"state_dict": state, "x": Payload(tmp_path / "executed")}, "evil.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), "whole.pth")
    torch.save(
        {"a.b": torch.ones(1), "c": torch.ones(2), "d": torch.ones(2), "e": torch.ones(2)}, "other.pth"
    )
    torch.save(state | {"3.weight": torch.ones(7, 144)}, "shape.pth")
    torch.save([1, 2], "list.pth")
    Path("exists.safetensors").write_text("somebody's")
    Path("a_folder").mkdir()
    Path("dangling.pth").symlink_to("nowhere")
    Path("text.onnx").write_text("this is no graph\n")
    yield folder
    assert not (tmp_path / "executed").exists()


def snapshot(folder):
    # Importing the factory leaves its bytecode; that is Python's, not ours.
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


NET = "--model mine_for_errors:net --input-shape 1,3,8,8"
OUT = "-o out.safetensors"

CASES = [
    # what is wrong, the command, the exit code, words of the message
    ("missing file", f"convert god.pth {NET} {OUT}", 2, "no such file: god.pth; did you mean good.pth"),
    ("folder", f"convert a_folder {NET} {OUT}", 2, "a_folder is a folder"),
    ("text", f"convert text.pth {NET} {OUT}", 2, "text.pth is a text file"),
    ("empty", f"convert empty.pth {NET} {OUT}", 2, "empty.pth is empty"),
    ("truncated zip", f"convert cut_good.pth {NET} {OUT}", 2, "damaged, truncated"),
    ("truncated safetensors", f"convert cut_good.safetensors {NET} {OUT}", 2, "damaged or truncated"),
    ("code", f"convert evil.pth {NET} {OUT}", 2, "would run code on loading (posix.system)"),
    ("whole model", f"convert whole.pth {NET} {OUT}", 2, "whole pickled model"),
    ("no state dict", f"convert list.pth {NET} {OUT}", 2, "holds no state dict"),
    ("keys", f"convert other.pth {NET} {OUT}", 2, "4 unexpected: a.b, c, d, ..."),
    ("missing keys", f"convert other.pth {NET} {OUT}", 2, "8 missing: 0.weight, 0.bias, 1.weight, ..."),
    ("shapes", f"convert shape.pth {NET} {OUT}", 2, "3.weight ((7, 144) in the file, (5, 144) in the model)"),
    ("model name", f"convert good.pth --model torchvision:resnt18 {OUT}", 2, "did you mean resnet18"),
    ("timm name", f"convert good.pth --model timm:resnt18 {OUT}", 2, "did you mean resnet18"),
    ("no source", f"convert good.pth --model resnet18 {OUT}", 2, "perhaps torchvision:resnet18"),
    ("transformers", f"convert good.pth --model transformers:x {OUT}", 2, "cannot read x/config.json"),
    ("unknown module", f"convert good.pth --model nope_nope:f {OUT}", 2, "no module 'nope_nope'"),
    (
        "factory fails",
        f"convert --model mine_for_errors:fails {OUT}",
        2,
        "RuntimeError: no [weights] here second",
    ),
    ("factory wrong", f"convert --model mine_for_errors:wrong {OUT}", 2, "returned dict"),
    ("no model", f"convert good.pth {OUT}", 2, "good.pth does not name its own"),
    ("no shape", f"convert good.pth --model mine_for_errors:net {OUT}", 2, "--input-shape 1,3,224,224"),
    (
        "wrong shape",
        f"convert good.pth --model mine_for_errors:net --input-shape 1,3,9,9 {OUT}",
        2,
        "(1, 3, 9, 9)",
    ),
    ("odd shape", f"convert good.pth --model mine_for_errors:net --input-shape 1,a {OUT}", 2, "'1,a'"),
    (
        "zero shape",
        f"convert good.pth --model mine_for_errors:net --input-shape 0,3 {OUT}",
        2,
        "positive whole",
    ),
    ("two files", f"convert good.pth --weights good.safetensors {NET} {OUT}", 2, "the same thing"),
    ("output exists", f"convert good.pth {NET} -o exists.safetensors", 2, "--force"),
    ("output is input", f"convert good.pth {NET} -o good.pth --force", 2, "the input itself"),
    ("output folder", f"convert good.pth {NET} -o no/such/out.pt", 2, "the folder no/such does not exist"),
    ("output is folder", f"convert good.pth {NET} -o a_folder --force", 2, "a_folder"),
    ("output suffix", f"convert good.pth {NET} -o out.bin", 2, ".safetensors, .pt, .pth"),
    ("r_max", f"convert good.pth {NET} {OUT} --r-max 0.5", 2, "r_max"),
    ("d_max", f"convert good.pth {NET} {OUT} --d-max -1", 2, "d_max"),
    ("momentum", f"convert good.pth {NET} {OUT} --momentum fast", 2, "keep"),
    ("momentum range", f"convert good.pth {NET} {OUT} --momentum 7", 2, "momentum"),
    ("stat", f"convert good.pth {NET} {OUT} --stat mean", 2, "sigma"),
    ("option", f"convert good.pth {NET} {OUT} --modle x", 2, "--modle"),
    ("no output", f"convert good.pth {NET}", 2, "--output"),
    ("command", "convrt", 2, "convrt"),
    (
        "nothing to convert",
        f"convert --model mine_for_errors:bare --input-shape 1,3,8,8 {OUT}",
        1,
        "BatchNorm",
    ),
    ("inspect nothing", "inspect", 2, "nothing to inspect"),
    ("inspect bare", "inspect --model mine_for_errors:bare", 1, "BatchNorm"),
    ("inspect text", "inspect text.pth", 2, "a text file"),
    ("export exists", f"export good.pth {NET} -o text.onnx", 2, "--force"),
    ("export folder", f"export good.pth {NET} -o no/out.onnx", 2, "does not exist"),
    ("export onto input", f"export good.pth {NET} -o good.pth --force", 2, "the input itself"),
    ("export sizes", f"export good.pth {NET} -o out.onnx --batch-sizes 1,x", 2, "--batch-sizes"),
    (
        "export shape",
        "export good.pth --model mine_for_errors:net --input-shape 1,3,9,9 -o o.onnx",
        2,
        "(1, 3, 9, 9)",
    ),
    ("verify missing", f"verify txt.onnx good.pth {NET}", 2, "did you mean text.onnx"),
    ("verify text", f"verify text.onnx good.pth {NET}", 2, "text.onnx"),
    ("verify shape", "verify text.onnx good.pth --model mine_for_errors:net --input-shape 1,9", 2, "(1, 9)"),
    ("html exists", f"convert good.pth {NET} {OUT} --html exists.safetensors", 2, "--force"),
    ("html is input", f"convert good.pth {NET} {OUT} --html good.pth --force", 2, "the input itself"),
    ("html is output", f"convert good.pth {NET} {OUT} --html ./out.safetensors", 2, "the output itself"),
    (
        "html is old output",
        f"convert good.pth {NET} -o exists.safetensors --force --html exists.safetensors",
        2,
        "the output itself",
    ),
    ("html is verified", f"verify text.onnx good.pth {NET} --html text.onnx", 2, "the input itself"),
    (
        "huge shape",
        f"convert --model mine_for_errors:net --input-shape 99999999999,3,8,8 {OUT}",
        2,
        "cannot make an input of shape (99999999999, 3, 8, 8)",
    ),
    (
        "overflowing shape",
        f"convert --model mine_for_errors:net --input-shape {10**23},3,8,8 {OUT}",
        2,
        "cannot make an input of shape",
    ),
    (
        "export double",
        "export --model mine_for_errors:double --input-shape 1,3,8,8 -o o.onnx",
        2,
        "the model has 0.weight in float64, and onnxruntime does not run convolutions in float64",
    ),
    (
        "half factory",
        f"convert good.pth --model mine_for_errors:half --input-shape 1,3,8,8 {OUT}",
        2,
        "0.weight is float32 in the file and float16 in the model",
    ),
    (
        "long name",
        f"convert good.pth {NET} -o {'x' * 300}.pt",
        2,
        "x.pt: File name too long",
    ),
    ("no such folder", "inspect --model transformers:nope", 2, "--model transformers:nope: cannot read"),
    ("a link", "inspect dangling.pth", 2, "dangling.pth is a link to nowhere, which does not exist"),
    ("html folder", f"convert good.pth {NET} {OUT} --html no/report.html", 2, "does not exist"),
]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(
    ("command", "code", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input_is_one_line_and_changes_nothing(folder, command, code, words, as_json):
    before = snapshot(folder)
    result = CliRunner().invoke(app, command.split() + (["--json"] if as_json else []))
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("renormify: error: ")
    assert words in result.stderr
    if as_json:
        document = json.loads(result.stdout)
        assert (document["passed"], document["exit_code"]) == (False, code)
        assert words in document["reason"]
        assert document["command"] in (command.split()[0], None)
    else:
        assert result.stdout == ""
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "arguments", [(), ("convrt",), ("convert", "--modle", "x"), ("fold",), ("report", "no.json")]
)
def test_usage_errors_are_a_document_too(arguments):
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    document = json.loads(result.stdout)
    assert document["command"] == (arguments[0] if arguments and arguments[0] != "convrt" else None)
    assert f"renormify: error: {document['reason']}\n" == result.stderr


def test_every_command_is_quiet_and_has_json():
    for name, command in typer.main.get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--quiet", "--json"} <= options, name


def test_what_a_file_says_cannot_steer_the_terminal(folder):
    said = {"model": "\x1b]0;title\x07\nname", "key\x1b[2J": "\x9b31m", "settings": {"a": "\x1b[31m"}}
    save_file({"a": torch.ones(2)}, "said.safetensors", metadata={"renormify": json.dumps(said)})
    shown = CliRunner().invoke(app, ["inspect", "said.safetensors"]).stdout
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "model: \\x1b]0;title\\x07\\nname\n" in shown
    assert json.loads(CliRunner().invoke(app, ["inspect", "said.safetensors", "--json"]).stdout)


def test_a_name_that_is_no_text_is_read_and_shown_escaped(folder):
    name = os.fsdecode(b"bad\xff.pth")
    torch.save(torch.load("good.pth", weights_only=True), "ok.pth")
    os.rename("ok.pth", name)
    for encoding in ("utf-8", "ascii"):
        result = run("inspect", name, PYTHONIOENCODING=encoding)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Checkpoint bad\\udcff.pth: ")
    os.rename("good.pth", "☃.pth")
    assert run("inspect", "☃.pth", PYTHONIOENCODING="latin-1").stdout.startswith("Checkpoint \\u2603.pth: ")


def test_a_file_name_cannot_steer_the_terminal(folder):
    result = CliRunner().invoke(app, ["inspect", "\x1b[31mred\nline.pth"])
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mred line.pth" in result.stderr


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "renormify", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(PACKAGE)} | environment,
    )


def test_a_real_process_refuses_in_one_line(folder):
    before = snapshot(folder)
    result = run("convert", "evil.pth", *NET.split(), "-o", "out.pt", COLUMNS="20")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "would run code" in result.stderr
    assert snapshot(folder) == before


def test_help_has_examples_and_costs_no_torch():
    code = (
        "import sys, renormify.cli\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    renormify.cli.app({}, prog_name='renormify')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {{'torch', 'numpy', 'onnx', 'onnxruntime', 'safetensors', 'torchvision', 'timm'}}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for command in ("", "inspect", "convert", "export", "verify", "demo", "doctor", "report"):
        result = subprocess.run(
            [sys.executable, "-c", code.format([*command.split(), "--help"])],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(PACKAGE)},
        )
        assert result.returncode == 0, result.stderr
        # The usage, and two examples.
        assert not command or len(re.findall(rf"renormify {command}\s", result.stdout)) >= 3


def test_the_command_alone_and_its_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"renormify {renormify.__version__}\n"
    alone = run()
    assert alone.returncode == 2
    assert all(command in alone.stdout for command in ("inspect", "convert", "export", "verify", "demo"))
    assert run("--help").returncode == 0


def test_one_line_of_an_error_is_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "ValueError: a b c"
    assert one_line(KeyError()) == "KeyError"
    assert one_line("a\nb") == "a b"
    assert one_line(ValueError("one two three"), 19) == "ValueError: one..."
    assert one_line("x" * 50, 10) == "xxxxxxx..."
    assert len(one_line(ValueError("word " * 1000))) <= 300
