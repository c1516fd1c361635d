"""What the tracer and the site finder see in a model, and that looking leaves it as it was."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from renormify import BatchRenorm2d, convert, renormify
from renormify.sites import find_sites
from renormify.tracing import is_norm

C = 3


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


class Calls(nn.Module):
    """Normalises by function, twice, and standardises its weight, which is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.weight = nn.Parameter(torch.randn(C, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, C, -1), None, None, training=True).view(C, C, 1, 1)
        x = F.batch_norm(F.conv2d(x, weight), self.mean, self.var)
        return F.batch_norm(running_var=self.var, running_mean=self.mean, input=x)


class Untraceable(nn.Module):
    """Python that looks at the numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e30 else x  # type: ignore[no-any-return]


class Auxiliary(nn.Module):
    """A head that runs in training alone, behind another that comes later in the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.BatchNorm2d(C)
        self.main = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.main(x)
        return x + self.aux(x) if self.training else x


def _names(model: nn.Module) -> list[tuple[str, str]]:
    return [(site.name, site.kind) for site in find_sites(model)]


def test_every_kind_of_norm_is_a_site() -> None:
    kinds: dict[str, nn.Module] = {
        "plain": nn.BatchNorm2d(C),
        "own": OwnForward(C),
        "sync": nn.SyncBatchNorm(C),
        "lazy": nn.LazyBatchNorm2d(),
        "frozen": torchvision.ops.FrozenBatchNorm2d(C),
        "frozen_act": timm.layers.FrozenBatchNormAct2d(C),
        "act": timm.layers.BatchNormAct2d(C),
        "stateless": nn.BatchNorm2d(C, track_running_stats=False),
        "renorm": BatchRenorm2d(C),
    }
    others = {"group": nn.GroupNorm(1, C), "instance": nn.InstanceNorm2d(C, track_running_stats=True)}
    model = nn.ModuleDict({**kinds, **others})
    assert _names(model) == [(name, type(module).__name__) for name, module in kinds.items()]
    channels = {site.name: site.channels for site in find_sites(model)}
    assert channels.pop("lazy") is None
    assert channels.pop("stateless") is None
    assert set(channels.values()) == {C}
    assert not any(map(is_norm, others.values()))


def test_root_and_shared_modules() -> None:
    assert _names(nn.BatchNorm2d(C)) == [("", "BatchNorm2d")]
    norm = nn.BatchNorm2d(C)
    assert _names(nn.Sequential(norm, nn.ReLU(), norm)) == [("0", "BatchNorm2d")]


def test_functional_calls_bear_the_path_of_their_module() -> None:
    expected = [("0", "BatchNorm2d"), ("1", "batch_norm()"), ("1:1", "batch_norm()"), ("2", "BatchNorm2d")]
    model = nn.Sequential(nn.BatchNorm2d(C), Calls(), nn.BatchNorm2d(C))
    assert _names(model) == expected
    assert [site.module for site in find_sites(model)] == [model[0], model[1], model[1], model[2]]
    assert [len(site.calls) for site in find_sites(model)] == [0, 1, 1, 0]
    assert _names(Calls()) == [("", "batch_norm()"), (":1", "batch_norm()")]
    assert _names(fx.symbolic_trace(nn.Sequential(Calls()))) == [
        ("0", "batch_norm()"),
        ("0:1", "batch_norm()"),
    ]


def test_module_called_twice_makes_no_further_sites() -> None:
    calls = Calls()
    assert _names(nn.Sequential(calls, calls)) == [("0", "batch_norm()"), ("0:1", "batch_norm()")]


def test_weight_standardisation_of_timm_is_no_site() -> None:
    assert _names(nn.Sequential(timm.layers.StdConv2d(C, C, 3))) == []


def test_calls_of_torch_and_aten_are_sites() -> None:
    class Direct(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            x = torch.batch_norm(x, None, None, mean, var, False, 0.1, 1e-5, False)
            x = torch.ops.aten.batch_norm.default(x, None, None, mean, var, False, 0.1, 1e-5, False)
            return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)

    assert _names(Direct()) == [("", "batch_norm()"), (":1", "batch_norm()")]


def test_exported_graph_tells_its_calls() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).eval()
    exported = torch.export.export(model, (torch.randn(2, C, 4, 4),)).module()
    assert [site.kind for site in find_sites(exported)] == ["batch_norm()"]


def test_what_the_graph_does_not_reach_comes_from_the_tree() -> None:
    expected = [("aux", "BatchNorm2d"), ("main", "BatchNorm2d")]
    assert _names(Auxiliary().train()) == expected
    assert _names(Auxiliary().eval()) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.googlenet(init_weights=False),
        lambda: torchvision.models.shufflenet_v2_x0_5(),
        lambda: timm.create_model("efficientnet_b0"),
        lambda: timm.create_model("levit_128s"),
    ],
    ids=["resnet18", "googlenet", "shufflenet", "efficientnet", "levit"],
)
def test_traceable_or_not_a_model_has_the_same_sites(build: Any, training: bool) -> None:
    with torch.device("meta"):
        model = build().train(training)
    sites = [(f"inner.{site.name}", site.kind, site.channels) for site in find_sites(model)]
    wrapped = Untraceable(model)
    with pytest.raises(Exception, match="symbolically traced"):
        fx.symbolic_trace(wrapped)
    assert [(site.name, site.kind, site.channels) for site in find_sites(wrapped)] == sites
    assert len(sites) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Keeper(nn.Module):
    """A forward that leaves traces of every common kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.child = nn.Module()
        self.calls = 0
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("plain_sum", torch.zeros(()))
        self.log: list[Any] = []
        self.memory: dict[str, Any] = {"kept": 1}
        self.names: set[str] = set()
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        self.memory["x"] = x
        self.names.add("x")
        self.cached = self.norm(F.batch_norm(x, self.mean, self.var, training=self.training))
        self.child.seen = self.cached
        self.counted.add_(1)
        self.register_buffer("found", torch.zeros(1))
        self.calls += 1
        self.late = nn.BatchNorm2d(C)
        return self.cached + torch.rand(()) + torch.randn(C, 1, 1)


class Raiser(Keeper):
    """The same, and then it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if bool((x > 0).all()) else -x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model_class", [Keeper, Raiser])
def test_tracing_leaves_no_trace(model_class: type[Keeper], training: bool) -> None:
    model = model_class().train(training)
    log, memory, random_state = model.log, model.memory, torch.random.get_rng_state()
    keys = {name: list(module.__dict__) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())

    [call, norm] = find_sites(model)
    assert (call.name, norm.name) == ("", "norm")
    assert (call.problem is None) == (model_class is Keeper)

    assert {name: list(module.__dict__) for name, module in model.named_modules()} == keys
    assert (model.calls, model.cached, model.names) == (0, None, set())
    assert model.log is log
    assert model.memory is memory
    assert (log, memory) == ([], {"kept": 1})
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(module.training == training for module in model.modules())
    assert model(torch.randn(2, C, 4, 4)).shape == (2, C, 4, 4)
    assert model.calls == int(model.counted) == len(model.log) == 1


def test_tracing_counts_in_a_buffer_by_assignment() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(C))
            self.register_buffer("var", torch.ones(C))
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return F.batch_norm(x, self.mean, self.var, training=self.training) * self.steps

    model = Counts()
    converted = renormify(model)
    assert converted.r_max == 3.0
    assert float(model.steps) == float(converted.steps) == 0
    converted(torch.randn(2, C, 4, 4))
    assert float(converted.steps) == 1
    assert isinstance(converted.steps, Tensor)


def test_tracing_is_silent() -> None:
    class Warns(Calls):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("as ever", UserWarning, stacklevel=1)
            return F.batch_norm(x, self.mean, self.var)

    assert _names(Warns()) == [("", "batch_norm()")]


def test_graph_modules_are_read_as_they_are() -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))
    code = graph_module.code
    assert _names(graph_module) == [("1", "BatchNorm2d")]
    assert graph_module.code == code


class Queues(nn.Module):
    """A norm, and a call of the function, in a forward that keeps what it saw."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.attribute = attribute
        self.queue: deque[int] = deque()
        self.lists: defaultdict[str, list[int]] = defaultdict(list)
        self.nested: dict[str, list[int]] = {"a": []}
        self.counter: Counter[str] = Counter()
        self.plain = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        kept: dict[str, Any] = {
            "queue": lambda: self.queue.append(1),
            "lists": lambda: self.lists["a"].append(1),
            "nested": lambda: self.nested["a"].append(1),
            "counter": lambda: self.counter.update("a"),
            "plain": lambda: self.plain.add_(1),
        }
        kept[self.attribute]()
        return self.norm(F.batch_norm(x, self.mean, self.var, training=self.training))  # type: ignore[no-any-return]


@pytest.mark.parametrize("attribute", ["queue", "lists", "nested", "counter", "plain"])
def test_tracing_leaves_no_trace_in(attribute: str) -> None:
    model, fresh = Queues(attribute), Queues(attribute)
    report = convert(model).report
    assert report.converted == ("", "norm")
    assert getattr(model, attribute) == getattr(fresh, attribute)


def test_tracing_leaves_pythons_and_numpys_generators() -> None:
    class Random(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var) * random.random() * np.random.rand()

    before = random.getstate(), np.random.get_state()[2]
    assert _names(Random()) == [("", "batch_norm()")]
    assert (random.getstate(), np.random.get_state()[2]) == before


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_tracing_fires_no_hook(kind: str) -> None:
    # A hook that collects features would collect proxies.
    seen: list[Any] = []
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(C)), Calls())
    for module in (model[0], model[1]):
        _collect(module, kind, seen)
    convert(model, include_frozen=True)
    assert seen == []


def _collect(module: nn.Module, kind: str, seen: list[Any]) -> None:
    if kind == "forward":
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        module.register_forward_pre_hook(lambda module, args: seen.append(args))


def test_call_in_a_module_without_state_is_a_site_of_a_graph_too() -> None:
    class Stateless(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(x, mean, var)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.call, self.norm = Stateless(), nn.BatchNorm1d(C)
            self.register_buffer("mean", torch.zeros(C))
            self.register_buffer("var", torch.ones(C))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.call(x, self.mean, self.var))  # type: ignore[no-any-return]

    names = [site.name for site in convert(Model()).report.sites]
    assert names == ["call", "norm"]
    assert len(convert(fx.symbolic_trace(Model())).report.sites) == 2


def test_module_with_a_colon_in_its_name() -> None:
    model = nn.Sequential()
    model.add_module("conv:norm", nn.BatchNorm1d(C))
    assert convert(model).report.converted == ("conv:norm",)
