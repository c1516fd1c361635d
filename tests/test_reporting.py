"""One document, three renderings."""

from __future__ import annotations

import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from renormify.errors import MissingExtraError
from renormify.reporting import html_page, print_sections, sections, to_json


def site(name, action="converted", reason="", kind="BatchNorm2d"):
    return {"name": name, "kind": kind, "action": action, "reason": reason, "channels": 8}


def parity(passed=True, **fields):
    record = {
        "name": "logits", "batch_size": 2, "max_abs": 1.25e-6, "max_rel": 3e-7, "floor": 9e-7,
        "tolerance": 1e-5, "passed": passed, "reason": "" if passed else "off by [far]",
    }  # fmt: skip
    return {"passed": passed, "outputs": [record | fields], "first_divergence": None, "notes": ["a note"]}


DOCUMENT = {
    "command": "convert",
    "model": "torchvision:resnet18",
    "weights": Path("folder/<b>net</b>[red].pth"),
    "input_shape": ((1, 3, 64, 64),),
    "settings": {"r_max": 3.0, "momentum": "keep"},
    "report": {"sites": [site("bn1"), site("[bold]odd", "skipped", "has a <forward> of its own")]},
    "proof": {
        "identical": True, "max_abs_difference": 0.0, "outputs": 1, "values": 1000, "nan_values": 0,
        "deterministic": True, "reason": None,
    },
    "export": {
        "path": "m.onnx",
        "opset": 20,
        "fold": {"sites": [{"name": "bn1", "action": "folded", "into": "Conv", "reason": ""}]},
    },
    "parity": parity(),
}  # fmt: skip


def text_of(document, **options):
    console = Console(file=io.StringIO(), width=200, markup=False, highlight=False)
    print_sections(console, sections(document, **options))
    return console.file.getvalue()


def test_the_text_says_everything_and_eats_no_brackets():
    text = text_of(DOCUMENT)
    for part in (
        "torchvision:resnet18", "folder/<b>net</b>[red].pth", "1x3x64x64", "r_max: 3", "momentum: keep",
        "1 converted, 1 skipped", "[bold]odd", "has a <forward> of its own", "Proof ok", "1,000 values",
        "1 folded, 0 rewritten, 0 kept, opset 20", "Parity ok", "1.25e-06", "a note",
    ):  # fmt: skip
        assert part in text


def test_failures_are_said():
    failed = DOCUMENT | {
        "proof": DOCUMENT["proof"] | {"identical": False, "reason": "output differs by up to 1e-3"},
        "parity": parity(False, max_abs=None),
    }
    text = text_of(failed)
    assert "Proof FAILED output differs by up to 1e-3" in text
    assert "Parity FAILED 1 of 1 comparisons failed" in text
    assert "logits, batch 2: off by [far]" in text


def test_long_lists_are_summarised_unless_all_is_asked_for():
    sites = [site(f"layer{n}") for n in range(60)] + [site("odd", "skipped", "frozen")]
    document = {"report": {"sites": sites}}
    short = text_of(document)
    assert "60 converted, 1 skipped" in short
    assert "converted: 60 x BatchNorm2d" in short
    assert "odd" in short
    assert "frozen" in short
    assert "layer7" not in short
    assert all(f"layer{n}" in text_of(document, full=True) for n in range(60))


def test_many_skipped_sites_are_counted_by_reason():
    sites = [site(f"layer{n}", "skipped", "frozen" if n % 2 else "a subclass") for n in range(50)]
    text = text_of({"report": {"sites": sites}})
    assert "skipped: 25 x frozen" in text
    assert "skipped: 25 x a subclass" in text


def test_fresh_weights_are_said():
    assert "fresh weights" in text_of(DOCUMENT | {"weights": None})


def test_json_is_strict():
    text = to_json(DOCUMENT | {"odd": float("nan"), "far": [float("inf")]})

    def refuse(name):
        raise AssertionError(name)

    document = json.loads(text, parse_constant=refuse)
    assert document["odd"] is None
    assert document["far"] == [None]
    assert document["weights"] == "folder/<b>net</b>[red].pth"
    assert text_of(document) == text_of(DOCUMENT)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_needs_nothing_else():
    html = html_page(sections(DOCUMENT, full=True), title="A <title>")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.links == [f"#section{n}" for n in range(1, 6)]  # within the page
    assert page.tags.count("script") == 1  # the page's own, which sorts its tables
    assert "b" not in page.tags  # what the names hold is text
    assert not any(word in html for word in ("http", "@import", "url("))
    words = " ".join(" ".join(page.words).split())
    for part in ("A <title>", "folder/<b>net</b>[red].pth", "[bold]odd", "passed", "1 folded", "1.25e-06"):
        assert part in words
    assert page.tags.count("tr") == 3 + 2 + 2


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'renormify\[report\]'"):
        html_page(sections(DOCUMENT))


def test_the_picture_marks_layers_that_diverge_and_has_room_for_long_names():
    names = [f"encoder.layers.{n}.block.a_branch_with_a_very_long_name.normalisation" for n in range(3)]
    layers = [
        {"name": name, "position": n / 2, "max_rel": [1e-7, 1e-3, None][n], "floor": 1e-7, "passed": n == 0}
        for n, name in enumerate(names)
    ]
    html = html_page(sections({"parity": parity(False) | {"layers": layers}}))
    assert html.count('class="fault"') == 2
    assert f"<title>{names[2]} (diverges): not finite</title>" in html
    assert "encoder.layers.0.blo ... long_name.normalisation to encoder" in html
