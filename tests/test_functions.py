"""Functional calls of batch_norm: in forwards of every form, and in the graphs of GraphModules."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norms import (
    C,
    assert_batch_norm_at_the_limit,
    assert_converts,
    assert_reverts_to,
    assert_same_output,
    assert_same_state,
    image,
    lived_in,
)
from oracle import Oracle
from torch import Tensor, fx, nn

from renormify import convert, convert_sync, renormify, revert
from renormify.errors import NothingToConvertError, RenormifyWarning
from renormify.functions import BatchRenormCall
from renormify.layers import bears_limits, is_batch_renorm
from renormify.rewriting import rewrite


class State(nn.Module):
    """Statistics and affine, under the names of a BatchNorm or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        self.slope = 0.1


class Plain(State):
    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, 1e-3
        )
        return F.leaky_relu(x, self.slope)


class Keywords(State):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            training=self.training, weight=self.weight, running_var=self.running_var, input=x,
            running_mean=self.running_mean, momentum=0.2,
        )  # fmt: skip


class OfTorch(State):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3, True
        )


class Aten(State):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.batch_norm.default(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3, True
        )


class AtenPacket(State):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3, True
        )


class AtenNative(State):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.native_batch_norm.default(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3
        )[0]


class Native(State):
    def forward(self, x: Tensor) -> Tensor:
        output, _, _ = torch.native_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3
        )
        return output


def normalised(x: Tensor, state: State) -> Tensor:
    return F.batch_norm(x, state.running_mean, state.running_var, state.weight, None, state.training, 0.2)


def helped(x: Tensor, state: State) -> Tensor:
    return 2 * normalised(x, state)


class Helper(State):
    def forward(self, x: Tensor) -> Tensor:
        return helped(x, self)


class Method(State):
    def norm(self, x: Tensor) -> Tensor:
        return normalised(x, self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + 1


class Lambda(State):
    def forward(self, x: Tensor) -> Tensor:
        norm = lambda t: F.batch_norm(t, self.running_mean, self.running_var, training=self.training)  # noqa: E731
        return norm(x)


class Comprehension(State):
    def forward(self, x: Tensor) -> Tensor:
        parts = [
            F.batch_norm(t, self.running_mean, self.running_var, training=self.training) for t in (x, 2 * x)
        ]
        return torch.cat(parts, 1)


ten_percent = functools.partial(F.batch_norm, momentum=0.2)
partial_of_helper = functools.partial(normalised)


class Partial(State):
    def forward(self, x: Tensor) -> Tensor:
        return ten_percent(x, self.running_mean, self.running_var, training=self.training)


class PartialOfHelper(State):
    def forward(self, x: Tensor) -> Tensor:
        return partial_of_helper(x, self)


class PartialAttribute(State):
    def __init__(self) -> None:
        super().__init__()
        self.norm = functools.partial(F.batch_norm, momentum=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.running_mean, self.running_var, training=self.training)


def plus_one(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, *args, **kwargs) + 1

    return wrapped


class Decorated(State):
    @plus_one
    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self)


class Twice(State):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
        self.register_buffer("mean", torch.randn(C))
        self.register_buffer("var", torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, training=self.training)
        )
        return F.batch_norm(x, self.mean, self.var, None, self.bias, self.training, momentum=0.3)


class Inherited(Plain):
    pass


class SuperForward(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Standardised(State):
    """Standardises its weight and norms its instances beside the one call that is a site."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(C, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.batch_norm(self.kernel.view(1, C, -1), None, None, training=True).view(C, C, 1, 1)
        return normalised(F.conv2d(x, kernel), self)


class Dropping(State):
    """With dropout and a submodule that the user may freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.dropout(normalised(x, self), 0.3, self.training))


class MyBatchNorm(State):
    """Named as a norm, but it derives from Module."""

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self)


class Counting(State):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return normalised(x, self)


FORMS: dict[str, type[State]] = {
    form.__name__: form
    for form in (
        Plain, Keywords, OfTorch, Aten, AtenPacket, AtenNative, Native, Helper, Method, Lambda, Comprehension,
        Partial, PartialOfHelper, PartialAttribute, Decorated, Twice, Inherited, SuperForward,
        Standardised, Dropping, MyBatchNorm, Counting,
    )
}  # fmt: skip
TWO = ("Twice", "Comprehension")


@pytest.mark.parametrize("form", FORMS)
def test_call_converts_and_comes_back(form: str) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(C, C, 1), FORMS[form]()))
    conversion = assert_converts(model, image())
    assert conversion.report.converted == (("1", "1:1") if form in TWO else ("1",))
    assert {site.kind for site in conversion.report.sites} == {"batch_norm()"}
    assert {site.channels for site in conversion.report.sites} == {C}
    call = conversion.model[1]
    assert type(call) is FORMS[form]
    assert (call.r_max, call.d_max) == (3.0, 5.0)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in TWO])
@pytest.mark.parametrize(("momentum", "alpha"), [(0.01, 0.01), (0.3, 0.3)])
@pytest.mark.parametrize("stat", ["sigma", "var"])
def test_statistics_of_a_call_take_the_papers_step(
    form: str, momentum: float, alpha: float, stat: str
) -> None:
    model = lived_in(FORMS[form]())
    if form == "Standardised":
        model.kernel.data = torch.eye(C).view(C, C, 1, 1)
    eps = (
        1e-3
        if form
        in ("Plain", "OfTorch", "Aten", "AtenPacket", "AtenNative", "Native", "Inherited", "SuperForward")
        else 1e-5
    )
    mean, var = model.running_mean.double().numpy(), model.running_var.double().numpy()
    oracle = Oracle(mean, np.sqrt(var + eps), alpha, eps, r_max=1.5, d_max=0.2, stat=stat)
    converted = renormify(model, momentum=momentum, stat=stat)
    converted.r_max, converted.d_max = 1.5, 0.2
    for _ in range(3):
        x = image()
        inside = (
            F.conv2d(x, F.batch_norm(model.kernel.view(1, C, -1), None, None, training=True).view(C, C, 1, 1))
            if form == "Standardised"
            else x
        )
        converted(x)
        oracle.train(inside.detach().double().numpy(), np.zeros(x.shape))
    np.testing.assert_allclose(converted.running_mean, oracle.mu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((converted.running_var.double() + eps).sqrt(), oracle.sigma, rtol=1e-5)


def test_output_of_a_call_is_the_papers() -> None:
    model = lived_in(Plain())
    x = image()
    oracle = Oracle(
        model.running_mean.double().numpy(), (model.running_var.double() + 1e-3).sqrt().numpy(), 0.01, 1e-3
    )
    converted = renormify(model)
    step = oracle.train(
        x.double().numpy(), np.zeros(x.shape), model.weight.detach().double().numpy(),
        model.bias.detach().double().numpy(),
    )  # fmt: skip
    expected = F.leaky_relu(torch.from_numpy(step.y), 0.1).float()
    torch.testing.assert_close(converted(x), expected)


def test_the_model_keeps_its_class_hooks_and_attributes() -> None:
    calls: list[str] = []
    model = nn.Sequential(Plain())
    model[0].note = "kept"
    model[0].register_forward_hook(lambda *args: calls.append("forward"))
    converted = renormify(model)
    assert type(converted[0]) is Plain
    assert calls == []
    converted(image())
    assert (calls, converted[0].note) == (["forward"], "kept")


def test_what_is_changed_after_the_conversion_counts() -> None:
    model = nn.Sequential(Plain())
    converted = renormify(model, r_max=1.0, d_max=0.0, momentum="keep", stat="var")
    x = image()
    converted(x), model(x)
    converted[0].slope = model[0].slope = 0.8
    torch.testing.assert_close(converted(x), model(x))
    converted[0].r_max = 3.0
    assert not torch.allclose(converted(3 * x), model(3 * x))


def test_dropout_and_frozen_submodules_keep_their_mode() -> None:
    converted = renormify(nn.Sequential(lived_in(Dropping())))
    x = torch.randn(8, C, 16, 16)
    assert 0.55 < (converted(x) == 0).float().mean() < 0.75
    converted[0].drop.eval()
    assert 0.2 < (converted(x) == 0).float().mean() < 0.4
    before = converted[0].running_mean.clone()
    assert (converted.eval()(x) != 0).all()
    assert torch.equal(converted[0].running_mean, before)
    converted[0].train()
    assert (converted(x) == 0).any()
    assert not torch.equal(converted[0].running_mean, before)


def test_a_frozen_part_stays_frozen() -> None:
    model = nn.Sequential(Plain(), Plain())
    model[0].eval()
    converted = renormify(model)
    before = copy.deepcopy(converted.state_dict())
    converted(image())
    assert torch.equal(converted[0].running_mean, before["0.running_mean"])
    assert not torch.equal(converted[1].running_mean, before["1.running_mean"])


# ------------------------------------------------------------------------------------ optional arguments


class Optional(State):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
        *,
        shift: Any = None,
        twice: bool = False,
    ) -> Tensor:
        x = normalised(x, self) * scale
        if mask is not None:
            x = x * mask
        if twice:
            x = 2 * x
        return x if shift is None else x + shift


@pytest.mark.parametrize("training", [True, False])
def test_optional_arguments_keep_their_meaning(training: bool) -> None:
    model = lived_in(Optional()).train(training).double()
    converted = renormify(model, r_max=1.0, d_max=0.0, momentum="keep", stat="var")
    x = image().double()
    mask = (torch.rand(4, 1, 8, 8) > 0.5).double()
    for args, kwargs in [
        ((), {}),
        ((None,), {}),
        ((mask,), {}),
        ((mask, 2.0), {}),
        ((None, 2), {"twice": True}),
        ((), {"shift": mask}),
        ((), {"shift": 3, "mask": mask}),
        ((), {"twice": True, "shift": torch.ones(C, 1, 1)}),
    ]:
        torch.testing.assert_close(converted(x, *args, **kwargs), model(x, *args, **kwargs))
        torch.testing.assert_close(converted(x=x, **kwargs), model(x=x, **kwargs))
    torch.testing.assert_close(converted.running_var, model.running_var)
    with pytest.raises(TypeError):
        converted(x, nothing=1)


class Several(State):
    """Inputs and outputs that are containers."""

    def forward(self, inputs: dict[str, Tensor], more: list[Tensor]) -> dict[str, Any]:
        return {"out": normalised(inputs["x"], self), "both": (more[0], more[1] + 1)}


def test_containers_go_in_and_out() -> None:
    model = lived_in(Several())
    converted = renormify(model, r_max=1.0, d_max=0.0, momentum="keep", stat="var")
    x = image()
    ours, theirs = converted({"x": x}, [x, x]), model({"x": x}, [x, x])
    assert list(ours) == ["out", "both"]
    torch.testing.assert_close(ours, theirs)


class Variadic(State):
    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return normalised(inputs[0], self)


class LooksAtNumbers(State):
    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self) if x.sum() > -1e30 else x


class LooksAtShape(State):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return normalised(x, self)
        return x


class Keeps(State):
    """Leaves what it computed on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[float] = []
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(1.0)
        self.seen = x
        return normalised(x, self)


class NoGradient(State):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self)


class NoAutocast(State):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=True):
            return normalised(x, self)


class KeepsInAList(State):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1.0)
        return normalised(x, self)


class KeepsInAChild(State):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()

    def forward(self, x: Tensor) -> Tensor:
        self.child.seen = x
        return normalised(x, self)


@pytest.mark.parametrize(
    "form",
    [Variadic, LooksAtNumbers, LooksAtShape, NoGradient],
)
def test_forward_that_cannot_be_traced_is_named_with_what_to_do(form: type[State]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), form())
    conversion = convert(model)
    assert conversion.report.converted == ("0",)
    assert conversion.report.skipped == ("1",)
    reason = conversion.report.sites[1].reason
    assert "its forward calls batch_norm" in reason
    assert "make it call a layer" in reason
    assert "\n" not in reason
    assert "forward" not in vars(conversion.model[1])
    x = image()
    torch.manual_seed(0)
    expected = model[1](x)
    assert torch.equal(conversion.model[1](x), expected)


@pytest.mark.parametrize("form", [Keeps, KeepsInAList, KeepsInAChild, NoAutocast])
def test_forward_that_keeps_what_it_computes_goes_on_doing_so(form: type[State]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), form())
    converted = renormify(model, r_max=1.0, d_max=0.0, momentum="keep", stat="var")
    x = image()
    torch.testing.assert_close(converted(x), model(x))
    if form is Keeps:
        assert (converted[1].calls, converted[1].log) == (1, [1.0])
        torch.testing.assert_close(converted[1].seen, model[1].seen)


# ---------------------------------------------------------------------------------------------- no sites


class Frozen(State):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


class FrozenByDefault(State):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var)


@pytest.mark.parametrize("form", [Frozen, FrozenByDefault])
def test_literal_evaluation_is_frozen(form: type[State]) -> None:
    model = lived_in(nn.Sequential(form()))
    with pytest.raises(NothingToConvertError, match="frozen: the call has training=False"):
        convert(model)
    conversion = convert(model, include_frozen=True)
    x = image()
    converted = conversion.model
    with torch.no_grad():
        assert torch.equal(converted.eval()(x), model(x))
    oracle = Oracle(
        model[0].running_mean.double().numpy(), (model[0].running_var.double() + 1e-5).sqrt().numpy(), 0.01
    )
    converted.train()(x)
    oracle.train(x.double().numpy(), np.zeros(x.shape))
    np.testing.assert_allclose(converted[0].running_mean, oracle.mu, rtol=1e-5, atol=1e-6)
    back = revert(converted)
    assert torch.equal(back[0].running_mean, converted[0].running_mean)
    assert_reverts_to(model, renormify(model, include_frozen=True))


class OnlyFrozenOfTwo(State):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(normalised(x, self), self.running_mean, self.running_var)


def test_frozen_call_beside_one_that_trains() -> None:
    model = lived_in(nn.Sequential(OnlyFrozenOfTwo()))
    report = convert(model).report
    assert (report.converted, report.skipped) == (("0",), ("0:1",))
    assert_batch_norm_at_the_limit(model, image())
    assert convert(model, include_frozen=True).report.converted == ("0", "0:1")


class Computed(State):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean * 1, self.running_var.repeat(1), training=self.training)


def test_statistics_made_in_the_forward_are_left_with_a_reason() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), Computed())
    [_, site] = convert(model).report.sites
    assert (site.name, site.action) == ("1", "skipped")
    assert "its running statistics are computed in the forward" in site.reason


class OwnInstanceNorm(State):
    """As torch's: the batch goes into the channels."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        mean, var = self.running_mean.repeat(n), self.running_var.repeat(n)
        x = F.batch_norm(x.reshape(1, -1, 8, 8), mean, var, None, None, True)
        return x.view(n, -1, 8, 8)


def test_instance_norm_is_left() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(C, track_running_stats=True), OwnInstanceNorm(), nn.BatchNorm2d(C)
    )
    report = convert(model).report
    assert report.converted == ("2",)
    assert report.skipped == ("1",)


class NoStatistics(State):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, C, 1).repeat(1, 1, 2), None, None, training=True)
        return x * weight[0, :, 0].view(C, 1, 1)


def test_no_running_statistics_no_site() -> None:
    model = nn.Sequential(NoStatistics())
    with pytest.raises(NothingToConvertError, match=r"found no BatchNorm to convert in Sequential$"):
        convert(model)
    assert convert(nn.Sequential(nn.BatchNorm2d(C), NoStatistics())).report.skipped == ()


class FromArguments(nn.Module):
    """Statistics that another module owns."""

    def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, training=self.training)


class Owner(State):
    def __init__(self) -> None:
        super().__init__()
        self.call = FromArguments()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.running_mean, self.running_var)  # type: ignore[no-any-return]


def test_statistics_that_come_as_arguments() -> None:
    model = lived_in(nn.Sequential(Owner()))
    conversion = assert_converts(model, image())
    assert conversion.report.converted == ("0.call",)
    assert conversion.report.sites[0].channels is None


def test_own_momentum_none_needs_a_count() -> None:
    with pytest.raises(NothingToConvertError, match="no count of batches"):
        convert(nn.Sequential(Plain()), momentum=None)


def test_attribute_of_that_name_is_not_overwritten() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), Plain(), nn.BatchNorm2d(C))
    model[1].r_max = "mine"
    model[2].d_max = "mine"
    report = convert(model, inplace=True).report
    assert report.skipped == ("1", "2")
    assert "has an attribute r_max of its own" in report.sites[1].reason
    assert (model[1].r_max, model[2].d_max) == ("mine", "mine")


def test_filter_gets_the_module_whose_forward_calls() -> None:
    seen: list[tuple[str, str]] = []

    def note(module: nn.Module, name: str) -> bool:
        seen.append((type(module).__name__, name))
        return name != "1"

    model = nn.Sequential(Plain(), Twice())
    report = convert(model, filter_fn=note).report
    assert seen == [("Plain", "0"), ("Twice", "1"), ("Twice", "1:1")]
    assert report.skipped == ("1",)
    assert report.converted == ("0", "1:1")


def test_one_of_two_calls_is_left_as_the_filter_says() -> None:
    model = lived_in(nn.Sequential(Twice()))
    converted = renormify(model, filter_fn=lambda module, name: name == "0:1", r_max=1.0, d_max=0.0)
    x = image()
    model(x), converted(x)
    assert torch.equal(model[0].running_var, converted[0].running_var)  # of BatchNorm, as it was
    assert not torch.equal(model[0].var, converted[0].var)


def test_converted_already() -> None:
    converted = renormify(nn.Sequential(Plain()))
    with pytest.raises(NothingToConvertError, match="is Batch Renorm already"):
        convert(converted)
    overridden = nn.Sequential(Plain())
    overridden[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(NothingToConvertError, match="its forward was replaced on the instance"):
        convert(overridden)


# ------------------------------------------------------------------------------------ life after conversion


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_files_hold_the_whole_model(form: str) -> None:
    converted = renormify(lived_in(nn.Sequential(FORMS[form]())), r_max=2.0)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    x = image()
    twins = [
        copy.deepcopy(converted),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(converted)),
    ]
    torch.manual_seed(1)
    expected = converted.eval()(x), converted.train()(x)
    for twin in twins:
        torch.manual_seed(1)
        assert twin[0].r_max == 2.0
        assert_same_output((twin.eval()(x), twin.train()(x)), expected)
        assert_same_state(twin, converted)
        assert "forward" not in vars(revert(twin)[0])


@pytest.mark.parametrize("trace", [fx.symbolic_trace, lambda model: model], ids=["graph", "module"])
def test_calls_that_are_not_synchronised_are_named(trace: Callable[..., nn.Module]) -> None:
    converted = renormify(trace(nn.Sequential(nn.BatchNorm2d(C), Plain())))
    with pytest.warns(RenormifyWarning, match="functional calls stay with the batch of their own process"):
        convert_sync(converted)
    with pytest.raises(NothingToConvertError, match="found no Batch Renorm layer"):
        convert_sync(renormify(nn.Sequential(Plain())))


def test_argument_that_leads_where_no_trace_came() -> None:
    class Sometimes(State):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None and mask.any():
                x = x * mask
            return normalised(x, self)

    model, x = Sometimes(), image()
    converted = renormify(model, r_max=1.0, d_max=0.0)
    for mask in (None, torch.zeros(4, 1, 8, 8), torch.full((4, 1, 8, 8), 2.0)):
        torch.testing.assert_close(converted(x, mask), model(x, mask))


def test_attributes_of_its_parts_count() -> None:
    class Borrows(State):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.extra, self.sizes = nn.Dropout(0.5), None, (1, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(normalised(x, self), self.drop.p, self.drop.training)
            x = x * self.sizes[1]
            return x if self.extra is None else self.extra(x)

    model = lived_in(Borrows()).double()
    converted = renormify(model, r_max=1.0, d_max=0.0, momentum="keep", stat="var")
    x = image().double()
    for change in (
        lambda m: m.drop.eval(),
        lambda m: setattr(m, "sizes", (1, 3)),
        lambda m: setattr(m, "extra", nn.Tanh()),
        lambda m: m.drop.train(),
        lambda m: setattr(m.drop, "p", 0.9),
    ):
        change(model), change(converted)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(converted(x), expected)


def test_copy_moves_its_own_statistics() -> None:
    converted = renormify(nn.Sequential(Plain()))
    twin = copy.deepcopy(converted)
    twin(image())
    assert torch.equal(converted[0].running_mean, torch.zeros(C))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(form: str, training: bool) -> None:
    torch._dynamo.reset()
    converted = renormify(lived_in(nn.Sequential(FORMS[form]()))).train(training)
    eager = copy.deepcopy(converted)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    for limit in (3.0, 1.01, 2.0):
        converted[0].r_max = eager[0].r_max = limit
        x = 2 * image()
        torch.manual_seed(0)
        ours = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(ours, eager(x))
    for a, b in zip(converted.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_after_a_file_and_after_a_change() -> None:
    torch._dynamo.reset()
    converted = pickle.loads(pickle.dumps(renormify(nn.Sequential(Optional(), Plain()))))
    eager = copy.deepcopy(converted)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    x = image()
    torch.testing.assert_close(compiled(x), eager(x))
    converted[1].slope = eager[1].slope = 0.9
    torch.testing.assert_close(compiled(x), eager(x))
    call = torch.compile(converted[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(call(x, scale=3.0, twice=True), eager[0](x, scale=3.0, twice=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_exports_and_traces(form: str, training: bool) -> None:
    converted = renormify(lived_in(nn.Sequential(FORMS[form]()))).train(training)
    x = image()
    expected = copy.deepcopy(converted)(x)
    program = torch.export.export(copy.deepcopy(converted), (x,))
    if form != "Dropping" or not training:
        torch.testing.assert_close(program.module()(x), expected)
        graph_module = fx.symbolic_trace(copy.deepcopy(converted))
        torch.testing.assert_close(graph_module(x), expected)
    if not training:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that tracing is going away
            traced = torch.jit.trace(copy.deepcopy(converted), x)
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moves_and_casts(dtype: torch.dtype) -> None:
    converted = renormify(nn.Sequential(Plain())).to(dtype)
    x = image().to(dtype)
    assert converted.eval()(x).dtype == dtype
    assert converted.train()(x).dtype == dtype
    assert converted.eval()(x).dtype == dtype
    real = converted.float().to("meta").to_empty(device="cpu")
    real.load_state_dict(lived_in(nn.Sequential(Plain())).state_dict())
    assert real[0].r_max == 3.0
    assert real.train()(image()).isfinite().all()


def test_converts_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Plain(), Twice())
    converted = renormify(model)
    assert all(t.is_meta for t in (*converted.parameters(), *converted.buffers()))
    real = converted.to_empty(device="cpu")
    real.load_state_dict(lived_in(nn.Sequential(Plain(), Twice())).state_dict())
    assert real(image()).isfinite().all()


# ------------------------------------------------------------------------------------------ GraphModules


class Network(nn.Module):
    """A layer, and a call with state of its own, in a submodule used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.call = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), Keywords()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.call(self.norm(self.conv(x))))  # type: ignore[no-any-return]


def test_call_in_a_graph_of_a_training_model() -> None:
    model = lived_in(fx.symbolic_trace(Network().train()))
    conversion = convert(model)
    assert conversion.report.converted == ("norm", "call")
    converted = conversion.model
    assert isinstance(converted, fx.GraphModule)
    converted.graph.lint()
    assert sum(isinstance(module, BatchRenormCall) for module in converted.modules()) == 2
    x = image()
    # the call was recorded as training; the model's own mode decides now
    assert_batch_norm_at_the_limit(model, x)
    plain = lived_in(Network())
    plain.load_state_dict(
        converted.state_dict(), strict=False
    )  # a graph drops the bias that the call leaves out
    assert torch.equal(converted.eval()(x), plain.eval()(x))


def test_call_in_a_graph_of_an_evaluating_model_trains() -> None:
    network = lived_in(Network()).eval()
    model = fx.symbolic_trace(network)
    conversion = convert(model)
    assert conversion.report.converted == ("norm", "call")
    assert "recorded as evaluation" in conversion.report.sites[1].reason
    x = image()
    converted = conversion.model
    assert torch.equal(converted.eval()(x), model(x))
    assert torch.equal(revert(converted).eval()(x), model(x))
    twin = renormify(network.train())
    torch.testing.assert_close(converted.train()(x), twin(x))
    for key, value in converted.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key])


def test_limits_of_a_call_in_a_graph_may_be_set() -> None:
    converted = renormify(lived_in(fx.symbolic_trace(nn.Sequential(Keywords()))))
    x = 3 * image()
    bearers = [converted.get_submodule("0")]
    wide = converted(x)
    bearers[0].r_max, bearers[0].d_max = 1.0, 0.0
    assert not torch.allclose(converted(x), wide)
    torch.testing.assert_close(converted(x), lived_reference(converted, x), rtol=1e-4, atol=1e-4)


def lived_reference(model: nn.Module, x: Tensor) -> Tensor:
    weight = next(parameter for name, parameter in model.named_parameters() if name.endswith("weight"))
    return F.batch_norm(x, None, None, weight, training=True)


@pytest.mark.parametrize("training", [True, False])
def test_graph_module_inside_a_plain_model(training: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.graph = nn.BatchNorm2d(C), fx.symbolic_trace(Network().train(training))

        def forward(self, x: Tensor) -> Tensor:
            return self.graph(self.first(x)) if x.sum() > -1e30 else x  # type: ignore[no-any-return]

    model = lived_in(Outer()).train(training)
    conversion = convert(model)
    assert conversion.report.converted == ("first", "graph.norm", "graph.call")
    assert isinstance(conversion.model.graph, fx.GraphModule)
    x = image()
    expected = lived_in(Outer())
    expected.load_state_dict(conversion.model.state_dict())
    plain = nn.Sequential(expected.first, Network())
    plain[1].load_state_dict(expected.graph.state_dict(), strict=False)
    assert torch.equal(conversion.model.eval()(x), plain.eval()(x))
    assert_batch_norm_at_the_limit(plain, x)


def test_state_at_the_root_of_a_graph() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    mean, var = graph.get_attr("mean"), graph.get_attr("var")
    graph.output(graph.call_function(F.batch_norm, (x, mean, var), {"training": True, "momentum": 0.2}))
    root = nn.Module()
    root.register_buffer("mean", torch.randn(C))
    root.register_buffer("var", torch.rand(C) + 0.5)
    model = fx.GraphModule(root, graph)
    conversion = convert(model)
    assert conversion.report.converted == ("",)
    conversion.model.r_max = 2.0
    buffer = io.BytesIO()
    torch.save(conversion.model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for same in (conversion.model, copy.deepcopy(conversion.model), loaded):
        assert same.batch_renorm.r_max == same.r_max == 2.0
        same.r_max = 1.5
        assert same.batch_renorm.r_max == 1.5
    assert not hasattr(revert(conversion.model), "r_max")
    assert_batch_norm_at_the_limit(model, image())
    assert_same_state(revert(conversion.model), model)


def test_rewrite_serves_calls() -> None:
    model = fx.symbolic_trace(Network())
    result = rewrite(model)
    assert result.modified
    assert result.graph_module is model
    assert not rewrite(model).modified
    assert sum(isinstance(module, BatchRenormCall) for module in model.modules()) == 2
    assert is_batch_renorm(model.norm)
    assert not any(map(bears_limits, revert(model).modules()))


def test_operators_of_unknown_kind_are_never_touched() -> None:
    def strange_batch_norm(x: Tensor, mean: Tensor) -> Tensor:
        return x - mean.view(1, -1, 1, 1)

    model = fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(C)))
    with model.graph.inserting_before(next(iter(reversed(model.graph.nodes)))):
        norm = next(node for node in model.graph.nodes if node.op == "call_module")
        mean = model.graph.get_attr("0.running_mean")
        strange = model.graph.call_function(strange_batch_norm, (norm, mean))
    strange.graph.output_node().args = (strange,)
    model.recompile()
    conversion = convert(model)
    [known, unknown] = sorted(conversion.report.sites, key=lambda site: site.action)
    assert known.name == "0"
    assert (unknown.action, unknown.reason) == ("skipped", "an operator of unknown kind")


@pytest.mark.parametrize("graph_training", [True, False])
def test_rewritten_graph_is_copied(graph_training: bool) -> None:
    converted = renormify(lived_in(fx.symbolic_trace(Network().train(graph_training)))).train()
    twin, x = copy.deepcopy(converted), image()
    assert torch.equal(twin.eval()(x), converted.eval()(x))
    assert torch.equal(twin.train()(x), converted.train()(x))
    assert_same_state(twin, converted)
    assert torch.equal(revert(twin).eval()(x), twin.eval()(x))


@pytest.mark.parametrize("graph_training", [True, False])
def test_rewritten_graph_survives_a_file(graph_training: bool) -> None:
    converted = renormify(lived_in(fx.symbolic_trace(Network().train(graph_training)))).train()
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    loaded, x = torch.load(buffer, weights_only=False), image()
    assert torch.equal(loaded.eval()(x), converted.eval()(x))
    converted.train()
    loaded.train()
    for limit in (3.0, 1.5):  # nothing is baked: neither the mode nor the limits
        for model in (converted, loaded):
            for module in filter(bears_limits, model.modules()):
                module.r_max = limit
        assert torch.equal(loaded(x), converted(x))
    assert_same_state(loaded, converted)


def test_limits_of_calls_in_a_graph_are_those_of_the_module_that_made_them() -> None:
    model = fx.symbolic_trace(Network())
    converted = renormify(model)
    calls = [module for module in converted.modules() if isinstance(module, BatchRenormCall)]
    converted.call.r_max, converted.call.d_max = 2.0, 1.0
    assert {(call.r_max, call.d_max) for call in calls} == {(2.0, 1.0)}
    assert (converted.call.r_max, converted.call.d_max) == (2.0, 1.0)
    with pytest.raises(ValueError, match="r_max must be at least 1"):
        converted.call.r_max = 0.5
    assert [type(module) for module in revert(converted).modules() if bears_limits(module)] == []


def test_compiles_a_rewritten_graph() -> None:
    torch._dynamo.reset()
    converted = renormify(lived_in(fx.symbolic_trace(Network())))
    eager, x = copy.deepcopy(converted), image()
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    for limit in (3.0, 1.5):
        converted.call.r_max = eager.call.r_max = limit
        torch.testing.assert_close(compiled(x), eager(x))
