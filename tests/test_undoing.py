"""What goes wrong half-way, or around a conversion: the model is as it was, or the layers are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from renormify import BatchRenorm2d, ConstantSchedule, RenormScheduler, convert, register_rule, renormify
from renormify.errors import UnsupportedModelError
from renormify.layers import bears_limits, is_batch_renorm
from renormify.rewriting import rewrite
from renormify.settings import Settings

C = 3


class Call(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Guarded(nn.BatchNorm2d):
    """Refuses another momentum."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "momentum" and "momentum" in vars(self):
            raise AttributeError("momentum is for good")
        super().__setattr__(name, value)


def _contents(model: nn.Module) -> list[Any]:
    """All that a module holds, and what it is."""
    return [
        (path, type(module), module.training, dict(vars(module)),
         [dict(held) for held in (module._parameters, module._buffers, module._modules)],
         set(module._non_persistent_buffers_set))
        for path, module in model.named_modules()
    ]  # fmt: skip


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)
        self.state = Call()
        self.guarded = Guarded(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.guarded(self.state(self.norm(x)))  # type: ignore[no-any-return]


def test_error_half_way_leaves_the_model_untouched() -> None:
    model = Three()
    before = _contents(model)
    with pytest.raises(AttributeError, match="momentum is for good"):
        convert(model, inplace=True)
    assert _contents(model) == before
    assert convert(model, inplace=True, momentum="keep").report.converted == ("norm", "state", "guarded")


@pytest.mark.parametrize("function", [rewrite, lambda model: convert(model, inplace=True)])
def test_error_half_way_leaves_the_graph_untouched(function: Callable[..., Any]) -> None:
    model = Three()
    model.guarded = nn.BatchNorm2d(C)
    graph_module = fx.symbolic_trace(model.eval())
    graph_module.guarded = Guarded(C).eval()
    nodes = [(node.op, node.target) for node in graph_module.graph.nodes]
    names = [name for name, _ in graph_module.named_modules()]
    x = torch.randn(2, C, 4, 4)
    expected = graph_module(x)
    with pytest.raises(AttributeError, match="momentum is for good"):
        function(graph_module)
    assert [(node.op, node.target) for node in graph_module.graph.nodes] == nodes
    assert [name for name, _ in graph_module.named_modules()] == names
    assert not any(map(is_batch_renorm, graph_module.modules()))
    assert torch.equal(graph_module(x), expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_model_converted_in_inference_mode_trains(inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    with torch.inference_mode():
        converted = renormify(model, inplace=inplace)
    converted[1].r_max = 2.0
    converted(torch.randn(2, C, 4, 4)).sum().backward()
    assert converted[0].weight.grad is not None


class Delegating(nn.Module):
    """Answers with what it wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def test_wrapper_that_hands_on_what_it_lacks_is_no_layer() -> None:
    model = Delegating(nn.BatchNorm2d(C))
    conversion = convert(model)
    assert conversion.report.converted == ("model",)
    assert not bears_limits(conversion.model)
    RenormScheduler(conversion.model, ConstantSchedule(2.0, 1.0))
    assert "r_max" not in vars(conversion.model)
    assert conversion.model.model.r_max == 2.0


class Centred(nn.Module):
    """A norm of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in nn.BatchNorm2d(C).state_dict().items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean.view(1, -1, 1, 1)


@pytest.mark.usefixtures("rules")
def test_registered_rule_keeps_hooks_and_must_keep_tensors() -> None:
    def copying(module: nn.Module, settings: Settings) -> nn.Module:
        layer = BatchRenorm2d(C)
        layer.load_state_dict(module.state_dict())
        return layer

    calls: list[str] = []
    model = nn.Sequential(nn.BatchNorm2d(C), Centred())
    model[1].running_mean.fill_(2)
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    handle = model[1].register_forward_hook(lambda *_: calls.append("after"))
    register_rule(Centred, lambda module, settings: BatchRenorm2d(C))
    with pytest.raises(UnsupportedModelError, match="must keep its tensors, but running_mean differ"):
        convert(model, inplace=True)
    assert [type(module) for module in model] == [nn.BatchNorm2d, Centred]
    register_rule(Centred, copying)
    convert(model, inplace=True)
    model(torch.randn(2, C, 4, 4))
    assert calls == ["before", "after"]
    handle.remove()
    model(torch.randn(2, C, 4, 4))
    assert calls == ["before", "after", "before"]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renormify.registry._rules", {})
