"""The set-up commands make the environment that they need, also where a broken one is in its place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Stands for Python: asked for an environment, it makes one whose programs log how they are called.
FAKE = """#!/bin/sh
echo "python $*" >> log
[ "$2" = venv ] || exit 0
rm -rf .venv
mkdir -p .venv/bin
cp "$0" .venv/bin/python
printf '#!/bin/sh\\necho "renormify $*" >> log\\n' > .venv/bin/renormify
chmod +x .venv/bin/renormify
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


def make(folder, *arguments):
    result = subprocess.run(["make", "demo", *arguments], cwd=folder, capture_output=True, text=True)
    log = folder / "log"
    return result, log.read_text().splitlines() if log.exists() else []


def break_environment(folder):
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to("/no/such/python")


@pytest.mark.parametrize("state", ["none", "broken", "broken and stamped"])
def test_an_environment_is_made_where_none_works(folder, state):
    if state != "none":
        break_environment(folder)
    if state == "broken and stamped":
        (folder / ".venv" / ".demo-installed").touch()
    result, log = make(folder, "PYTHON=./fake")
    assert result.returncode == 0, result.stderr
    assert log[0] == "python -m venv --clear .venv"
    assert log[1].startswith("python -m pip install")
    assert log[-1] == "renormify demo --output demo-output"
    (folder / "log").unlink()
    result, log = make(folder, "PYTHON=./fake")
    assert result.returncode == 0, result.stderr
    assert not any("venv" in line or "pip" in line for line in log)  # all is there


@pytest.mark.parametrize("broken", [False, True])
def test_where_there_is_no_python_it_says_so(folder, broken):
    if broken:
        break_environment(folder)
    result, log = make(folder, "PYTHON=")
    assert result.returncode == 2
    assert result.stderr.startswith("no Python found: install 3.10 or newer, or name one: make PYTHON=")
    assert log == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["paper"]),
        (["QUICK=1"], ["paper", "--quick"]),
        (["REPEAT=1"], ["paper", "--repeat"]),
        (["QUICK=0", "REPEAT=0"], ["paper"]),
    ],
)
def test_the_study_and_the_cost_of_a_step_that_it_lacks(folder, arguments, expected):
    """Of the committed results nothing is lacking; a repetition measures the cost anew."""
    shutil.copytree(ROOT / "examples" / "paper", folder / "examples" / "paper")
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "paper", *arguments]
    result = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split(" -m ")[1].split() == expected
    measured = re.findall(r"--json (\S+)", result.stdout)
    assert measured == (["paper-repeat/bench.json"] if arguments == ["REPEAT=1"] else [])
    assert ("[bench]" in result.stdout) == bool(measured)
