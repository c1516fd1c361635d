"""Activation checkpointing: the second run of a forward repeats the first, and moves nothing.

Batch Renorm's r and d depend on statistics that the first run has moved. A layer that computes them anew in
the second run differentiates another function; the gradients here would differ in their first digit.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from renormify import BatchRenorm1d, BatchRenorm2d, SyncBatchRenorm, renormify, replay

C = 4
Wrap = Callable[..., Any]
Scenario = Callable[["Net", Tensor, Wrap], Iterator[Tensor]]

REENTRANT = [True, False]
# A nested segment of the reentrant kind runs without gradient at first, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

every_mode = pytest.mark.parametrize("use_reentrant", REENTRANT, ids=["reentrant", "not reentrant"])


class Net(nn.Module):
    """A shared layer, one more, and neighbours with parameters of their own."""

    def __init__(self, make: Callable[..., Any] = BatchRenorm1d, **options: Any) -> None:
        super().__init__()
        options = {"momentum": 0.3, "r_max": 1.5, "d_max": 0.7, **options}
        self.shared = make(C, dtype=torch.float64, **options)
        self.other = make(C, dtype=torch.float64, **options)
        self.first = nn.Linear(C, C, dtype=torch.float64)
        self.last = nn.Linear(C, C, dtype=torch.float64)
        with torch.no_grad():
            for layer in (self.shared, self.other):
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn(C) + 1)
                layer.running_mean.copy_(torch.randn(C))
                layer.running_var.copy_(torch.rand(C) + 0.3)

    def mask(self, x: Tensor) -> Tensor:
        """The same for the same batch."""
        return x[:, 0] > x[:, 0].min()


def _plain(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


def _checkpointed(use_reentrant: bool, **options: Any) -> Wrap:
    return functools.partial(checkpoint, use_reentrant=use_reentrant, **options)


def _loss(y: Tensor) -> Tensor:
    """One whose gradient differs from element to element, so that no part of an error cancels."""
    ramp = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)
    return (y * ramp).sum() + y.pow(3).sum() / 10


def _once(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: net.last(net.shared(net.first(x)).tanh()), x))


def _alone(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(net.shared, x))


def _twice_different_inputs(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: net.shared(net.first(net.shared(x)).tanh()), x))


def _twice_same_input(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: net.first(net.shared(x)) * net.last(net.shared(x)), x))


def _five_times_same_input(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: sum(net.shared(x) * power for power in range(1, 6)), x))


def _two_layers(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: net.other(net.first(net.shared(x)).tanh()), x))


def _two_segments(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    y = wrap(lambda x: net.first(net.shared(x)).tanh(), x)
    yield _loss(wrap(lambda y: net.last(net.shared(net.other(y))), y))


def _layer_between_segments(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    y = net.shared(wrap(lambda x: net.first(net.shared(x)).tanh(), x))
    yield _loss(wrap(lambda y: net.last(net.shared(y).tanh()), y))


def _nested(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    def inner(x: Tensor) -> Tensor:
        return net.first(net.shared(x)).tanh()  # type: ignore[no-any-return]

    def outer(x: Tensor) -> Tensor:
        return net.other(wrap(inner, net.last(x)).tanh())  # type: ignore[no-any-return]

    yield _loss(wrap(outer, x))


def _nested_thrice(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    def inner(x: Tensor) -> Tensor:
        return net.shared(x).tanh()  # type: ignore[no-any-return]

    def middle(x: Tensor) -> Tensor:
        return net.shared(net.first(wrap(inner, x))).tanh()  # type: ignore[no-any-return]

    def outer(x: Tensor) -> Tensor:
        return net.other(net.last(wrap(middle, net.shared(x).tanh())))  # type: ignore[no-any-return]

    yield _loss(wrap(outer, x))


def _nested_with_the_same_input_twice_inside(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    def inner(x: Tensor) -> Tensor:
        return net.first(net.shared(x)) * net.last(net.shared(x))  # type: ignore[no-any-return]

    yield _loss(wrap(lambda x: net.other(wrap(inner, x)), x))


def _steps(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    for step in range(4):
        yield from _nested(net, x * (1 + step) + step, wrap)


def _same_batch_step_after_step(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    for _ in range(4):
        yield from _twice_same_input(net, x, wrap)


def _masked(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    for step in (1, 2):
        yield _loss(wrap(lambda x: net.first(net.shared(x, net.mask(x)).tanh()), x * step))


def _masked_and_not(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: net.shared(x, net.mask(x)) * net.shared(x), x))


def _dropout(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    # It is drawn before the layer: only with the state of the generator restored is the batch the same one.
    for _ in range(2):
        yield _loss(wrap(lambda x: net.shared(nn.functional.dropout(net.first(x), 0.4)), x))


def _nothing_to_learn(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    net.shared.momentum = 0.0
    yield from _twice_same_input(net, x, wrap)


def _cumulative(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    net.shared.momentum = None
    yield from _steps(net, x, wrap)


def _limits_that_move(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    # Between forward and backward: the replay must not take the new limits.
    for limit in (1.2, 3.0):
        net.shared.r_max, net.shared.d_max = limit, limit
        loss = next(_once(net, x, wrap))
        net.shared.r_max, net.shared.d_max = 1.0, 0.0
        yield loss


SCENARIOS: list[Scenario] = [
    _once,
    _alone,
    _twice_different_inputs,
    _twice_same_input,
    _five_times_same_input,
    _two_layers,
    _two_segments,
    _layer_between_segments,
    _nested,
    _nested_thrice,
    _nested_with_the_same_input_twice_inside,
    _steps,
    _same_batch_step_after_step,
    _masked,
    _masked_and_not,
    _dropout,
    _nothing_to_learn,
    _cumulative,
    _limits_that_move,
]


def _input(rows: int = 6) -> Tensor:
    return torch.randn(rows, C, dtype=torch.float64) * 2 + 1


def _run(scenario: Scenario, net: Net, x: Tensor, wrap: Wrap) -> dict[str, Tensor]:
    """Losses, gradients and state after a scenario, each of whose losses is followed by its backward."""
    net = copy.deepcopy(net)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    losses = []
    for loss in scenario(net, x, wrap):
        loss.backward()
        losses.append(loss.detach())
    return _outcome(net, x, losses)


def _outcome(net: nn.Module, x: Tensor, losses: list[Tensor]) -> dict[str, Tensor]:
    assert x.grad is not None
    results = {"input": x.grad, "losses": torch.stack(losses)}
    results |= {
        f"gradient of {name}": parameter.grad
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }
    return results | dict(net.named_buffers())


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_mode
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__.strip("_"))
def test_nothing_tells_that_there_was_checkpointing(
    scenario: Scenario, use_reentrant: bool, kernels: str
) -> None:
    net, x = Net(), _input()
    expected = _run(scenario, net, x, _plain)
    _assert_same(_run(scenario, net, x, _checkpointed(use_reentrant)), expected)
    assert not torch.equal(expected["shared.running_mean"], net.shared.running_mean) or (
        scenario is _nothing_to_learn
    )


@every_mode
@pytest.mark.parametrize("scenario", [_once, _nested], ids=["once", "nested"])
@pytest.mark.parametrize(
    "options",
    [{"stat": "var"}, {"affine": False}, {"bias": False}, {"momentum": None}, {"make": SyncBatchRenorm}],
    ids=["var", "no affine", "no bias", "cumulative", "sync"],
)
def test_every_kind_of_layer(
    scenario: Scenario, use_reentrant: bool, options: dict[str, Any], kernels: str
) -> None:
    net, x = Net(**options), _input()
    _assert_same(_run(scenario, net, x, _checkpointed(use_reentrant)), _run(scenario, net, x, _plain))


@every_mode
@pytest.mark.parametrize("scenario", [_once, _two_segments, _twice_different_inputs, _steps])
def test_a_layer_without_replay_would_fail_here(
    scenario: Scenario, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the public layers do; if this passes, the tests above show nothing.
    net, x = Net(), _input()
    expected = _run(scenario, net, x, _plain)
    monkeypatch.setattr("renormify.functional.find_record", lambda *_: None)
    actual = _run(scenario, net, x, _checkpointed(use_reentrant))
    with pytest.raises(AssertionError):
        _assert_same(actual, expected)
    assert (actual["gradient of shared.weight"] - expected["gradient of shared.weight"]).abs().max() > 0.01
    assert actual["shared.num_batches_tracked"] > expected["shared.num_batches_tracked"]


@every_mode
def test_batches_are_counted_once(use_reentrant: bool, kernels: str) -> None:
    results = _run(_nested_thrice, Net(), _input(), _checkpointed(use_reentrant))
    assert int(results["shared.num_batches_tracked"]) == 3
    assert int(results["other.num_batches_tracked"]) == 1


@every_mode
def test_rejected_batches_are_counted_once(use_reentrant: bool, kernels: str) -> None:
    net, x = Net(), _input()
    x[0, 0] = torch.nan
    net.first = nn.Identity()
    before = net.shared.running_mean.clone()
    _loss(_checkpointed(use_reentrant)(net.shared, x.requires_grad_())).backward()
    assert int(net.shared.rejected_batches) == 1
    assert torch.equal(net.shared.running_mean, before)
    _loss(_checkpointed(use_reentrant)(net.shared, _input().requires_grad_())).backward()
    assert int(net.shared.num_batches_tracked) == 1


@every_mode
def test_evaluation_in_a_segment_leaves_everything(use_reentrant: bool) -> None:
    net, x = Net().eval(), _input()
    results = _run(_nested, net, x, _checkpointed(use_reentrant))
    _assert_same(results, _run(_nested, net, x, _plain))
    for name, buffer in net.named_buffers():
        assert torch.equal(results[name], buffer)


SHARED_TWICE = (_two_segments, _twice_different_inputs)


@every_mode
@pytest.mark.parametrize(
    ("scenario", "same"),
    [
        (_once, False),
        (_once, True),
        (_nested, False),
        *((twice, same) for twice in SHARED_TWICE for same in (False, True)),
    ],
)
def test_two_forwards_then_two_backwards(
    scenario: Scenario, use_reentrant: bool, same: bool, kernels: str
) -> None:
    start, batches = Net(), [_input(), _input()]
    if same:
        batches[1] = batches[0]
    results = []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        net, x = copy.deepcopy(start), torch.stack(batches).requires_grad_()
        for _ in range(3):
            losses = [next(scenario(net, batch, wrap)) for batch in x]
            for loss in losses:
                loss.backward()
        results.append(_outcome(net, x, [loss.detach() for loss in losses]))
        assert int(net.shared.num_batches_tracked) == 6 * (2 if scenario in SHARED_TWICE else 1)
    _assert_same(*reversed(results))


@every_mode
def test_backward_of_other_batches_in_the_reverse_order(use_reentrant: bool, kernels: str) -> None:
    start, batches = Net(), [_input(), _input(), _input()]
    results = []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        net, x = copy.deepcopy(start), torch.stack(batches).requires_grad_()
        losses = [next(_once(net, batch, wrap)) for batch in x]
        torch.stack(losses).sum().backward()  # autograd begins with the last
        results.append(_outcome(net, x, [loss.detach() for loss in losses]))
    _assert_same(*reversed(results))


@every_mode
def test_forwards_and_backwards_interleaved_as_in_a_pipeline(use_reentrant: bool, kernels: str) -> None:
    start, batches = Net(), [_input() for _ in range(5)]
    results = []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        net, x = copy.deepcopy(start), torch.stack(batches).requires_grad_()
        waiting = [next(_nested(net, x[0], wrap))]
        seen = [waiting[0].detach()]
        for batch in x[1:]:
            waiting.append(next(_nested(net, batch, wrap)))
            seen.append(waiting[-1].detach())
            waiting.pop(0).backward()
        waiting.pop(0).backward()
        results.append(_outcome(net, x, seen))
    _assert_same(*reversed(results))


@every_mode
@pytest.mark.parametrize("scenario", [_once, _nested, _twice_same_input, _two_segments])
def test_graph_that_is_kept_gives_the_same_gradient_again(
    scenario: Scenario, use_reentrant: bool, kernels: str
) -> None:
    net, x = Net(), _input().requires_grad_()
    leaves = [x, *net.parameters()]
    loss = next(scenario(net, x, _checkpointed(use_reentrant)))
    state = {name: buffer.clone() for name, buffer in net.named_buffers()}
    gradients = []
    for keep in (True, True, False):
        net.zero_grad()
        x.grad = None
        loss.backward(retain_graph=keep)
        gradients.append([None if leaf.grad is None else leaf.grad.clone() for leaf in leaves])
    for again in gradients[1:]:
        for first, second in zip(gradients[0], again, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, state[name]), name


def test_second_order_through_a_segment(kernels: str) -> None:
    # The reentrant kind does not differentiate twice, for any layer.
    start, x = Net(), _input()
    results = []
    for wrap in (_plain, _checkpointed(False)):
        net, leaf = copy.deepcopy(start), x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(next(_once(net, leaf, wrap)), leaf, create_graph=True)
        slope.square().sum().backward()
        results.append(_outcome(net, leaf, [slope.detach().sum()]))
    _assert_same(*reversed(results))


def test_segments_that_use_autograd_grad() -> None:
    start, x = Net(), _input()
    results = []
    for wrap in (_plain, _checkpointed(False)):
        net, leaf = copy.deepcopy(start), x.clone().requires_grad_()
        loss = next(_two_segments(net, leaf, wrap))
        names = [name for name, _ in net.named_parameters()]
        gradients = torch.autograd.grad(loss, [leaf, *net.parameters()])
        results.append(dict(zip(["input", *names], gradients, strict=True)) | dict(net.named_buffers()))
    _assert_same(*reversed(results))


@every_mode
def test_sequential_in_segments(use_reentrant: bool, kernels: str) -> None:
    norms = [Net().shared for _ in range(4)]
    start = nn.Sequential(*(nn.Sequential(nn.Linear(C, C).double(), norm, nn.Tanh()) for norm in norms))
    x, results = _input(), []
    for segments in (0, 2, 4):
        model, leaf = copy.deepcopy(start), x.clone().requires_grad_()
        for _ in range(2):
            y = (
                checkpoint_sequential(model, segments, leaf, use_reentrant=use_reentrant)
                if segments
                else model(leaf)
            )
            _loss(y).backward()
        results.append(_outcome(model, leaf, [y.detach().sum()]))
    for actual in results[1:]:
        _assert_same(actual, results[0])


@every_mode
def test_statistics_without_a_gradient_before_training(use_reentrant: bool, kernels: str) -> None:
    # Forwards in training mode that no backward follows, on batches of their own.
    start, warm, x = Net(), [_input() for _ in range(40)], _input()
    results = []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        net = copy.deepcopy(start)
        with torch.no_grad():
            for batch in warm:
                net.shared(batch)
        results.append(_run(_nested_thrice, net, x, wrap))
    _assert_same(*reversed(results))


def test_copies_made_between_forward_and_backward() -> None:
    net, x = Net(), _input()
    expected = _run(_once, net, x, _plain)
    leaf = x.clone().requires_grad_()
    loss = next(_once(net, leaf, _checkpointed(False)))
    twin = copy.deepcopy(net)
    loss.backward()
    _assert_same(_outcome(net, leaf, [loss.detach()]), expected)
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, expected[name])
    assert all(parameter.grad is None for parameter in twin.parameters())


# --------------------------------------------------------------------------------- what is kept, and how much


@every_mode
def test_many_forwards_before_their_backward_are_exact(use_reentrant: bool) -> None:
    start, batches, results = Net(), [_input() for _ in range(40)], []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        net, x = copy.deepcopy(start), torch.stack(batches).requires_grad_()
        losses = [next(_once(net, batch, wrap)) for batch in x]
        torch.stack(losses).sum().backward()
        results.append(_outcome(net, x, [loss.detach() for loss in losses]))
    _assert_same(*reversed(results))


def test_replay_after_the_next_step_is_exact() -> None:
    start, batches, results = Net(), [_input(), _input()], []
    for wrap in (_plain, _checkpointed(False)):
        net, x = copy.deepcopy(start), torch.stack(batches).requires_grad_()
        loss = next(_alone(net, x[0], wrap))
        loss.backward(retain_graph=True)
        next(_alone(net, x[1], wrap))
        loss.backward()
        results.append(_outcome(net, x, [loss.detach()]))
    _assert_same(*reversed(results))


@every_mode
def test_records_go_with_their_segment(use_reentrant: bool) -> None:
    gc.collect()
    before = len(replay._segments)
    net, x = Net(), _input().requires_grad_()
    loss = next(_once(net, x, _checkpointed(use_reentrant)))
    assert len(replay._segments) == before + 1
    loss.backward()
    del loss
    gc.collect()
    assert len(replay._segments) == before


def test_layer_that_runs_in_a_backward_hook_is_a_first_run() -> None:
    layer, x = Net().shared, _input().requires_grad_()
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> None:
        seen.append(layer(gradient))

    y = x * 2
    y.register_hook(hook)
    y.sum().backward()
    assert len(seen) == 1
    assert int(layer.num_batches_tracked) == 1


# --------------------------------------------------------------------------------------------- whole models


def _densenet(memory_efficient: bool) -> nn.Module:
    from torchvision.models import DenseNet

    torch.manual_seed(0)
    return DenseNet(4, (2, 2), 8, 2, num_classes=3, memory_efficient=memory_efficient)


def test_densenet_that_saves_memory() -> None:
    results = []
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for memory_efficient in (False, True):
        net = renormify(_densenet(memory_efficient).double(), momentum=0.1, r_max=2.0, d_max=1.0)
        leaf, losses = x.clone().requires_grad_(), []
        for step in range(2):
            loss = _loss(net(leaf * (1 + step)))
            loss.backward()
            losses.append(loss.detach())
        results.append(_outcome(net, leaf, losses))
    _assert_same(*reversed(results))
    counts = [int(value) for name, value in results[1].items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 11
    assert set(counts) == {2}


@every_mode
def test_convolutions_in_float32_and_channels_last(use_reentrant: bool) -> None:
    torch.manual_seed(3)
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3), BatchRenorm2d(8, momentum=0.3), nn.ReLU(), nn.Conv2d(8, 8, 3), BatchRenorm2d(8)
    ).to(memory_format=torch.channels_last)
    x = (torch.randn(4, 3, 9, 9) * 3 + 1).to(memory_format=torch.channels_last)
    results = []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        model, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        for _ in range(2):
            loss = _loss(wrap(model, leaf))
            loss.backward()
        results.append(_outcome(model, leaf, [loss.detach()]))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@every_mode
def test_autocast_in_a_segment(use_reentrant: bool) -> None:
    torch.manual_seed(3)
    block = nn.Sequential(nn.Linear(C, C), BatchRenorm1d(C, momentum=0.3), nn.Tanh(), BatchRenorm1d(C))
    x = _input(12).float()
    results = []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        model, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(wrap(model, leaf).float())
        loss.backward()
        results.append(_outcome(model, leaf, [loss.detach()]))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


# ------------------------------------------------------------------------------------- the same batch again


def _same_input_in_two_segments(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    # Autograd begins with the later one.
    yield _loss(net.first(wrap(net.shared, x)) * net.last(wrap(net.shared, x)))


def _same_input_inside_and_outside_of_a_nested_segment(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(wrap(lambda x: net.first(net.shared(x)) * net.last(wrap(net.shared, x)), x))


def _after_a_forward_without_gradient(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    with torch.no_grad():
        net.shared(x)
    yield _loss(wrap(net.shared, x))


def _after_a_forward_without_backward(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    wrap(net.shared, x)
    yield _loss(wrap(net.shared, x))


def _after_a_step_without_checkpointing(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(net.shared(x))
    yield _loss(wrap(net.shared, x))


def _beside_a_forward_without_checkpointing(net: Net, x: Tensor, wrap: Wrap) -> Iterator[Tensor]:
    yield _loss(net.first(net.shared(x)) * net.last(wrap(net.shared, x)))


@every_mode
@pytest.mark.parametrize(
    "scenario",
    [
        _same_input_in_two_segments,
        _same_input_inside_and_outside_of_a_nested_segment,
        _after_a_forward_without_gradient,
        _after_a_forward_without_backward,
        _after_a_step_without_checkpointing,
        _beside_a_forward_without_checkpointing,
    ],
)
def test_the_same_batch_again(scenario: Any, use_reentrant: bool) -> None:
    net, x = Net(), _input()
    _assert_same(_run(scenario, net, x, _checkpointed(use_reentrant)), _run(scenario, net, x, _plain))


@every_mode
@pytest.mark.parametrize(
    ("scenario", "order"), [(_nested, [0, 1]), (_once, [1, 0])], ids=["nested", "last first"]
)
def test_the_same_batch_in_two_forwards_then_two_backwards(
    scenario: Any, order: list[int], use_reentrant: bool
) -> None:
    start, batch, results = Net(), _input(), []
    for wrap in (_plain, _checkpointed(use_reentrant)):
        net, x = copy.deepcopy(start), torch.stack([batch, batch]).requires_grad_()
        losses = [next(scenario(net, each, wrap)) for each in x]
        for index in order:
            losses[index].backward()
        results.append(_outcome(net, x, [loss.detach() for loss in losses]))
    _assert_same(*reversed(results))


def test_training_without_checkpointing_keeps_nothing() -> None:
    gc.collect()
    before = len(replay._segments)
    layer = Net().shared
    loss = _loss(layer(_input()))
    assert len(replay._segments) == before
    loss.backward()


@pytest.mark.parametrize("saved", ["linear", "batch statistics"])
def test_selective_checkpointing(saved: str) -> None:
    # A policy expects in the replay what it saw in the first run, and nothing else.
    chosen = {"linear": ("addmm", "aten.mm"), "batch statistics": ("batch_norm_update_stats",)}[saved]

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = any(name in str(operation) for name in chosen)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    net, x = Net(), _input()
    expected = _run(_once, net, x, _plain)
    _assert_same(_run(_once, net, x, _checkpointed(False, context_fn=contexts)), expected)


# ----------------------------------------------------------------------------------------------- compilation


class Between(nn.Module):
    """A layer between two functions; ``segment`` checkpoints all three."""

    def __init__(self, norm: nn.Module, segment: bool) -> None:
        super().__init__()
        self.norm = norm
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        if self.segment:
            return checkpoint(self._three, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self._three(x)

    def _three(self, x: Tensor) -> Tensor:
        return self.norm(x.sin()).cos()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("backend", "segment"), [("inductor", False), ("inductor", True), ("aot_eager", True)]
)
def test_compiled_gradient_is_that_of_the_eager_layer(backend: str, segment: bool) -> None:
    torch._dynamo.reset()
    net = Between(BatchRenorm1d(C, momentum=0.3, dtype=torch.float64), segment)
    net.norm.running_mean.copy_(torch.randn(C))
    twin, x = copy.deepcopy(net), _input()
    results = []
    for model, forward in ((twin, twin), (net, torch.compile(net, backend=backend, fullgraph=True))):
        leaf = x.clone().requires_grad_()
        _loss(forward(leaf)).backward()
        results.append([leaf.grad, model.norm.weight.grad, model.norm.running_mean, model.norm.running_var])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
