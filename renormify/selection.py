"""Which sites to convert, by patterns on their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from renormify.errors import InputError

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """A ``filter_fn`` for :func:`renormify.convert` that chooses by name, and tells why it left a site out.

    Attributes:
        include: patterns as of a shell (``*``, ``?``, ``[abc]``), one of which a name must match, if any is
            given.
        exclude: patterns of which it must match none.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, name: str) -> bool:
        """Whether to convert the site of that name."""
        return self.why_not(name) is None

    def why_not(self, name: str) -> str | None:
        """The reason for leaving a site out, or None."""
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return f"left out by --exclude {pattern!r}"
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return f"left out by --include {', '.join(map(repr, self.include))}"
        return None

    def check(self, names: Iterable[str]) -> None:
        """Raises InputError for a pattern that matches none of the names: it is a slip."""
        names = list(names)
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    examples = ", ".join(map(repr, names[:3])) or "none"
                    raise InputError(
                        f"{option} {pattern!r} matches no BatchNorm of the model; names are as {examples} "
                        "(see renormify inspect)"
                    )
