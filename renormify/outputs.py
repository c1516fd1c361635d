"""Writing files so that an interrupt leaves the old file or the new one, never a part of one.

Everything goes into a hidden folder beside the target first, under its final name (an ONNX file refers to its
external data by name), and is moved into place only when whole. A lock in the folder says that its
owner lives: what a killed process left is cleared away by the next that writes the same file.
"""

from __future__ import annotations

import glob
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from renormify.errors import OutputError

if sys.platform != "win32":
    import fcntl

__all__ = ["check_output", "staged"]

_LOCK = ".lock"


def check_output(path: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Says early, before any work, whether ``path`` can be written.

    Args:
        path: the file to be written.
        force: whether an existing file may be replaced.
        inputs: files that were read; none of them may be the output, not even with ``force``.

    Raises:
        OutputError: the folder is missing or not writable, the path is a folder, an input, or exists already.
    """
    path = Path(path)
    try:
        return _checked(path, force, inputs)
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _checked(path: Path, force: bool, inputs: Iterable[str | Path]) -> Path:
    folder = path.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise OutputError(f"cannot write {path}: the folder {folder} {what}; create it or give another path")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    for source in inputs:
        # samefile sees through links, relative paths and case-blind file systems.
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise OutputError(f"cannot write {path}: it is the input itself; give another path")
    if path.exists() or path.is_symlink():
        if not force:
            raise OutputError(f"{path} exists already; give another path, or --force to replace it")
        if not path.is_file():
            raise OutputError(f"cannot replace {path}: it is not a regular file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {folder}")
    return path


@contextmanager
def staged(path: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Yields a path of the same name to write to, and moves what was written there into place at the end.

    Upon any exception, an interrupt included, nothing is moved and nothing is left behind. Files that were
    written beside the yielded path (external data) move with it, before it.

    Args:
        path: the final place.
        force: whether existing files may be replaced.
        inputs: files that must not be replaced.

    Raises:
        OutputError: see :func:`check_output`; also when the disk is full or fails.
    """
    inputs = tuple(inputs)
    path = check_output(path, force=force, inputs=inputs)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with _lock(folder):
            _clear_leftovers(path)
            yield folder / path.name
            _publish(folder, path, force, inputs)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    with (folder / f"{_LOCK}.new").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(file.name, folder / _LOCK)  # nobody sees it unlocked while its owner lives
        yield


def _clear_leftovers(path: Path) -> None:
    if sys.platform == "win32":
        return
    for left in path.parent.glob(f".{glob.escape(path.name[:100])}.*.tmp/{_LOCK}"):
        try:
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent, ignore_errors=True)
        except OSError:  # its owner is at work, or another clears it away
            continue


def _publish(folder: Path, path: Path, force: bool, inputs: tuple[str | Path, ...]) -> None:
    mode = _default_mode(folder)
    written = [file for file in folder.iterdir() if file.name != _LOCK]
    files = sorted(written, key=lambda file: file.name == path.name)
    # Looked at again: much time may have passed since the first look.
    targets = [check_output(path.parent / file.name, force=force, inputs=inputs) for file in files]
    for file in files:
        file.chmod(mode)
        _flush(file)
    for file, target in zip(files, targets, strict=True):
        os.replace(file, target)
    _flush(path.parent)


def _default_mode(folder: Path) -> int:
    # Some writers make files that only their owner can read; the umask can be read safely only by using it.
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
