"""The HTML page in a browser: Debian's Chromium, without a window. ``.ci/run`` installs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from renormify.onnx import export_onnx, verify_onnx
from renormify.reporting import html_page, sections

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium, and the page is tried in it"
)


def browse(page: Path, *options: str) -> str:
    """What a browser without a network makes of the page, and whether its scripts complain."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000"]
    if os.geteuid() == 0:  # Chromium refuses its sandbox to root
        command.append("--no-sandbox")
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, cwd=page.parent
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


class Dom(HTMLParser):
    """The tables and the sorted columns of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.sorted: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, Any]]) -> None:
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.sorted += [value for name, value in attributes if name == "aria-sort"]
        self.cell = tag in ("th", "td", "button")

    def handle_endtag(self, tag: str) -> None:
        self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(6)])
    x = torch.randn(2, 3, 8, 8)
    export = export_onnx(model, x, tmp_path_factory.mktemp("page") / "m.onnx")
    parity = verify_onnx(model, export.path, x, inputs=("example", "large", "zeros"), layers=True)
    assert parity.passed, parity
    return {"model": "six layers", "export": export.to_dict(), "parity": parity.to_dict()}


@pytest.fixture
def page(document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(html_page(sections(document, full=True)), encoding="utf-8")
    return path


def clicked(page: Path, header: str, times: int) -> tuple[list[str], list[str]]:
    """Click on the title of a column of the last table and return the column and what is marked as sorted."""
    click = (
        "<script>for (const button of [...document.querySelectorAll('th button')])"
        f"if (button.textContent === '{header}') for (let i = 0; i < {times}; i++) button.click()</script>"
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{click}</body>"), encoding="utf-8")
    dom = Dom(browse(page, "--dump-dom"))
    titles, *rows = dom.tables[-1]
    return [row[titles.index(header)] for row in rows], dom.sorted


def test_numbers_sort_by_size(page: Path) -> None:
    before = [row[6] for row in Dom(page.read_text(encoding="utf-8")).tables[-1][1:]]
    column, marked = clicked(page, "tolerance", 1)
    assert marked == ["ascending"]
    assert len(column) == 9
    assert [float(text) for text in column] == sorted(map(float, column))
    assert column != before


def test_a_second_click_turns_the_order(page: Path) -> None:
    column, marked = clicked(page, "max abs", 2)
    assert marked == ["descending"]
    assert [float(text) for text in column] == sorted(map(float, column), reverse=True)


def test_words_sort_by_the_alphabet(page: Path) -> None:
    column, _ = clicked(page, "inputs", 1)
    assert column == ["example"] * 3 + ["large"] * 3 + ["zeros"] * 3


def test_the_page_is_drawn(page: Path) -> None:
    from PIL import Image

    browse(page, "--screenshot=page.png", "--window-size=1000,1600", "--hide-scrollbars")
    with Image.open(page.parent / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (1600, 1000, 3)
    assert (pixels != pixels[0, 0]).any(2).mean() > 0.01  # there is text on it
    blue = (pixels[..., 2] > pixels[..., 0] + 60) & (pixels[..., 2] > pixels[..., 1] + 40)
    assert np.ptp(blue.nonzero()[1]) > 500  # the curve of the errors runs over the whole width


def test_the_picture_names_every_layer(page: Path, document: dict[str, Any]) -> None:
    text = browse(page, "--dump-dom")
    layers = document["parity"]["layers"]
    assert [layer["name"] for layer in layers[:3]] == ["0.0", "0.1", "1.0"]
    for layer in layers:
        assert re.search(rf"<title>{re.escape(layer['name'])}: \S+</title>", text)


def test_a_narrow_window_with_many_rows_and_long_names(tmp_path: Path) -> None:
    name = "encoder.layers.{}.residual_branch_with_a_long_name.depthwise_separable_convolution.norm"
    sites = [
        {
            "name": name.format(n),
            "kind": "BatchNorm2d",
            "channels": n,
            "action": "skipped",
            "reason": "w" * 90,
        }
        for n in range(500)
    ]
    path = tmp_path / "report.html"
    text = html_page(sections({"report": {"sites": sites}}, full=True))
    script = """<script>
      document.querySelectorAll("th button")[2].click(); document.querySelectorAll("th button")[2].click();
      const {scrollWidth, clientWidth} = document.documentElement, row = document.querySelector("tbody tr");
      document.title = [scrollWidth <= clientWidth, row.cells[2].textContent, row.offsetHeight < 200].join();
    </script></body>"""
    path.write_text(text.replace("</body>", script), encoding="utf-8")
    assert "<title>true,499,true</title>" in browse(path, "--dump-dom", "--window-size=500,900")
