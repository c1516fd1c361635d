"""What one waits for before anything happens: help on the command line, and a conversion in place.

Processor time, medians, beside the least that could be had: Python with typer and rich imported, and a
copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm

from renormify import convert

LEAST = ("-c", "import typer, rich.console, rich.table")
HELP = (("--help",), ("convert", "--help"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    least = statistics.median(started(LEAST) for _ in range(rounds))
    for arguments in HELP:
        taken = statistics.median(started(("-m", "renormify", *arguments)) for _ in range(rounds))
        named = " ".join(arguments)
        print(f"renormify {named}: {taken:.2f} s, {taken / least:.2f} of importing typer and rich")
    model = timm.create_model("efficientnet_b0")
    convert(model)  # imports and first uses
    taken = statistics.median(converted() for _ in range(rounds))
    copied = statistics.median(timed(lambda: copy.deepcopy(model)) for _ in range(rounds))
    print(f"convert(efficientnet_b0, inplace=True): {taken:.2f} s, {taken / copied:.1f} of a copy")


def started(arguments: tuple[str, ...]) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def converted() -> float:
    model = timm.create_model("efficientnet_b0")
    return timed(lambda: convert(model, inplace=True))


def timed(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
