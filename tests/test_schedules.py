"""The schedules of r_max and d_max, and the scheduler that applies them to a model."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.utils import counters

from renormify import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PaperSchedule,
    RenormScheduler,
    renormify,
)
from renormify.errors import InputError, NothingToConvertError, RenormifyWarning
from renormify.layers import is_batch_renorm


def net() -> nn.Module:
    return renormify(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    )


def limits(model: nn.Module) -> list[tuple[float, float]]:
    """Of each layer, by its attributes and by the tensors that a compiled graph reads."""
    layers = [module for module in model.modules() if is_batch_renorm(module)]
    for layer in layers:
        assert layer._r_max.item() == pytest.approx(layer.r_max, rel=1e-7)
        assert layer._d_max.item() == pytest.approx(layer.d_max, rel=1e-7)
    return [(layer.r_max, layer.d_max) for layer in layers]


# --- schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (1.0, 0.0)),
        (5_000, (1.0, 0.0)),
        (5_001, (1 + 2 / 35_000, 5 / 20_000)),
        (15_000, (1 + 2 * 10 / 35, 2.5)),
        (25_000, (1 + 2 * 20 / 35, 5.0)),
        (40_000, (3.0, 5.0)),
        (130_000, (3.0, 5.0)),
    ],
)
def test_the_papers_ramp(step, expected):
    assert PaperSchedule().at(step) == pytest.approx(expected, rel=1e-12)


def test_the_papers_ramp_for_a_run_of_another_length():
    for schedule in (PaperSchedule.scaled(13_000), PaperSchedule().scaled(13_000)):
        assert schedule == PaperSchedule(500, 3.0, 4_000, 5.0, 2_500)
    assert PaperSchedule(r_max=2.0, d_max=4.0).scaled(130).at(130) == (2.0, 4.0)
    assert PaperSchedule.scaled(1).at(0) == (3.0, 5.0)  # no step left for a ramp


def test_constant():
    assert {ConstantSchedule().at(step) for step in (0, 7, 10**9)} == {(3.0, 5.0)}
    assert ConstantSchedule(1, 0).at(3) == (1.0, 0.0)
    assert ConstantSchedule(math.inf, math.inf).at(0) == (math.inf, math.inf)


def test_ramps_by_fraction_of_the_run():
    linear = LinearSchedule(1000, r_max=3.0, d_max=5.0, start=0.1, end=0.5)
    cosine = CosineSchedule(1000, r_max=3.0, d_max=5.0, start=0.1, end=0.5)
    for schedule in (linear, cosine):
        assert schedule.at(0) == schedule.at(100) == (1.0, 0.0)
        assert schedule.at(300) == pytest.approx((2.0, 2.5), rel=1e-12)  # half way in both
        assert schedule.at(500) == schedule.at(5000) == (3.0, 5.0)
        steps = [schedule.at(step) for step in range(0, 1001, 10)]
        assert steps == sorted(steps)
    assert linear.at(200) == pytest.approx((1.5, 1.25), rel=1e-12)
    share = (1 - math.cos(math.pi / 4)) / 2
    assert cosine.at(200) == pytest.approx((1 + 2 * share, 5 * share), rel=1e-12)


@pytest.mark.parametrize(
    "schedule", [PaperSchedule(), ConstantSchedule(), LinearSchedule(9), CosineSchedule(9)]
)
def test_schedules_are_frozen_and_comparable(schedule):
    assert copy.deepcopy(schedule) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.r_max = 2.0
    assert type(schedule).__doc__.startswith(("The ", "A "))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantSchedule(r_max=0.5), r"ConstantSchedule.*r_max must be .* at least 1 \(got 0.5\)"),
        (lambda: ConstantSchedule(d_max=-1.0), r"ConstantSchedule.*d_max must be .* at least 0 \(got -1.0\)"),
        (lambda: ConstantSchedule(r_max=math.nan), r"r_max must be .*got nan"),
        (lambda: ConstantSchedule(r_max="3"), r"r_max must be .*got '3'"),
        (lambda: PaperSchedule(r_max=0.9), r"PaperSchedule.*r_max"),
        (lambda: PaperSchedule(d_max=math.inf), r"PaperSchedule.*d_max must be finite"),
        (lambda: PaperSchedule(warmup_steps=-1), r"PaperSchedule.*0 <= warmup_steps"),
        (lambda: PaperSchedule(r_max_step=4_999), r"PaperSchedule.*warmup_steps <= r_max_step"),
        (lambda: PaperSchedule(d_max_step=10), r"PaperSchedule.*warmup_steps <= d_max_step"),
        (lambda: PaperSchedule.scaled(0), r"PaperSchedule: total_steps must be .*at least 1 \(got 0\)"),
        (lambda: LinearSchedule(0), r"LinearSchedule: total_steps"),
        (lambda: LinearSchedule(1.5), r"LinearSchedule: total_steps .*got 1.5"),
        (lambda: LinearSchedule(10, start=0.5, end=0.4), r"LinearSchedule.*start <= end"),
        (lambda: CosineSchedule(10, end=1.5), r"CosineSchedule.*end <= 1"),
        (lambda: CosineSchedule(10, r_max=0.0), r"CosineSchedule.*r_max"),
    ],
)
def test_bad_schedules_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- the scheduler ---------------------------------------------------------------------------------------


def test_limits_apply_at_once_and_follow_the_schedule():
    model, schedule = net(), LinearSchedule(10, start=0.0, end=1.0)
    scheduler = RenormScheduler(model, schedule)
    for step in range(13):
        assert limits(model) == [schedule.at(step)] * 2
        scheduler.step()


def test_a_users_function_is_a_schedule():
    model = net()
    scheduler = RenormScheduler(model, lambda step: (1 + step, step / 2))
    scheduler.step()
    scheduler.step()
    assert limits(model) == [(3.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((0.99, 5.0), r"falling at step 3: r_max must be a number of at least 1 \(got 0.99\)"),
        ((3.0, -0.1), r"falling at step 3: d_max must be a number of at least 0 \(got -0.1\)"),
        ((math.nan, 5.0), r"falling at step 3: r_max .*got nan"),
        ((3.0, math.nan), r"falling at step 3: d_max .*got nan"),
        (3.0, r"falling at step 3: expected a pair"),
        ((3.0,), r"falling at step 3: expected a pair"),
    ],
)
def test_a_schedule_that_goes_out_of_range_is_named_with_the_step(bad, message):
    def falling(step):
        return bad if step == 3 else (2.0, 1.0)

    model = net()
    scheduler = RenormScheduler(model, falling)
    scheduler.step()
    scheduler.step()
    with pytest.raises(InputError, match=message):
        scheduler.step()
    assert limits(model) == [(2.0, 1.0)] * 2
    assert scheduler.state_dict() == {"step": 2}


def test_something_that_is_no_schedule_is_named():
    with pytest.raises(InputError, match=r"a schedule or a function of the step \(got float\)"):
        RenormScheduler(net(), 3.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: RenormScheduler(model, PaperSchedule), r"not its class: PaperSchedule\(\.\.\.\)"),
        (lambda model: RenormScheduler("x", ConstantSchedule()), r"expected an nn.Module .got str"),
        (
            lambda model: RenormScheduler(model, ConstantSchedule(), groups=[ConstantSchedule()]),
            r"groups\[0\] .* must be a pair \(filter_fn, schedule\)",
        ),
        (
            lambda model: RenormScheduler(model, ConstantSchedule(), groups=[(None, ConstantSchedule())]),
            r"groups\[0\] .* must be a pair \(filter_fn, schedule\)",
        ),
        (lambda model: PaperSchedule("5"), "PaperSchedule: warmup_steps must be a number .got '5'"),
        (lambda model: LinearSchedule(10, start="0"), "LinearSchedule: start must be a number .got '0'"),
    ],
)
def test_what_is_of_another_kind_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make(net())


def test_groups_of_layers_go_their_own_way():
    model = net()
    scheduler = RenormScheduler(
        model,
        ConstantSchedule(2.0, 1.0),
        groups=[
            (lambda module, name: name == "4", lambda step: (1.0 + step, 0.0)),
            (lambda module, name: True, ConstantSchedule(7.0, 7.0)),
        ],
    )
    scheduler.step()
    assert limits(model) == [(7.0, 7.0), (2.0, 0.0)]
    with pytest.raises(InputError, match=r"groups\[0\].*ConstantSchedule, takes none of the 2"):
        RenormScheduler(model, ConstantSchedule(), groups=[(lambda module, name: False, ConstantSchedule())])
    # No schedule has touched the model before all groups were known to be sound.
    assert limits(model) == [(7.0, 7.0), (2.0, 0.0)]


def test_a_model_without_batch_renorm_is_named():
    with pytest.raises(NothingToConvertError, match=r"no Batch Renorm layer in BatchNorm2d to schedule"):
        RenormScheduler(nn.BatchNorm2d(3), ConstantSchedule())


def test_state_is_taken_up_at_once():
    schedule = PaperSchedule.scaled(100)
    first = RenormScheduler(net(), schedule)
    for _ in range(17):
        first.step()
    model = net()
    second = RenormScheduler(model, schedule)
    second.load_state_dict(first.state_dict())
    assert limits(model) == [schedule.at(17)] * 2
    second.step()
    assert limits(model) == [schedule.at(18)] * 2
    assert second.state_dict() == {"step": 18}


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": 1.5}, {"step": True}, {"last_epoch": 3}, None])
def test_a_state_of_something_else_is_refused(state):
    scheduler = RenormScheduler(net(), ConstantSchedule())
    with pytest.raises(InputError, match="expected the state dict of a RenormScheduler"):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"step": 0}


def _train(model, scheduler, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def test_an_interrupted_run_ends_as_the_whole_one_bit_for_bit(tmp_path):
    def start():
        torch.manual_seed(1)
        model = net().train()
        return (
            model,
            RenormScheduler(model, CosineSchedule(200, start=0.1, end=0.9)),
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        )

    whole = start()
    _train(*whole, range(200))
    part = start()
    _train(*part, range(97))
    torch.save([each.state_dict() for each in part], tmp_path / "state.pt")
    resumed = start()
    for each, state in zip(resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        each.load_state_dict(state)
    _train(*resumed, range(97, 200))
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key]), key
    assert limits(whole[0]) == limits(resumed[0])


def test_no_graph_break_and_no_recompile():
    torch._dynamo.reset()
    counters.clear()
    model = net().train()
    scheduler = RenormScheduler(model, LinearSchedule(6, start=0.0, end=1.0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, outputs = torch.randn(2, 3, 8, 8), []
    for _ in range(6):
        outputs.append(compiled(x))
        outputs[-1].sum().backward()
        scheduler.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert not torch.equal(outputs[0], outputs[-1])  # the limits did move something


def test_a_compiled_model_may_be_given_too():
    model = net()
    scheduler = RenormScheduler(torch.compile(model), ConstantSchedule(2.0, 2.0))
    scheduler.step()
    assert limits(model) == [(2.0, 2.0)] * 2


def test_rejected_batches_are_told_once():
    model = net().train()
    scheduler = RenormScheduler(model, ConstantSchedule(), watch_every=2)
    model(torch.full((2, 3, 8, 8), math.nan))
    scheduler.step()
    with pytest.warns(
        RenormifyWarning, match=r"2 Batch Renorm layers saw inf or NaN by step 2, the first '1'"
    ):
        scheduler.step()
    model(torch.full((2, 3, 8, 8), math.nan))
    scheduler.step()
    scheduler.step()  # a second warning would be an error here


class Call(nn.Module):
    """A functional call, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


@pytest.mark.parametrize("as_graph", [False, True])
def test_limits_of_functional_calls_move_too(as_graph: bool) -> None:
    original = nn.Sequential(Call(), nn.BatchNorm2d(3))
    model = renormify(fx.symbolic_trace(original) if as_graph else original).train()
    x = 5 + 3 * torch.randn(4, 3, 6, 6)
    RenormScheduler(model, ConstantSchedule(1.0, 0.0))  # which is BatchNorm
    output = model(x)
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    RenormScheduler(model, ConstantSchedule(1e6, 1e6))  # and this is evaluation, for the first of the two
    call = model[0] if not as_graph else model.get_submodule("0")
    bearer = next(module for module in call.modules() if hasattr(module, "r_max"))
    assert (bearer.r_max, bearer.d_max) == (1e6, 1e6)
