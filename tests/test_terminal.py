"""What a real pseudo-terminal shows of a session, and the picture that was drawn of one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import terminal
import torch
from terminal import MIDST, Recording, draw, midst, record, screens

import renormify

WRITING = re.compile(r"Writing big\.safetensors +\S+ +\d+\.\d/\d+\.\d MiB +\d+\.\d MB/s +\d\d:\d\d")


# A disk on which a file of 150 MB takes a second or two, however fast this machine's is.
MINE = """
import time
from torch import nn
from renormify import writers

_write_all = writers._write_all

def _slowly(file, data):
    time.sleep(len(data) / 80e6)
    return _write_all(file, data)

writers._write_all = _slowly

def net(width=8):
    norms = [nn.BatchNorm2d(width) for _ in range(12)]
    return nn.Sequential(nn.Conv2d(width, width, 3), *norms)
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The conversion of a large file, and that of a folder, on a terminal of 100 columns."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "in").mkdir()
    (folder / "mine_on_terminals.py").write_text(MINE)
    namespace: dict[str, object] = {}
    exec(MINE, namespace)
    for name, width in (("in/a", 8), ("in/b", 8), ("big", 2048)):
        torch.save(namespace["net"](width).state_dict(), folder / f"{name}.pth")
    net = ("--model", "mine_on_terminals:net", "--input-shape", "1,8,8,8")
    wide = ("--kwargs", '{"width": 2048}', "--no-proof")
    commands = [
        ("convert", "big.pth", *net, *wide, "-o", "big.safetensors"),
        ("convert", "in", *net, "-o", "out"),
    ]
    before = os.getcwd()
    os.chdir(folder)
    try:
        path = str(Path(renormify.__file__).parent.parent)
        run = [[sys.executable, "-m", "renormify", *command] for command in commands]
        recording, codes = record(run, columns=100, rows=80, PYTHONPATH=path)
    finally:
        os.chdir(before)
    (folder / "big.pth").unlink()
    (folder / "big.safetensors").unlink()
    assert codes == [0, 0]
    return recording


def shown(recording):
    return ["\n".join(screen.display) for screen in screens(recording)]


def test_tables_are_within_the_width_and_complete(session):
    last = shown(session)[-1]
    assert re.search(r"^site +kind +channels +action +reason", last, re.MULTILINE)
    for name in range(1, 13):
        assert re.search(rf"^ *{name} +BatchNorm2d +2048 +converted *$", last, re.MULTILINE), name
    assert re.search(r"^Files ok 2 converted", last, re.MULTILINE)


def test_long_writing_shows_rate_and_time_left(session):
    found = [text for text in shown(session) if WRITING.search(text)]
    assert found
    assert not WRITING.search(shown(session)[-1])  # the bar is gone when the work is over


def test_work_without_a_measure_shows_the_time_taken(session):
    assert any(re.search(r"Building mine_on_terminals:net 0:00:0\d", text) for text in shown(session))


def test_folders_show_rate_and_time_left(session):
    found = "\n".join(midst(session).display)
    assert re.search(r"^converted +(a|b)\.pth -> out/\1\.safetensors, 12 sites in \d", found, re.MULTILINE)
    done, total, rate, minutes, seconds = MIDST.search(found).groups()
    assert (done, total) == ("1", "2")
    # Half is done, so that as much time is left as one file took.
    assert abs(60 / float(rate) - 60 * int(minutes) - int(seconds)) <= 1 + 0.1 * 60 / float(rate)
    assert not MIDST.search(shown(session)[-1])


def test_a_thinned_recording_ends_as_the_whole_does(session):
    thinned = session.thinned()
    assert len(thinned.events) <= len(session.events)
    assert shown(thinned)[-1] == shown(session)[-1]
    assert shown(Recording.from_cast(thinned.to_cast()))[-1] == shown(session)[-1]


def test_the_picture_is_what_its_recording_gives():
    recording = Recording.from_cast(terminal.CAST.read_text(encoding="utf-8"))
    screen = midst(recording)
    drawn = draw(screen)
    committed = terminal.PICTURE.read_text(encoding="utf-8")
    assert terminal.texts(committed) == terminal.texts(drawn), "make picture draws it anew"
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+|https://www\.textualize\.io", "", committed)
    said = "\n".join(screen.display)
    assert all(f"$ {command}" in said for command in terminal.SESSION)
    assert "Sites 52 converted, 0 skipped" in said
    assert "Proof ok" in said
    assert "Parity ok" in said
    done, total, rate, minutes, seconds = map(float, MIDST.search(said).groups())
    assert abs((total - done) * 60 / rate - 60 * minutes - seconds) < 3
