"""Every exception that renormify raises, one tree.

.. code-block:: text

    RenormifyError
    +-- InputError (also a ValueError)      what was given cannot be used          exit code 2
    |   +-- UnsupportedModelError           a model of a kind that cannot be rewritten
    |   +-- ModelSourceError                ``--model SOURCE`` names nothing, or its factory fails
    |   +-- CheckpointError                 a file that is missing, damaged or not a checkpoint
    |   |   +-- UnsafeCheckpointError       a pickle that would run code on loading
    |   |   +-- KeyMismatchError            a checkpoint whose keys or shapes do not fit the model
    |   +-- OutputError                     the output exists already, or its folder does not
    +-- NothingToConvertError               a model with no BatchNorm to convert   exit code 1
    +-- ProofError                          the converted model differs from the original at step 0
    +-- ExportError                         the model cannot be exported to ONNX   exit code 2
    +-- MissingExtraError (also an ImportError)  an optional package is absent     exit code 2

    RenormifyWarning (a UserWarning)        training goes on, but not as its author may believe

Each message is one line that says what was expected, what came, and what to do. ``exit_code`` is what the
command line returns for it.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CheckpointError",
    "ExportError",
    "InputError",
    "KeyMismatchError",
    "MissingExtraError",
    "ModelSourceError",
    "NothingToConvertError",
    "OutputError",
    "ProofError",
    "RenormifyError",
    "RenormifyWarning",
    "UnsafeCheckpointError",
    "UnsupportedModelError",
    "one_line",
    "printable",
]


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """What an exception says, for the end of an error message: on one line, and not too long.

    Args:
        error: an exception, whose class comes in front, or a text.
        limit: the most characters to return; what is longer is cut between two words and ends in ``...``.
    """
    text = str(error)
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}" if text.strip() else type(error).__name__
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    kept = text[: limit - 3]
    return (kept.rpartition(" ")[0] or kept) + "..."


def printable(text: str) -> str:
    """A text that cannot steer a terminal: what is not printable, line breaks too, is shown escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RenormifyError(Exception):
    """The root of every exception that renormify raises on purpose."""

    exit_code: ClassVar[int] = 2


class InputError(RenormifyError, ValueError):
    """An argument, a file or a model that cannot be used as it was given."""


class UnsupportedModelError(InputError):
    """A model of a kind that cannot be rewritten, or one that cannot be copied."""


class ModelSourceError(InputError):
    """A model source that names nothing, or whose factory fails."""


class CheckpointError(InputError):
    """A file that is missing, damaged, or not a checkpoint."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that would run code on loading; none of it has been executed."""


class KeyMismatchError(CheckpointError):
    """A checkpoint whose keys or shapes do not fit the model."""


class OutputError(InputError):
    """An output path that exists already, or whose folder does not exist."""


class NothingToConvertError(RenormifyError):
    """A model in which there is no BatchNorm to convert.

    Args:
        message: what was looked at and found.
        report: the ``ConversionReport`` of the sites that were skipped, where there are any.
    """

    exit_code = 1

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class ProofError(RenormifyError):
    """The converted model and the original differ before the first step of training.

    Args:
        message: what differs.
        document: what was found until then, as the command line reports it, where there is a report.
    """

    exit_code = 1

    def __init__(self, message: str, document: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.document = document


class ExportError(RenormifyError):
    """A model that cannot be exported to ONNX."""


class MissingExtraError(RenormifyError, ImportError):
    """An optional package that is absent.

    Args:
        package: the package that could not be imported.
        extra: the extra of renormify that brings it.
        purpose: what it is needed for, as the end of the phrase "is needed ...".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed {purpose}: pip install 'renormify[{extra}]'")


class RenormifyWarning(UserWarning):
    """Training goes on, but not as its author may believe."""
