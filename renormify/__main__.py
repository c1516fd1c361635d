"""``python -m renormify``."""

from __future__ import annotations

from renormify.cli import main

if __name__ == "__main__":
    main()
