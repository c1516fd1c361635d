"""Where models come from, and what is said when they do not."""

from __future__ import annotations

import builtins
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from renormify.errors import MissingExtraError, ModelSourceError
from renormify.sources import build_model, input_shapes, names_code, nearest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model source reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def refusal(source):
    with pytest.raises(ModelSourceError) as caught:
        build_model(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("torchvision:mobilenet_v2", (1, 3, 224, 224)),
        ("torchvision:r3d_18", (1, 3, 16, 112, 112)),
        ("torchvision:lraspp_mobilenet_v3_large", (1, 3, 520, 520)),
        ("timm:resnet10t", (1, 3, 176, 176)),
        ("timm:tf_efficientnet_lite0.in1k", (1, 3, 224, 224)),
    ],
)
def test_zoo_models_come_without_network_and_tell_their_shape(source, shape):
    model = build_model(source)
    assert isinstance(model, nn.Module)
    assert input_shapes(source, model) == (shape,)


def test_detection_models_fetch_no_backbone():
    source = "torchvision:ssdlite320_mobilenet_v3_large"
    assert input_shapes(source, build_model(source)) is None


@pytest.mark.parametrize(
    ("given", "there", "near"),
    [
        ("nofile.onnx", ["pFalse.onnx", "folded.onnx", "a.onnx"], ""),
        ("modle.onnx", ["Model.onnx", "folded.onnx"], "; did you mean Model.onnx?"),
        ("model.onx", ["model.onnx", "other.onx"], "; did you mean model.onnx?"),
        ("net.pt", ["net.safetensors", "net.pth"], "; did you mean net.pth, net.safetensors?"),
    ],
)
def test_near_files_are_near_before_their_suffix(given: str, there: list[str], near: str):
    assert nearest(given, there, files=True) == near


def test_unknown_models_suggest_near_ones():
    assert "did you mean mobilenet_v2" in refusal("torchvision:mobilnet_v2")
    assert "did you mean resnet18" in refusal("timm:resnt18")
    assert "no model 'hf-hub:a/b'" in refusal("timm:hf-hub:a/b")
    assert "expected a folder with the config.json" in refusal("transformers:some/dir")
    assert "torchvision:resnet18 or timm:resnet18" in refusal("resnet18")
    assert "did you mean torchvision" in refusal("torchvison:resnet18")
    grammar = "torchvision:NAME, timm:NAME, transformers:DIR or package.module:factory"
    for source in ("", ":", "a:", ":b", "no_such_module:f"):
        assert f"expected {grammar}" in refusal(source)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_zoo_says_what_to_install(monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'renormify\[zoo\]'"):
        build_model(f"{package}:resnet18")


FACTORIES = """
import sys
from torch import nn

class Net(nn.Module):
    @classmethod
    def build(cls):
        return cls()

ready = Net()
def good(): return Net()
def fails(): raise ValueError("line one [x]\\nline two")
def leaves(): sys.exit("bye")
def wrong(): return "a model"
def needy(size): return Net()
number = 3
"""


def test_factories_from_the_current_directory(folder):
    (folder / "zoo_of_mine.py").write_text(FACTORIES)
    for path in ("good", "Net", "Net.build", "ready"):
        assert type(build_model(f"zoo_of_mine:{path}")).__name__ == "Net"
    assert input_shapes("zoo_of_mine:good", build_model("zoo_of_mine:good")) is None
    assert "ValueError: line one [x] line two" in refusal("zoo_of_mine:fails")
    assert "SystemExit: bye" in refusal("zoo_of_mine:leaves")
    assert "returned str; expected a torch.nn.Module" in refusal("zoo_of_mine:wrong")
    assert "missing 1 required positional argument: 'size'" in refusal("zoo_of_mine:needy")
    assert "of type int" in refusal("zoo_of_mine:number")
    assert "has no 'goood'; did you mean good?" in refusal("zoo_of_mine:goood")
    assert "Net has no 'biuld'; did you mean build?" in refusal("zoo_of_mine:Net.biuld")
    assert "did you mean zoo_of_mine?" in refusal("zoo_of_mne:good")


def test_modules_that_cannot_be_imported_say_why(folder):
    (folder / "broken_a.py").write_text("1 / 0")
    (folder / "broken_b.py").write_text("import not_there_at_all")
    (folder / "broken_c.py").write_text("def f(:")
    assert "importing broken_a failed: ZeroDivisionError" in refusal("broken_a:f")
    assert "importing broken_b failed: no module 'not_there_at_all'" in refusal("broken_b:f")
    assert "importing broken_c failed: SyntaxError" in refusal("broken_c:f")


def test_a_factory_that_goes_elsewhere_comes_back(folder):
    (folder / "restless.py").write_text(
        "import os\nfrom torch import nn\n"
        "def build():\n    os.chdir('/')\n    return nn.Identity()\n"
        "def fails():\n    os.chdir('/')\n    raise ValueError('no')\n"
    )
    build_model("restless:build")
    assert Path.cwd() == folder
    refusal("restless:fails")
    assert Path.cwd() == folder


def test_the_current_directory_shadows_nothing_afterwards(folder):
    (folder / "shy.py").write_text(FACTORIES)
    before = list(sys.path)
    build_model("shy:good")
    assert sys.path[: len(before)] == before


def test_only_zoo_names_are_no_code():
    assert not names_code("torchvision:resnet18")
    assert not names_code("timm:resnet18")
    assert names_code("os:abort")
