"""Forwards that are traced: nothing of what they ask for is held fixed, and tracing disturbs nobody."""

from __future__ import annotations

import copy
import gc
import random
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from norms import C, image, lived_in
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from renormify import convert, forwards, renormify


class State(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        self.table: dict[str, Any] = {"slope": 0.1, "powers": [1, 2]}
        self.config = SimpleNamespace(shift=1.0)
        self.activation: Callable[[Tensor], Tensor] = torch.relu

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(F.leaky_relu(self.norm(x) * self.factor, self.table["slope"]) + self.config.shift)
        return x ** self.table["powers"][1]


def _exchange(model: Any, what: str) -> None:
    if what == "table":
        model.table["slope"] = 0.9
    elif what == "list":
        model.table["powers"][1] = 3
    elif what == "config":
        model.config.shift = -1.0
    elif what == "function":
        model.activation = torch.tanh
    else:
        model.factor = 3.0


@pytest.mark.parametrize("what", ["table", "list", "config", "function", "attribute of the class"])
def test_what_a_forward_reads_may_change_after_the_conversion(what: str) -> None:
    original = lived_in(State())
    model, x = renormify(original), image()
    before = copy.deepcopy(model)(x)
    _exchange(original, what)
    expected = renormify(original)(x)
    _exchange(model, what)
    assert torch.equal(model(x), expected)
    assert not torch.equal(expected, before)


def test_attribute_of_the_class_itself_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    original, x = lived_in(State()), image()
    model = renormify(original)
    before = copy.deepcopy(model)(x)
    monkeypatch.setattr(State, "factor", 3.0)
    expected = renormify(original)(x)
    assert torch.equal(model(x), expected)
    assert not torch.equal(expected, before)


class AsksForGradients(State):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (2 if torch.is_grad_enabled() else 1)


def test_whether_gradients_are_on_is_asked_anew() -> None:
    model, x = renormify(lived_in(AsksForGradients())), image()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        once = twin(x)
    assert torch.equal(model(x), 2 * once)


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "numpy": np.random.rand,
}


class Skips(State):
    """Leaves itself out at random, as stochastic depth does."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        if self.training and DRAWS[self.draw]() < 0.5:
            return x
        return self.norm(x)


@pytest.mark.parametrize("draw", DRAWS)
def test_random_decision_is_drawn_anew_each_time(draw: str) -> None:
    skips = Skips(draw)
    for seed in range(6):  # in some of which a trace does not come to the call
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        conversion = convert(nn.Sequential(skips, nn.BatchNorm2d(C)))
        first, x = conversion.report.sites[0], image()
        if first.action == "skipped":
            assert first.reason == "it calls batch_norm in evaluation alone, as far as a trace came"
            continue
        converted = conversion.model[0]
        converted.r_max, converted.d_max = 1.0, 0.0
        outputs = []
        for model in (skips, converted):
            torch.manual_seed(7), random.seed(7), np.random.seed(7)
            outputs.append([model(x) for _ in range(8)])
        torch.testing.assert_close(*outputs)
        assert len({torch.equal(output, x) for output in outputs[1]}) == 2


class Checkpoints(State):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.norm, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_checkpoint_within_is_refused() -> None:
    sites = convert(nn.Sequential(Checkpoints(), nn.BatchNorm2d(C))).report.sites
    assert [site.action for site in sites] == ["skipped", "converted"]
    assert "it checkpoints" in sites[0].reason


# -------------------------------------------------------------------------------------- traces are shared


def _traces(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> int:
    count = 0
    trace = forwards.trace_forward

    def counting(*args: Any) -> Any:
        nonlocal count
        count += 1
        return trace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(forwards, "trace_forward", counting)
        convert(model, inplace=True)
    return count


def test_layers_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = nn.Sequential(*(BatchNormAct2d(n) for n in (3, 4, 5)))
    assert _traces(monkeypatch, alike) == 1
    other = nn.Sequential(BatchNormAct2d(3), BatchNormAct2d(3, eps=0.1), BatchNormAct2d(3, act_layer=nn.SiLU))
    x = image()
    expected = [renormify(copy.deepcopy(layer))(x) for layer in other]
    assert _traces(monkeypatch, other) == 3
    for layer, output in zip(other, expected, strict=True):
        assert torch.equal(layer(x), output)


def test_module_that_ties_its_tensors_has_a_trace_of_its_own() -> None:
    class Two(State):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.first, training=self.training)
            return x * self.second.view(-1, 1, 1)

    tied, free, x = Two(), Two(), image()
    tied.second = tied.first
    pair = renormify(nn.ModuleList((tied, free)))
    assert pair[0](x).abs().max() > 0
    assert pair[1](x).abs().max() == 0


def test_decision_by_an_unregistered_tensor_is_each_modules_own() -> None:
    class Decides(State):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign = torch.tensor(sign)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if self.sign > 0 else -self.norm(x)

    x = image()
    pair = renormify(nn.ModuleList((Decides(1.0), Decides(-1.0))))
    assert torch.equal(pair[0](x), -pair[1](x))


def test_shared_traces_keep_no_model_alive() -> None:
    model = renormify(lived_in(nn.Sequential(State(), BatchNormAct2d(C))))
    model(image())
    gone = weakref.ref(model[0].running_mean)
    del model
    gc.collect()
    assert gone() is None


def test_conversion_in_place_takes_little_memory() -> None:
    convert(timm.create_model("efficientnet_lite0"), inplace=True)  # imports and first uses
    model = timm.create_model("efficientnet_b0")
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    tracemalloc.start()
    convert(model, inplace=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.04 * size


# ------------------------------------------------------------------------------------- other threads go on


def test_other_threads_go_on_while_a_forward_is_traced() -> None:
    other, x = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()).eval(), image()
    expected, done, errors = other(x), threading.Event(), []

    def infer() -> None:
        while not done.is_set():
            try:
                if not torch.equal(other(x), expected):
                    errors.append("another output")
            except Exception as error:
                errors.append(repr(error))

    thread = threading.Thread(target=infer)
    thread.start()
    for slope in range(10):
        model = State()
        model.table["slope"] = float(slope)  # not alike
        convert(model)
    done.set()
    thread.join()
    assert errors == []


def test_threads_convert_at_a_time() -> None:
    methods, errors = (nn.Module.__call__, nn.Module.__getattr__), []

    def work(seed: int) -> None:
        try:
            for slope in range(5):
                model = nn.Sequential(State(), nn.Conv2d(C, C, 1), BatchNormAct2d(C, eps=0.1 * (slope + 1)))
                model[0].table["slope"] = seed + slope / 10
                assert convert(model).report.converted == ("0", "2")
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods
