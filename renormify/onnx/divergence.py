"""Inside the network: the first layer at which an ONNX file leaves the torch model, and the error by depth.

The file is cut where a layer ends and run up to there; forward hooks take the same layer's outputs from the
model and from its float64 copy. The question is put to all layers that something further on is made from, so
that the answer, once yes, stays yes, and bisection finds the first: log2(n) runs, and of the activations only
those asked for are kept.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from renormify import errors
from renormify.modes import evaluating
from renormify.onnx.comparison import as_tensor, deviation
from renormify.onnx.examples import map_tensors
from renormify.onnx.modules import Layer, calls_of, frontier, label, layers_of
from renormify.onnx.noise import comparable, measure
from renormify.onnx.precision import granted, makers
from renormify.onnx.reference import REPEATS, Answer
from renormify.onnx.rounding import rounded_otherwise
from renormify.onnx.runtimes import RUNTIMES

__all__ = ["Divergence", "LayerParity", "find_divergence", "profile"]

_AT_ONCE = 8
_PROFILED = 64
_CALLABLE = "the layers of a plain callable have no names"
_UNNAMED = "the file does not say which layers its nodes come from, as torch's exporter does"


@dataclass(frozen=True)
class LayerParity:
    """The output of one layer in the file.

    Attributes:
        name: the module's path in the torch model; from the second call of one module, "path:1", "path:2".
        value: the value's name in the file.
        position: of the layer, from 0.0 for the first that can be compared to 1.0 for the last.
        max_abs: the largest absolute difference from the float64 model; None where it is not finite.
        max_rel: relative to the largest absolute value of the float64 model's output.
        floor: the largest error of torch's own forward relative to the same; None without a float64 model.
        passed: whether it is float noise.
        reason: why not, in words.
    """

    name: str
    value: str
    position: float
    max_abs: float | None
    max_rel: float | None
    floor: float | None
    passed: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """What bisection found.

    Attributes:
        name: the path of the first module whose output diverges, or None.
        reason: what is wrong there, or why it cannot be known.
        layers: those that were compared.
    """

    name: str | None
    reason: str
    layers: tuple[LayerParity, ...] = ()


def find_divergence(
    model: Any, path: Path, answer: Answer, runtime: str, outputs: Collection[str] = ()
) -> Divergence:
    """Find the first layer whose output in the file is not the torch model's.

    Args:
        model: the torch model.
        path: the file, whose outputs are known to differ.
        answer: the inputs at which they do.
        runtime: the runtime on which they do.
        outputs: the names of those whose values are wrong.
    """
    if not isinstance(model, nn.Module):
        return Divergence(None, _CALLABLE)
    try:
        probe = _Probe(model, path, answer, runtime)
        if not probe.layers:
            return Divergence(None, _UNNAMED)
        low, high = -1, len(probe.layers)
        while high - low > 1:
            middle = (low + high) // 2
            if probe.ask(frontier(probe.layers, middle)):
                high = middle
            else:
                low = middle
    except Exception as error:  # of the runtime, of the user's forward
        return Divergence(None, f"the search failed: {errors.one_line(error)}")
    seen = probe.compared()
    if high == len(probe.layers):
        # An output was judged over more rows than the layer that makes it.
        last = [layer.name for layer in probe.layers if layer.value in outputs]
        if last:
            return Divergence(
                last[0], "every layer before agrees within its noise, this output does not", seen
            )
        reason = f"every layer agrees within its noise up to {probe.layers[-1].name}"
        return Divergence(None, f"{reason}, the last that can be compared", seen)
    layer = probe.layers[high]
    reason = probe.found[high].reason
    if layer.merged:
        reason += f"; in the file {', '.join(layer.merged)} and {layer.name} are one"
    return Divergence(layer.name, reason, seen)


def profile(model: Any, path: Path, answer: Answer, runtime: str) -> Divergence:
    """Compare layers over the whole depth of the network, all or evenly chosen ones, a few at a time.

    Returns:
        The layers, or in ``reason`` why there are none; it names no layer, since not all are looked at.
    """
    if not isinstance(model, nn.Module):
        return Divergence(None, _CALLABLE)
    try:
        probe = _Probe(model, path, answer, runtime)
        count = len(probe.layers)
        if not count:
            return Divergence(None, _UNNAMED)
        chosen = sorted({round(k * (count - 1) / (_PROFILED - 1)) for k in range(_PROFILED)})
        for start in range(0, len(chosen), _AT_ONCE):
            probe.ask(chosen[start : start + _AT_ONCE])
    except Exception as error:  # of the runtime, of the user's forward
        return Divergence(None, f"they cannot be run: {errors.one_line(error)}")
    return Divergence(None, "", probe.compared())


class _Probe:
    """A model and a file that are asked for the outputs of layers."""

    def __init__(self, model: nn.Module, path: Path, answer: Answer, runtime: str) -> None:
        self.model, self.path, self.answer, self.runtime = model, path, answer, runtime
        self.double = None if answer.truth is None else copy.deepcopy(model).double()
        self.others = [rounded_otherwise(model, seed) for seed in range(REPEATS)] if self.double else []
        file = ir.load(path)
        with evaluating(model):
            self.layers: Sequence[Layer] = layers_of(file.graph, calls_of(model, answer.arguments))
        self.makers = makers(ir.to_proto(file).graph)
        self.found: dict[int, LayerParity] = {}

    def ask(self, indices: Sequence[int]) -> bool:
        """Compare these layers and tell whether one of them diverges."""
        new = [index for index in indices if index not in self.found]
        if new:
            names = [self.layers[index].name for index in new]
            given = self.answer.arguments
            own = [_outputs(self.model, names, given)]
            truth = None
            if self.double is not None:
                doubled = map_tensors(lambda x: x.double() if x.is_floating_point() else x, given)
                truth = _outputs(self.double, names, doubled)
                own += [_outputs(other, names, given) for other in self.others]
            theirs = self._run([self.layers[index].value for index in new])
            for index, name, output in zip(new, names, theirs, strict=True):
                real = None if truth is None else truth[name]
                self.found[index] = self._compare(index, output, [tensors[name] for tensors in own], real)
        return any(not self.found[index].passed for index in indices)

    def compared(self) -> tuple[LayerParity, ...]:
        """Return what was compared, from the first layer to the last."""
        return tuple(self.found[index] for index in sorted(self.found))

    def _run(self, values: Sequence[str]) -> list[Any]:
        file = ir.load(self.path)
        kept = {value.name: value for node in file.graph for value in node.outputs}
        file.graph.outputs.clear()
        file.graph.outputs.extend(kept[name] for name in values)
        RemoveUnusedNodesPass()(file)
        with tempfile.TemporaryDirectory() as folder:
            cut = Path(folder) / "cut.onnx"
            ir.save(file, cut, external_data="cut.data")
            runtime = RUNTIMES[self.runtime](cut)
            outputs = runtime.run(self.answer.inputs)
            del runtime  # it may hold the files open
        return outputs

    def _compare(self, index: int, output: Any, owns: list[Tensor], truth: Tensor | None) -> LayerParity:
        layer, own = self.layers[index], owns[0]
        position = index / max(len(self.layers) - 1, 1)
        if tuple(output.shape) != tuple(own.shape):
            reason = f"its shape is {tuple(output.shape)}, torch's {tuple(own.shape)}"
            return LayerParity(layer.name, layer.value, position, None, None, None, False, reason)
        real = own if truth is None else truth
        noise = None
        if comparable(own):
            noise = measure(owns, None if truth is None else [truth] * len(owns))
        kernel = None if noise is None else granted(self.runtime, self.makers.get(layer.value, ""), real)
        found = deviation(as_tensor(output, own.dtype), own, real, noise, kernel=kernel)
        largest = float(real.double().abs().max()) if real.numel() else 0.0
        floor = None if noise is None or noise.floor is None or not largest else noise.floor / largest
        # What the model itself has as NaN, a masked score say, is no fault of the file.
        reason = found.reason if bool(own.isfinite().all()) else ""
        return LayerParity(
            layer.name, layer.value, position, found.max_abs, found.max_rel(real.double()), floor,
            not reason, reason,
        )  # fmt: skip


def _outputs(model: nn.Module, names: Sequence[str], arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """Run the model and return what these calls of modules returned, as it was when the module ended."""
    taken: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def take(module: nn.Module, given: Any, output: Tensor) -> None:
            name = label(path, calls[path])
            calls[path] += 1
            if name in names:
                taken[name] = output.detach().clone().cpu()  # the next module may write into it

        return take

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for path, module in model.named_modules():
            if path in names or any(name.startswith(f"{path}:") for name in names):
                stack.callback(module.register_forward_hook(hook(path)).remove)
        model(*arguments)
    return taken
