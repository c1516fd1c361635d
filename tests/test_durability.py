"""Kills, full disks, mutated files: whole files or none, one line, no more memory than there should be."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fuzzing import fuzz
from safetensors.torch import load_file, save_file

import renormify

LAYERS = 12
MINE = f"""
from torch import nn

def net():
    blocks = []
    for _ in range({LAYERS}):
        blocks += [nn.Conv2d(256, 256, 3, padding=1), nn.BatchNorm2d(256)]
    return nn.Sequential(*blocks)
"""
ARGUMENTS = ("--model", "mine_for_kills:net", "--input-shape", "1,256,2,2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine_for_kills.py").write_text(MINE)
    namespace: dict[str, object] = {}
    exec(MINE, namespace)
    torch.save(namespace["net"]().state_dict(), "in.pth")
    return tmp_path


def environment(folder):
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(renormify.__file__).parent.parent)])
    }


def forked_conversion(output, delay):
    """Converts in a fork, which has all imported, and kills it so long after it began to write, if at all."""
    from renormify import commands

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        genuine = commands._write

        def write(*arguments):
            os.write(writing, b"w")
            return genuine(*arguments)

        commands._write = write
        request = commands.Request(Path("in.pth"), ARGUMENTS[1], ((1, 256, 2, 2),))
        try:
            commands.convert_checkpoint(request, output, commands.Settings(), force=True)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"w"
    os.close(reading)
    started = time.monotonic()
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.monotonic() - started


def test_twenty_kills_leave_whole_files_only(folder):
    torch.set_num_threads(1)
    state = torch.load("in.pth", weights_only=True)
    old = {"a": torch.ones(3)}
    output, draws, found = Path("out.safetensors"), random.Random(0), []
    save_file(old, output)
    codes, lengths = zip(*(forked_conversion(output, None) for _ in range(3)), strict=True)
    assert set(codes) == {0}
    for delay in (0.0, *(draws.uniform(0, min(lengths)) for _ in range(19))):
        save_file(old, "old.safetensors")
        os.replace("old.safetensors", output)
        forked_conversion(output, delay)
        held = load_file(output)  # refuses what is not whole
        found.append(set(held) == set(old))
        assert set(held) in ({"a"}, set(state))
        if not found[-1]:
            assert all(torch.equal(held[key], state[key]) for key in state)
    assert any(found), "no kill came in time"
    # What the killed ones left is cleared away by the next.
    assert forked_conversion(output, None)[0] == 0
    assert sorted(os.listdir()) == ["in.pth", "mine_for_kills.py", "out.safetensors"]


def test_the_staging_folder_of_another_that_lives_is_left_alone(tmp_path):
    from renormify.outputs import staged

    with staged(tmp_path / "a") as first:
        first.write_text("first")
        with staged(tmp_path / "a") as second:
            second.write_text("second")
        assert first.read_text() == "first"
        (tmp_path / "a").unlink()
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_is_full_is_one_line(folder):
    save_file({"a": torch.ones(3)}, "out.safetensors")
    before = Path("out.safetensors").read_bytes()
    limit = 2**20
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "renormify",
            "convert",
            "in.pth",
            *ARGUMENTS,
            "--force",
            "-o",
            "out.safetensors",
        ],
        capture_output=True,
        text=True,
        env=environment(folder) | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2
    assert result.stderr == "renormify: error: cannot write out.safetensors: File too large\n"
    assert Path("out.safetensors").read_bytes() == before
    assert sorted(os.listdir()) == ["in.pth", "mine_for_kills.py", "out.safetensors"]


def test_a_hundred_mutated_files():
    """``make fuzz`` does twenty thousand."""
    counts = fuzz(100, seed=0)
    assert counts["0"] + counts["2"] > 80
    assert counts["0"] > 0
    assert counts["2"] > 30


def test_a_shard_that_is_cut_while_it_is_read_is_noticed(tmp_path):
    from renormify.checkpoints import load_checkpoint, save_checkpoint
    from renormify.errors import OutputError

    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path / "model.safetensors", stream=True)
    state = {"a": torch.empty(1000, device="meta")}
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(OutputError, match="became shorter"):
        save_checkpoint(tmp_path / "b.safetensors", state, source=checkpoint)
    assert os.listdir(tmp_path) == ["model.safetensors"]
