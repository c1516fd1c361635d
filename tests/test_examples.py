"""Each example runs, shortened, and is short enough to be read. The first is run beside the demonstration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    example = EXAMPLES / name
    assert len(example.read_text().splitlines()) < 80
    result = subprocess.run(
        [sys.executable, example, *arguments], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_from_scratch(tmp_path):
    output = run("02_from_scratch.py", tmp_path, "--steps", "16")
    assert "limits: the running statistics of 4 of 4 layers are those they were made with" in output
    assert "step 16: r_max 3.00, d_max 5.00" in output
    assert output.count("accuracy in evaluation mode") == 2
    assert list(tmp_path.iterdir()) == []
