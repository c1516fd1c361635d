"""Which sites are converted, by patterns on their names, from Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torchvision
from torch import nn
from typer.testing import CliRunner

from renormify import BatchRenorm2d, convert
from renormify.cli import app
from renormify.errors import InputError
from renormify.selection import Selection

RUN = CliRunner().invoke


def _model() -> nn.Module:
    return torchvision.models.resnet18()


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        ((), (), 20),
        (("layer4.*",), (), 5),
        (("layer4.*", "bn1"), (), 6),
        ((), ("*downsample*",), 17),
        (("layer?.0.*",), ("*.downsample.[0-9]",), 8),
    ],
)
def test_patterns_choose_by_name(include: tuple[str, ...], exclude: tuple[str, ...], converted: int) -> None:
    conversion = convert(_model(), filter_fn=Selection(include, exclude))
    layers = [name for name, m in conversion.model.named_modules() if isinstance(m, BatchRenorm2d)]
    assert len(layers) == converted
    assert sorted(layers) == sorted(conversion.report.converted)
    assert len(conversion.report.converted) + len(conversion.report.skipped) == 20


def test_report_says_which_pattern_left_a_site_out() -> None:
    reasons = {
        site.name: site.reason
        for site in convert(_model(), filter_fn=Selection(("layer*",), ("layer1.0.bn1",))).report.sites
    }
    assert reasons["bn1"] == "left out by --include 'layer*'"
    assert reasons["layer1.0.bn1"] == "left out by --exclude 'layer1.0.bn1'"
    assert reasons["layer1.0.bn2"] == ""


def test_pattern_that_matches_nothing_is_a_slip() -> None:
    names = ["stem.bn", "head.bn"]
    Selection(("stem.*",), ("head.*",)).check(names)
    with pytest.raises(InputError, match=r"--exclude 'haed\.\*' matches no .*'stem\.bn', 'head\.bn'"):
        Selection((), ("haed.*",)).check(names)
    with pytest.raises(InputError, match="--include 'tail'"):
        Selection(("tail",), ()).check(names)


def test_command_line_selects(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    model = ["--model", "torchvision:resnet18"]
    result = RUN(app, ["inspect", *model, "--exclude", "layer4.*", "--exclude", "bn1", "--json"])
    report = json.loads(result.stdout)["report"]
    assert (len(report["converted"]), len(report["skipped"])) == (14, 6)
    shape = ["--input-shape", "1,3,32,32"]
    result = RUN(app, ["convert", *model, "-o", str(out), *shape, "--include", "layer1.*", "--json"])
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["report"]["converted"]) == 4

    result = RUN(app, ["convert", *model, "-o", str(tmp_path / "no.pt"), *shape, "--exclude", "layr*"])
    assert result.exit_code == 2
    assert "--exclude 'layr*' matches no BatchNorm" in result.stderr
    result = RUN(app, ["convert", *model, "-o", str(tmp_path / "no.pt"), *shape, "--exclude", "*"])
    assert result.exit_code == 1  # nothing to convert
    assert not (tmp_path / "no.pt").exists()


def test_command_line_converts_frozen_layers_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "frozen_net.py").write_text(
        "from torch import nn\nfrom torchvision.ops import FrozenBatchNorm2d\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.BatchNorm2d(4))\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", "--model", "frozen_net:build", "--input-shape", "1,3,8,8", "--json"]
    result = RUN(app, [*arguments, "-o", "out.pt"])
    assert json.loads(result.stdout)["report"]["converted"] == ["2"]
    result = RUN(app, [*arguments, "-o", "thawed.pt", "--include-frozen"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["report"]["converted"] == ["1", "2"]
