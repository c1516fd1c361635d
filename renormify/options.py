"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from renormify.errors import InputError, one_line

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".pt2")


class Stat(str, enum.Enum):
    """Which statistic is averaged."""

    sigma = "sigma"
    var = "var"


class Leftover(str, enum.Enum):
    """What becomes of a norm that does not fold."""

    auto = "auto"
    bn = "bn"
    affine = "affine"
    conv = "conv"


class Peer(str, enum.Enum):
    """Whose layers a file holds."""

    auto = "auto"
    torchrl = "torchrl"
    sb3 = "sb3"
    avalanche = "avalanche"
    ludvb = "ludvb"
    keras = "keras"


Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="safetensors or torch.save; an index of shards; a folder.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", show_default=False, help="The same as CHECKPOINT."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SOURCE",
        show_default=False,
        help="torchvision:NAME, timm:NAME, transformers:DIR or package.module:factory. "
        "A checkpoint that renormify wrote names its zoo model itself.",
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="N,C,H,W",
        show_default=False,
        help="Shape of the example input; once for each input. Default: what the checkpoint or the zoo says.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", show_default=False, help="Its suffix is the format.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace an existing output. An input is never replaced.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", show_default=False, help="Write the report as an HTML page too."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every site.")]
BatchSizes = Annotated[str, typer.Option("--batch-sizes", metavar="N,...", help="Batch sizes to compare at.")]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="Compare on normal, large and zero inputs too, at each optimisation level of onnxruntime, and "
        "layer by layer.",
    ),
]
RMax = Annotated[float, typer.Option("--r-max", help="Limit of the scale correction r.")]
DMax = Annotated[float, typer.Option("--d-max", help="Limit of the shift correction d.")]
Momentum = Annotated[
    str,
    typer.Option(
        "--momentum", metavar="FLOAT|keep", help="Of the running statistics; keep: each layer's own."
    ),
]
StatOption = Annotated[
    Stat, typer.Option("--stat", help="Average sigma (the paper) or the variance (torch).")
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        show_default=False,
        help="Convert only sites whose name matches, as 'layer4.*'; may be given several times.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", show_default=False, help="Leave out sites whose name matches."
    ),
]
IncludeFrozen = Annotated[bool, typer.Option("--include-frozen", help="Convert frozen BatchNorm too.")]
Kwargs = Annotated[
    str | None,
    typer.Option(
        "--kwargs",
        metavar="JSON",
        show_default=False,
        help="Keywords for the model's builder, as one object.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", show_default=False, help="Where in the file the weights are, as ema or a.b."
    ),
]
Prefix = Annotated[
    str,
    typer.Option(
        "--prefix",
        metavar="TEXT",
        show_default=False,
        help="Take only the keys with this prefix, without it.",
    ),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let the file run code: only for files whose author you trust.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")]


def shapes_of(texts: list[str] | None) -> tuple[tuple[int, ...], ...] | None:
    """The shapes that --input-shape gives, one for each input."""
    return tuple(map(shape_of, texts)) if texts else None


def shape_of(text: str) -> tuple[int, ...]:
    """One shape, as 1,3,224,224 or 1x3x224x224."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input-shape {text!r}: expected positive whole numbers, as 1,3,224,224")
    return shape


def batch_sizes_of(text: str) -> tuple[int, ...]:
    """The sizes that --batch-sizes gives."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch-sizes {text!r}: expected positive whole numbers, as 1,2,7")
    return sizes


def momentum_of(text: str) -> float | Literal["keep"]:
    """A number, or keep."""
    if text == "keep":
        return "keep"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--momentum {text!r}: expected a number, as 0.01, or keep") from None


def kwargs_of(text: str | None) -> dict[str, Any] | None:
    """The object that --kwargs gives."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"--kwargs is no JSON ({one_line(error, 80)}); expected as '{{\"width\": 2}}'"
        raise InputError(message) from None
    if not isinstance(found, dict):
        raise InputError(f"--kwargs: expected a JSON object, as '{{\"width\": 2}}', got {text[:40]!r}")
    return found


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of a text such as ``0.5,0.5,0.5``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r}: expected numbers, as 0.5,0.5,0.5") from None
