"""Forwards that call batch_norm run as they were written; in training the calls alone are Batch Renorm."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from norms import C, image, lived_in
from oracle import Oracle
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from renormify import convert, renormify, revert
from renormify.errors import InputError, UnsupportedModelError

LOG: list[Any] = []


class State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    def forward(self, x: Any) -> Any:
        return self.norm(x)


def of_the_paper(model: Any, x: Tensor, eps: float = 1e-5) -> Tensor:
    """The output of a step, in float64 from the paper's formulas."""
    mean, var = model.running_mean.double().numpy(), model.running_var.double().numpy()
    oracle = Oracle(mean, np.sqrt(var + eps), 0.01, eps)
    affine = (p.detach().double().numpy() for p in (model.weight, model.bias))
    return torch.from_numpy(oracle.train(x.double().numpy(), np.zeros(x.shape), *affine).y).float()


# ------------------------------------------------------------------------- what no graph could hold


class AsksForItsType(State):
    """As detection models do, whose images come nested."""

    def forward(self, x: Any) -> Tensor:
        return self.norm((x if isinstance(x, Tensor) else x.tensors) / 255)


@dataclass
class Nested:
    tensors: Tensor


def test_type_of_an_input_is_what_it_is() -> None:
    model, x = lived_in(AsksForItsType()), 255 * image()
    for given in (x, Nested(x)):
        torch.testing.assert_close(renormify(model)(given), of_the_paper(model, x / 255))


class Scales(State):
    def __init__(self, factor: float, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.held = kind(factor)

    def forward(self, x: Tensor) -> Tensor:
        value = self.held
        if isinstance(value, slice):
            return self.norm(x) * value.stop
        return self.norm(x) * float(value[0] if isinstance(value, (np.ndarray, list)) else value["s"])


KINDS: dict[str, Callable[[float], Any]] = {
    "ordered dict": lambda factor: OrderedDict(s=factor),
    "slice": lambda factor: slice(0, factor),
    "array": lambda factor: np.array([factor]),
    "list": lambda factor: [factor],
}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_a_class_have_each_its_own_settings(kind: str) -> None:
    models = lived_in(nn.ModuleList(Scales(factor, KINDS[kind]) for factor in (1.0, 3.0)))
    x = image()
    for factor, model, converted in zip((1.0, 3.0), models, renormify(models), strict=True):
        torch.testing.assert_close(converted(x), factor * of_the_paper(model, x))


class Meter:
    def __init__(self) -> None:
        self.last: Any = None
        self.steps = 0


class Notes(State):
    """Keeps what it saw in an object of its own, in a list of the module, and in a global one."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()
        self.log: list[Any] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.meter.last = y.mean()
        self.meter.steps += 1
        self.log.append(y.mean())
        LOG.append(y.mean())
        self.calls += 1
        return y


def test_conversion_leaves_no_trace_and_training_leaves_the_forwards_own() -> None:
    LOG.clear()
    model = Notes()
    conversion = convert(model)
    assert conversion.report.converted == ("",)
    for each in (model, conversion.model):
        assert (each.meter.last, each.meter.steps, each.log, each.calls, LOG) == (None, 0, [], 0, [])
    converted = conversion.model
    for step in range(1, 4):
        y = converted(image())
        assert torch.equal(converted.meter.last, y.mean())
        assert (converted.meter.steps, len(converted.log), len(LOG), converted.calls) == (step,) * 4
    assert (model.meter.steps, model.calls) == (0, 0)


class Returns(State):
    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(last_hidden_state=self.norm(x))


def test_outputs_keep_their_class() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    for kind in (OrderedDict, BaseModelOutput):
        assert type(renormify(Returns(kind))(image())) is kind


class DrawsFromItsOwn(State):
    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.generator, self.draw = generator, draw

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (1 if self.draw(self.generator) < 0.5 else 2)


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "python": (lambda: random.Random(0), lambda generator: generator.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda generator: generator.random()),
    "torch": (
        lambda: torch.Generator().manual_seed(0),
        lambda generator: torch.rand((), generator=generator).item(),
    ),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_random_decisions_are_drawn_each_time_and_not_by_a_conversion(kind: str) -> None:
    make, draw = GENERATORS[kind]
    model, twin, x = DrawsFromItsOwn(make(), draw), DrawsFromItsOwn(make(), draw), image()
    convert(model, r_max=1.0, d_max=0.0, inplace=True)
    for _ in range(8):  # at these limits it is BatchNorm
        torch.testing.assert_close(model(x), twin(x))


class WithoutAutocast(State):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float())


def test_autocast_is_switched_as_the_forward_does() -> None:
    model, x = lived_in(WithoutAutocast()), image()
    converted = renormify(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = converted(x)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, of_the_paper(model, x))


class Optional(State):
    def __init__(self) -> None:
        super().__init__()
        self.other = lived_in(State())

    def forward(self, x: Tensor, skips: Any = None, sizes: Any = [1, 2], first: bool = False) -> Tensor:  # noqa: B006
        if first:
            other = self.other
            mean, var = other.running_mean * 1, other.running_var * 1
            x = F.batch_norm(x, mean, var, training=self.training)
        y = self.norm(x)
        for skip in skips or ():
            y = y + skip
        return y * sizes[1]


def test_arguments_that_conversion_did_not_know() -> None:
    model, x = lived_in(Optional()), image()
    torch.testing.assert_close(renormify(model)(x, [x, x]), 2 * (of_the_paper(model, x) + 2 * x))
    other = model.other  # statistics made in the forward stay BatchNorm's
    inner = F.batch_norm(x, other.running_mean * 1, other.running_var * 1, training=True)
    torch.testing.assert_close(renormify(model)(x, first=True), 2 * of_the_paper(model, inner))


class PerStep(State):
    """Statistics for each step of time, as recurrent networks have them."""

    def __init__(self) -> None:
        super().__init__()
        for step in range(2):
            self.register_buffer(f"mean_{step}", torch.zeros(C))
            self.register_buffer(f"var_{step}", torch.ones(C))

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        mean, var = getattr(self, f"mean_{step}"), getattr(self, f"var_{step}")
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1)


def test_statistics_chosen_by_an_argument_are_the_modules_own_too() -> None:
    converted, x = renormify(PerStep()), image()
    for step in range(2):
        converted(x, step)
        torch.testing.assert_close(getattr(converted, f"mean_{step}"), 0.01 * x.mean((0, 2, 3)))


class Sometimes(State):
    def forward(self, x: Tensor, saving: bool = False) -> Tensor:
        return checkpoint(self.norm, x, use_reentrant=False) if saving else self.norm(x)  # type: ignore[no-any-return]


def test_checkpoint_whose_second_run_nobody_would_see_is_refused() -> None:
    converted, x = renormify(Sometimes()), image()
    converted(x)
    before = copy.deepcopy(converted.state_dict())
    with pytest.raises(UnsupportedModelError, match="Sometimes checkpoints its call of batch_norm"):
        converted(x, saving=True)
    torch.testing.assert_close(converted.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------- norms of their own


class OwnEps(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.5, 0.1
        )


def test_eps_of_a_call_is_the_calls() -> None:
    model, x = lived_in(OwnEps(C)), image()
    torch.testing.assert_close(renormify(model)(x), of_the_paper(model, x, eps=0.1))
    [site] = convert(nn.ModuleList((model, nn.BatchNorm2d(C))), momentum="keep").report.sites[:1]
    assert "calls batch_norm with a momentum that is not its own" in site.reason


class NamesItsClass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super(self.__class__, self).forward(input)  # type: ignore[misc]


class AsksForItsClass(nn.BatchNorm2d):
    def extra_repr(self) -> str:
        return super(type(self), self).extra_repr()  # type: ignore[misc]


class LeavesOutTorchs(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Any:
        return super(nn.BatchNorm2d, self).train(mode)


class NamesTheClassItIsIn(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super(self.__class__, self).__init__(channels)  # type: ignore[misc]

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self, nn.Module)
        return super(NamesTheClassItIsIn, self).forward(input)  # noqa: UP008

    def train(self, mode: bool = True) -> Any:
        return super().train(mode and type(self) is not nn.BatchNorm2d)


@pytest.mark.parametrize("form", [NamesItsClass, AsksForItsClass, LeavesOutTorchs])
def test_what_would_mislead_super_is_refused(form: type[nn.Module]) -> None:
    model = nn.ModuleList((form(C), NamesTheClassItIsIn(C)))
    sites = convert(model).report.sites
    assert [site.action for site in sites] == ["skipped", "converted"]
    assert "gives super() self.__class__ or a class of torch" in sites[0].reason


def test_eps_of_zero_is_refused() -> None:
    sites = convert(nn.ModuleList((nn.BatchNorm2d(C, eps=0.0), nn.BatchNorm2d(C)))).report.sites
    assert "has eps=0" in sites[0].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_revert_after_a_cast_is_the_cast_original(dtype: torch.dtype) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))).eval()
    x, expected = image().to(dtype), copy.deepcopy(model).to(dtype)
    reverted = revert(renormify(model).to(dtype))
    assert reverted[1].running_var.dtype is dtype
    assert torch.equal(reverted(x), expected(x))


class FrozenBatchNorm2d(nn.Module):
    """Whose statistics come before its affine."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "weight", "bias"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


def test_thawed_norm_keeps_the_order_of_its_state() -> None:
    model = nn.Sequential(FrozenBatchNorm2d(C))
    assert list(renormify(model, include_frozen=True).state_dict()) == list(model.state_dict())


# ------------------------------------------------------------------------------- counted, and counted once


class CallsItself(nn.BatchNorm2d):
    def call(self, input: Tensor, factor: float = 0.5) -> Tensor:
        statistics, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        return F.batch_norm(input, *statistics, *affine, self.training, factor, self.eps)


class Counts(CallsItself):
    """Counts as torch's own forward does, and as timm's."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return self.call(
            input, 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        )


class CountsAnew(CallsItself):
    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked = self.num_batches_tracked + 1
        return self.call(input)


class CountsBehind(CallsItself):
    """Where no call of torch tells."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.data += 1
        return self.call(input)


class CountsAfterwards(CallsItself):
    def forward(self, input: Tensor) -> Tensor:
        factor = 1 / (float(self.num_batches_tracked) + 1) if self.momentum is None else self.momentum
        y = self.call(input, factor)
        torch.add(self.num_batches_tracked, 1, out=self.num_batches_tracked)
        return y


COUNTING = (Counts, CountsAnew, CountsBehind, CountsAfterwards)


class PassesItsMomentum(CallsItself):
    def forward(self, input: Tensor) -> Tensor:
        return self.call(input, self.momentum)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [*COUNTING, PassesItsMomentum])
@pytest.mark.parametrize("saving", [None, False, True])
def test_cumulative_average_is_over_the_batches_that_count(
    form: type[nn.Module], saving: bool | None
) -> None:
    layer = renormify(form(C), momentum=None)
    batches = [image() for _ in range(4)]
    batches[1][0, 0, 0, 0] = torch.inf  # is rejected
    for x in batches:
        x = x.requires_grad_()
        y = layer(x) if saving is None else checkpoint(layer, x, use_reentrant=saving)
        y.sum().backward()
    good = torch.stack([x.detach().mean((0, 2, 3)) for x in batches if x.isfinite().all()])
    torch.testing.assert_close(layer.running_mean, good.mean(0))
    assert (int(layer.num_batches_tracked), int(layer.rejected_batches)) == (3, 1)


@pytest.mark.parametrize("form", COUNTING)
def test_forward_and_layer_count_together_once(form: type[nn.Module]) -> None:
    layer = renormify(form(C))
    for count in range(1, 4):
        checkpoint(layer, image().requires_grad_(), use_reentrant=False).sum().backward()
        assert int(layer.num_batches_tracked) == count


class TwoDomains(nn.BatchNorm2d):
    """Statistics of its own for adversarial images, as AdvProp has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("other_mean", torch.zeros(channels))
        self.register_buffer("other_var", torch.ones(channels))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        rest = self.weight, self.bias, self.training, self.momentum, self.eps
        return (
            F.batch_norm(input, mean, var, *rest) + F.batch_norm(input, mean, var, *rest),
            F.batch_norm(input, self.other_mean, self.other_var, *rest),
        )


def test_every_call_on_statistics_of_a_layer_is_renormalised() -> None:
    layer, x = renormify(TwoDomains(C)), image()
    _, y = layer(x)
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(layer.other_mean, 0.01 * mean)
    torch.testing.assert_close(layer.running_mean, (1 - 0.99**2) * mean)
    torch.testing.assert_close(y, of_the_paper(TwoDomains(C), x))


def test_first_step_in_half_precision_is_whole() -> None:
    layer, x = renormify(TwoDomains(C)).bfloat16(), image().bfloat16()
    layer.running_mean = layer.running_mean.bfloat16()
    layer.running_var = layer.running_var.bfloat16()
    layer(x)
    mean = x.float().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, (1 - 0.99**2) * mean, rtol=0.01, atol=1e-4)


class Reentrant(State):
    saving = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.norm, x, use_reentrant=True) if self.saving else self.norm(x)  # type: ignore[no-any-return]


def test_reentrant_checkpoint_switched_on_later_is_refused() -> None:
    converted = renormify(Reentrant())
    converted(image())
    converted.saving = True
    with pytest.raises(UnsupportedModelError, match="Reentrant checkpoints its call of batch_norm"):
        converted(image().requires_grad_())


class Borrows(State):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = State(), State()

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second):
            if part is not None:
                x = F.batch_norm(x, part.running_mean, part.running_var, training=self.training)
        return x


def test_part_that_is_taken_away_later_is_no_error() -> None:
    converted, x = renormify(Borrows()), image()
    converted.first = None
    converted(x)
    torch.testing.assert_close(converted.second.running_mean, 0.01 * x.mean((0, 2, 3)))


class TwiceTheSame(State):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x))


def test_calls_on_the_same_statistics_are_not_torn_apart() -> None:
    model = nn.Sequential(TwiceTheSame())
    with pytest.raises(InputError, match="expected the filter to take 0:1 too, or none"):
        convert(model, filter_fn=lambda module, name: name == "0", inplace=True)
    assert set(vars(model[0])) == set(vars(TwiceTheSame()))


def test_forward_wrapped_later_is_not_reverted_by_halves() -> None:
    converted = renormify(State())
    forward = converted.forward
    converted.forward = lambda x: forward(x)
    with pytest.raises(UnsupportedModelError, match="was wrapped after conversion; unwrap it first"):
        revert(converted, inplace=True)
    assert converted.r_max == 3.0


def _native_legit(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch._native_batch_norm_legit(x, None, None, mean, var, True, 0.1, 1e-5)[0]  # type: ignore[no-any-return]


def _impl_index(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return torch._batch_norm_impl_index(x, None, None, mean, var, True, 0.1, 1e-5, False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [_native_legit, _impl_index])
def test_lesser_known_functions_are_calls_too(call: Callable[..., Tensor]) -> None:
    class Calls(State):
        def forward(self, x: Tensor) -> Tensor:
            return call(x, self.running_mean, self.running_var)

    model, x = lived_in(Calls()), image()
    torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
    torch.testing.assert_close(renormify(model)(x), of_the_paper(model, x))


class Asks:
    """What answers every question with an error, as proxies of configurations do."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name) if not name.startswith("__") else AttributeError(name)


class Holder(State):
    def __init__(self) -> None:
        super().__init__()
        self.config = Asks()
        self.register_buffer("large", torch.zeros(1_000_000))


def test_discovery_asks_nothing_and_copies_no_buffer() -> None:
    model = Holder()
    with profile(profile_memory=True) as record:
        assert convert(model, inplace=True).report.converted == ("",)
    assert max(event.cpu_memory_usage for event in record.events()) < 1_000_000


# ----------------------------------------------------------------------------------- seen from outside


class Named(State):
    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize("strict", [True, False])
def test_root_has_the_signature_it_had_and_exports_by_it(strict: bool) -> None:
    model, x = lived_in(Named()).eval(), image()
    converted = renormify(model)
    assert inspect.signature(converted.forward) == inspect.signature(model.forward)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=9)}}
    program = torch.export.export(converted, (x,), dynamic_shapes=shapes, strict=strict)
    torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x: forward(self, x)


class Decorated(State):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_decorated_forward_is_saved_as_before() -> None:
    converted, x = renormify(Decorated()), image()
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    twin = pickle.loads(pickle.dumps(converted))
    assert torch.equal(torch.load(file, weights_only=False)(x), twin(x))


# -------------------------------------------------------------------------------------- never silent


class OnTheInstance(State):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.norm  # type: ignore[method-assign]


class ByAnotherName(State):
    """Normalises in a method that others call."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C))]

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](x)  # type: ignore[no-any-return]


class StatisticsInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = [torch.zeros(C), torch.ones(C)]

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, *self.statistics, training=self.training)


@torch.fx.wrap
def wrapped(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, mean, var, training=training)


class Wrapped(State):
    def forward(self, x: Tensor) -> Tensor:
        return wrapped(x, self.running_mean, self.running_var, self.training)


class WhenAsked(State):
    def forward(self, x: Tensor, normalise: bool = False) -> Tensor:
        return self.norm(x) if normalise else x


@pytest.mark.parametrize(
    ("form", "name", "reason"),
    [
        (OnTheInstance, "1", "its forward was replaced on the instance"),
        (ByAnotherName, "1", "its method norm calls batch_norm, not its forward"),
        (InAList, "1.norms[0].1", "it is in no ModuleList or ModuleDict"),
        (StatisticsInAList, "1", "its running statistics lie where no name leads"),
        (Wrapped, "1", "its code calls batch_norm where no trace came"),
        (WhenAsked, "1", "its code calls batch_norm where no trace came"),
    ],
)
def test_what_is_not_converted_is_reported(form: type[nn.Module], name: str, reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), form())
    report = convert(model).report
    assert (report.converted, report.skipped) == (("0",), (name,))
    assert reason in report.sites[1].reason


def test_method_of_that_name_is_no_call() -> None:
    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm2d(C)

        def encode(self, x: Tensor) -> Tensor:
            return self.batch_norm(x)  # type: ignore[no-any-return]

    assert [site.name for site in convert(Attribute()).report.sites] == ["batch_norm"]


def test_scripted_norm_is_reported_as_such() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that tracing is going away
        scripted = torch.jit.trace(nn.BatchNorm2d(C), image())
    report = convert(nn.Sequential(nn.BatchNorm2d(C), scripted)).report
    assert report.sites[1].reason == "it is scripted or traced; convert what it came from"


def test_module_of_a_package_named_as_pythons_is_read() -> None:
    source = """
import torch.nn.functional as F
def forward(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
"""
    namespace: dict[str, Any] = {"__name__": "code.network"}
    exec(source, namespace)
    form = type("Network", (State,), {"forward": namespace["forward"], "__module__": "code.network"})
    assert convert(form()).report.converted == ("",)


# ----------------------------------------------------------------------- operators, transforms, names


class OfSeveralResults(nn.BatchNorm2d):
    def __init__(self, channels: int, function: Callable[..., Any], affine: bool) -> None:
        super().__init__(channels, affine=affine)
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        output: Tensor = self.function(
            input, self.weight, self.bias, *statistics, self.training, self.momentum, self.eps
        )[0]
        return output


@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "function", [torch.native_batch_norm, torch.ops.aten._native_batch_norm_legit], ids=["native", "legit"]
)
def test_operators_of_several_results_train_in_half_precision(
    function: Callable[..., Any], affine: bool, cast_first: bool
) -> None:
    model, x = OfSeveralResults(C, function, affine), image().bfloat16()
    layer = renormify(model.bfloat16()) if cast_first else renormify(model).bfloat16()
    assert layer(x).dtype is torch.bfloat16
    torch.testing.assert_close(layer.running_mean, 0.01 * x.float().mean((0, 2, 3)))
    assert int(layer.num_batches_tracked) == 1


class FailsBehind(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Any:
        return torch.native_batch_norm(
            input,
            self.weight,
            self.bias.double(),
            self.running_mean,
            self.running_var,
            self.training,
            0.1,
            1e-5,
        )[0]


def test_operator_that_fails_moves_nothing() -> None:
    layer = renormify(FailsBehind(C))
    with pytest.raises(RuntimeError):
        layer(image())
    assert not layer.running_mean.any()
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("form", [nn.BatchNorm2d, Counts])
def test_transforms_of_torch_func_take_a_state_dict(form: type[nn.Module]) -> None:
    """What functional_call is not given it may not write to, and what is no state it is not given."""
    model = renormify(nn.Sequential(nn.Conv2d(C, C, 1), form(C)))
    reference, x = copy.deepcopy(model), image()
    parameters = dict(model.named_parameters())
    buffers = {name: v.clone() for name, v in model.state_dict().items() if name not in parameters}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, {**parameters, **buffers}, (x,))
        return output.pow(3).sum()

    found = torch.func.grad(loss)(parameters, buffers, x)
    reference(x).pow(3).sum().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, reference.state_dict()[name])
    stacked = ({name: torch.stack([v, v]) for name, v in part.items()} for part in (parameters, buffers))
    losses = torch.vmap(loss, in_dims=(0, 0, None))(*stacked, x)
    assert losses[0] == losses[1]


class WideAlone(CallsItself):
    """Has arithmetic of its own where it is narrow."""

    def forward(self, input: Tensor) -> Tensor:
        if self.num_features < 8:
            return input * (self.running_var + self.eps).rsqrt().view(1, -1, 1, 1)
        return self.call(input)


def test_width_may_decide_what_a_forward_calls() -> None:
    sites = convert(nn.Sequential(WideAlone(16), WideAlone(4))).report.sites
    assert [site.action for site in sites] == ["converted", "skipped"]


class SwitchesOn(State):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return self.norm(x)


def test_gradients_may_be_switched_on_within() -> None:
    converted, x = renormify(SwitchesOn()), image()
    with torch.no_grad():
        converted(x)
    torch.testing.assert_close(converted.running_mean, 0.01 * x.mean((0, 2, 3)))


class Whitens(CallsItself):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mask", None)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.batch_norm(input, None, None, training=True))


class WhitensItself(Whitens):
    def forward(self, input: Tensor) -> Tensor:
        return self.call(F.batch_norm(input, None, None, training=True))


@pytest.mark.parametrize("form", [Whitens, WhitensItself])
def test_none_is_no_statistic(form: type[nn.Module]) -> None:
    model, x = lived_in(form(C)), image()
    expected = of_the_paper(model, F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(renormify(model)(x), expected, rtol=1e-4, atol=1e-5)


class NamedAsOurs(State):
    def forward(self, original: Tensor, constants: Tensor, module: Any = None) -> Tensor:
        return self.norm(original + constants)


def test_arguments_may_have_any_name() -> None:
    model, x = lived_in(NamedAsOurs()), image()
    y = renormify(model)(original=x, constants=torch.zeros(()), module="any")
    torch.testing.assert_close(y, of_the_paper(model, x))


def test_thawed_layer_takes_its_input_by_name() -> None:
    model, x = lived_in(torchvision.ops.FrozenBatchNorm2d(C)), image()
    y = renormify(nn.Sequential(model), include_frozen=True)[0](x=x)
    torch.testing.assert_close(y, of_the_paper(model, x), rtol=1e-4, atol=1e-5)
