"""Frozen statistics, and statistics counted anew; the oracles are float64 NumPy and torch's own BatchNorm."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from renormify import (
    BatchRenorm1d,
    Monitor,
    convert,
    diagnose,
    freeze_stats,
    recalibrate,
    renormify,
    revert,
    unfreeze_stats,
)
from renormify.errors import InputError, NothingToConvertError, RenormifyWarning
from renormify.layers import is_batch_renorm
from renormify.tracing import is_norm


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm has them: renormify skips it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(self.drop(super().forward(input)))


def net(norm=nn.BatchNorm2d) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    for layer in norms(model):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2.0)
        nn.init.normal_(layer.weight, 1.0, 0.1)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_norm(module)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


# --- freeze_stats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [net, lambda: renormify(net())], ids=["BatchNorm", "Batch Renorm"])
def test_a_frozen_model_trains_as_it_evaluates(make):
    model, x = make(), torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    before = state(model)
    assert freeze_stats(model) == ("1", "4")
    model.train()
    assert torch.equal(model(x), expected)
    assert same(model, before)


def test_weight_and_bias_get_the_gradient_of_evaluation():
    model, x = renormify(net()), torch.randn(2, 3, 8, 8)
    gradients = []
    for frozen in (False, True):
        if frozen:
            freeze_stats(model)
        model.train(frozen)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1])


@pytest.mark.parametrize(
    "passed_on",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: renormify(model),
        lambda model: revert(renormify(model)),
        lambda model: convert(model, inplace=True).model,
        lambda model: model.train().eval().train(),
        lambda model: model.to(torch.float64).float(),
    ],
    ids=["deepcopy", "pickle", "renormify", "revert", "in place", "train", "to"],
)
def test_it_survives(passed_on):
    model, x = net(), torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    freeze_stats(model)
    model = passed_on(model).train()
    before = state(model)
    assert torch.equal(model(x), expected)
    assert same(model, before)
    assert unfreeze_stats(model) == ("1", "4")
    model(x)
    assert not same(model, before)


def test_a_copy_is_frozen_on_its_own():
    model = freeze(net())
    twin = copy.deepcopy(model)
    assert unfreeze_stats(twin) == ("1", "4")
    twin.train()
    assert [layer.training for layer in norms(twin)] == [True, True]
    assert [layer.training for layer in norms(model.train())] == [False, False]


def freeze(model: nn.Module) -> nn.Module:
    freeze_stats(model)
    return model


def test_it_leaves_no_trace():
    model = renormify(net())
    keys = [set(vars(layer)) for layer in norms(model)]
    entries = list(model.state_dict())
    freeze_stats(model)
    assert list(model.state_dict()) == entries
    freeze_stats(model)  # twice is as good as once
    unfreeze_stats(model)
    assert [set(vars(layer)) for layer in norms(model)] == keys
    assert unfreeze_stats(model) == ()


def test_a_layer_let_go_takes_the_mode_of_its_model():
    model = renormify(net()).train()
    freeze_stats(model)
    unfreeze_stats(model)
    assert all(layer.training for layer in norms(model))
    freeze_stats(model)
    model.eval()
    unfreeze_stats(model)
    assert not any(layer.training for layer in norms(model))


def test_by_filter():
    model = renormify(net())
    assert freeze_stats(model, filter_fn=lambda module, name: name == "4") == ("4",)
    before = state(model)
    model.train()(torch.randn(2, 3, 8, 8))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert torch.equal(model[4].running_mean, before["4.running_mean"])
    assert unfreeze_stats(model, filter_fn=lambda module, name: name == "1") == ()
    with pytest.raises(NothingToConvertError, match=r"filter_fn takes none of the 2 norm layers .*to freeze"):
        freeze_stats(model, filter_fn=lambda module, name: False)


def test_subclasses_that_renormify_skips_can_be_frozen_and_keep_their_children_in_training():
    model, x = net(Activated).train(), torch.randn(64, 3, 8, 8)
    freeze_stats(model)
    assert model[1].drop.training
    model.eval()
    assert not model[1].drop.training
    model.train()
    before = state(model)
    output = model[1](model[0](x))
    assert same(model, before)
    assert model[1].drop.training
    assert (output == 0).float().mean() > 0.6  # half by dropout, and half of the rest by the activation


def test_under_compile():
    torch._dynamo.reset()
    model, x = renormify(net()).train(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    freeze_stats(model)
    model.train()
    before = state(model)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model).eval()(x), rtol=1e-5, atol=1e-5)
    assert same(model, before)


@pytest.mark.parametrize("function", [freeze_stats, unfreeze_stats, lambda model: recalibrate(model, [])])
def test_a_model_with_no_norm_is_named(function):
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.BatchNorm1d(2, track_running_stats=False)):
        with pytest.raises(NothingToConvertError, match=f"running statistics in {type(model).__name__} to "):
            function(model)


@pytest.mark.parametrize(
    "function", [freeze_stats, unfreeze_stats, lambda m, filter_fn: recalibrate(m, [], filter_fn=filter_fn)]
)
def test_a_filter_that_is_no_function_is_named(function):
    with pytest.raises(InputError, match=r"filter_fn must be a function of .* .got '1'"):
        function(net(), filter_fn="1")


# --- what is no layer of torch's ---------------------------------------------------------------------------


class Functional(nn.Module):
    """Normalises by a call in its own forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def with_functional(kind: str) -> nn.Module:
    model = nn.Sequential(Functional(), nn.BatchNorm1d(3))
    model = torch.fx.symbolic_trace(model) if "graph" in kind else model
    return renormify(model) if "converted" in kind else model


@pytest.mark.parametrize("kind", ["forward", "converted forward", "graph", "converted graph"])
def test_functional_calls_are_named(kind):
    model, x = with_functional(kind), torch.randn(8, 3)
    with pytest.warns(
        RenormifyWarning, match=r"freeze_stats does not serve 1 site \(0.*functional call"
    ) as told:
        assert freeze_stats(model) == ("1",)
    assert told[0].filename == __file__
    with pytest.warns(RenormifyWarning, match=r"recalibrate does not serve 1 site "):
        recalibrate(model, [x])
    with pytest.warns(RenormifyWarning, match=r"Monitor does not serve 1 site ") as told:
        Monitor(model)
    assert told[0].filename == __file__
    ((name, reason),) = diagnose(model, [x, x]).unseen
    assert name.startswith("0")
    if "graph" not in kind:
        assert "functional call" in reason
    freeze_stats(model, filter_fn=lambda module, name: name == "1")  # and nothing else was asked for


def test_a_model_of_functional_calls_alone_is_told_so():
    for model in (nn.Sequential(Functional()), renormify(nn.Sequential(Functional()))):
        for function in (freeze_stats, Monitor, lambda m: recalibrate(m, []), lambda m: diagnose(m, [])):
            with pytest.raises(
                NothingToConvertError, match=r"no norm layer .* 1 site \(0\), .*functional call"
            ):
                function(model)


def test_a_norm_of_someone_elses_is_named():
    class OddBatchNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x):
            return (x - self.running_mean) / self.running_var.sqrt()

    with pytest.warns(RenormifyWarning, match=r"1 site \(0\).* does not derive from a BatchNorm of torch"):
        freeze_stats(nn.Sequential(OddBatchNorm(), nn.BatchNorm1d(3)))


def test_frozen_layers_that_were_thawed_are_layers_like_any():
    model, x = nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 3, 1)), torch.randn(16, 3, 4, 4) * 3 + 2
    model = renormify(model, include_frozen=True).train()
    assert recalibrate(model, [x]) == ("0",)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, x.var((0, 2, 3), correction=0))
    assert [layer.name for layer in diagnose(model, [x, x]).layers] == ["0"]
    monitor = Monitor(model, every=1)
    model(x + 1)
    assert monitor.step()["renorm/r_q50"] == pytest.approx(1, abs=1e-3)
    assert freeze_stats(model) == ("0",)
    before, expected = state(model), copy.deepcopy(model).eval()(x)
    assert torch.equal(model.train()(x), expected)
    assert same(model, before)
    assert unfreeze_stats(model) == ("0",)
    assert model[0].training


# --- recalibrate -----------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, layer: nn.Module, x: torch.Tensor) -> np.ndarray:
    """What the layer gets in evaluation, as (C, m) in float64."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return np.moveaxis(seen[0].double().numpy(), 1, 0).reshape(len(layer.running_mean), -1)


@pytest.mark.parametrize("stat", ["sigma", "var", None])
def test_every_layer_has_the_statistics_of_what_it_gets(stat):
    x = torch.randn(37, 3, 8, 8) * torch.linspace(0.1, 3, 37).view(-1, 1, 1, 1) + 5
    model = net() if stat is None else renormify(net(), stat=stat)
    batches = [x[:1], x[1:20], x[20:22], x[22:]]  # a mean of means would be far off
    assert recalibrate(model, batches) == ("1", "4")
    for layer in norms(model):
        values = inputs_of(model, layer, x)
        np.testing.assert_allclose(layer.running_mean.numpy(), values.mean(1), rtol=1e-5, atol=1e-6)
        expected = values.var(1, ddof=0 if stat == "sigma" else 1)
        np.testing.assert_allclose(layer.running_var.numpy(), expected, rtol=1e-5)
        assert layer.num_batches_tracked == 4


def test_it_agrees_with_update_bn_where_that_is_exact():
    x, model = torch.randn(64, 3, 8, 8), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    twin = copy.deepcopy(model)
    recalibrate(model, [x])
    torch.optim.swa_utils.update_bn([x], twin)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)


def test_the_size_of_the_batches_does_not_matter_on_a_trained_network(mobilenet_v2):
    model, _ = mobilenet_v2()
    model.classifier[0].p = 0.0
    x = torch.randn(8, 3, 64, 64) * 0.5
    ours, usual = renormify(model), copy.deepcopy(model)
    with torch.no_grad():
        expected = model.train()(x)  # BatchNorm over all samples at once, by torch itself
        assert len(recalibrate(ours, x.split(2))) == 52
        torch.optim.swa_utils.update_bn(x.split(2), usual)
        off, usually_off = ((m.eval()(x) - expected).norm() / expected.norm() for m in (ours, usual))
    assert off < 1e-3
    assert usually_off > 0.1


def test_forms_of_batches():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchRenorm1d(3)

        def forward(self, values, scale=1.0):
            return self.norm(values * scale)

    x, labels = torch.randn(6, 3), torch.arange(6)
    named = {"values": x, "scale": 1.0}
    for batches in ([x], [(x, labels)], [[x, labels]], [named], [(named, labels)], iter([x])):
        model = Named()
        recalibrate(model, batches)
        torch.testing.assert_close(model.norm.running_mean, x.mean(0))
        torch.testing.assert_close(model.norm.running_var, x.var(0, correction=0))


def test_masked_positions_do_not_count():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchRenorm1d(3)

        def forward(self, values, mask):
            return self.norm(values, mask=mask)

    values, mask = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.4
    model = Padded()
    recalibrate(model, [{"values": values.masked_fill(~mask[:, None], 1e6), "mask": mask}])
    kept = values.movedim(1, 2)[mask].double().numpy()
    np.testing.assert_allclose(model.norm.running_mean, kept.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.norm.running_var, kept.var(0), rtol=1e-5)


def test_a_compiled_model():
    model, x = renormify(net()), torch.randn(4, 3, 8, 8)
    twin = copy.deepcopy(model)
    assert recalibrate(torch.compile(model), [x]) == recalibrate(twin, [x]) == ("1", "4")
    assert same(model, state(twin))


@pytest.mark.parametrize("whole", [True, False], ids=["itself", "a submodule"])
def test_a_model_compiled_in_place_without_a_graph_break(whole):
    torch._dynamo.reset()
    model, x = renormify(net()), torch.randn(4, 3, 8, 8)
    twin, head = copy.deepcopy(model), nn.Sequential(nn.Identity(), model)
    (head if whole else model).compile(fullgraph=True, backend="aot_eager")
    head.train()(x)
    twin.train()(x)
    recalibrate(head, [x, x + 1])
    recalibrate(twin, [x, x + 1])
    assert same(model, state(twin))
    assert len(diagnose(head, [x, x]).layers) == 2


class Wandering(nn.Module):
    """Goes another way with each batch: the first and last layer always, the middle one as often as asked."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = (nn.BatchNorm1d(3) for _ in range(3))

    def forward(self, x, times):
        x = self.first(x)
        for _ in range(times):
            x = self.middle(x * 2 + 1)
        return self.last(x)


@pytest.mark.parametrize("counts", [(1, 3), (0, 1), (3, 1), (0, 2)])
def test_a_layer_that_batches_reach_unequally_often_is_done_over_all_of_them(counts):
    model = Wandering()
    model.middle.momentum = 0.0
    xs = [torch.randn(16, 3), torch.randn(16, 3) * 2 + 1]
    before = copy.deepcopy(model.middle).eval()
    order = recalibrate(model, [{"x": x, "times": n} for x, n in zip(xs, counts, strict=True)])
    assert order == ("first", "middle", "last")
    inputs, outputs = [], []
    model.eval()
    with torch.no_grad():
        for x, times in zip(xs, counts, strict=True):
            passed = y = model.first(x)
            for _ in range(times):
                inputs.append(passed * 2 + 1)
                passed, y = before(passed * 2 + 1), model.middle(y * 2 + 1)
            outputs.append(y)
    for layer, values in ((model.middle, inputs), (model.last, outputs)):
        values = torch.cat(values).double().numpy()
        np.testing.assert_allclose(layer.running_mean, values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var, values.var(0, ddof=1), rtol=1e-5)


def test_in_half_precision_the_statistics_are_float32_ones():
    model = renormify(nn.Sequential(nn.BatchNorm1d(6)).bfloat16())
    x = (torch.randn(64, 6) * 3 + 100).bfloat16()
    recalibrate(model, [x])
    assert model[0].running_mean.dtype == torch.float32
    np.testing.assert_allclose(model[0].running_mean, x.double().numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(model[0].running_var, x.double().numpy().var(0), rtol=1e-6)


def test_upon_an_error_the_statistics_have_their_dtype_too():
    model = renormify(nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(), nn.BatchNorm1d(6)).bfloat16())
    before, buffer = state(model), model[0].running_mean
    with pytest.raises(InputError, match="1 value per channel"):
        recalibrate(model, [torch.randn(1, 1, 6).bfloat16()])
    assert model[0].running_mean is buffer
    assert same(model, before)


def test_batches_that_can_be_gone_through_only_once_are_told():
    class Once:
        def __init__(self):
            self.rest = iter([torch.randn(4, 3, 8, 8)])

        def __iter__(self):
            return self.rest

    model = net()
    before = state(model)
    with pytest.raises(InputError, match="gave nothing when gone through again"):
        recalibrate(model, Once())
    assert same(model, before)


def test_by_filter_and_frozen():
    model = freeze(renormify(net()))
    before = state(model)
    chosen = recalibrate(model, [torch.randn(4, 3, 8, 8)], filter_fn=lambda module, name: name == "4")
    assert chosen == ("4",)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[4].running_mean, before["4.running_mean"])


def test_a_layer_that_is_not_reached_is_told():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    model = Half()
    with pytest.warns(RenormifyWarning, match="leaves 1 layers alone .* the first 'unused'"):
        assert recalibrate(model, [torch.randn(4, 3)]) == ("used",)
    assert torch.equal(model.unused.running_mean, torch.zeros(3))
    assert model.unused.num_batches_tracked == 0


def everything(model: nn.Module) -> list[object]:
    """What must not change: modes, hooks, gradients, and every random number generator."""
    return [
        [module.training for module in model.modules()],
        [[len(value) for key, value in vars(m).items() if key.endswith("hooks")] for m in model.modules()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


def test_nothing_else_changes():
    model = renormify(net())
    model[0].eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    shuffled = torch.utils.data.DataLoader(torch.randn(8, 3, 8, 8), batch_size=2, shuffle=True)
    before, parameters = everything(model), [p.clone() for p in model.parameters()]
    recalibrate(model, shuffled)
    assert everything(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))


class InterruptedLoaderError(Exception):
    """Of the loader, in mid-way."""


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], InputError, "batches is empty"),
        (torch.randn(4, 3, 8, 8), InputError, "iterable of batches .got one Tensor"),
        ({"x": 1}, InputError, "iterable of batches .got one dict"),
        (3, InputError, "iterable of batches .got one int"),
        (["text"], InputError, "a batch must be a tensor, .*got str"),
        ([torch.randn(4, 3, 8, 8), torch.randn(4, 2, 8, 8)], InputError, r"fails on .* \(4, 2, 8, 8\)"),
        ([torch.full((4, 3, 8, 8), torch.nan)], InputError, "layer '1' gets inf or NaN"),
        ([torch.randn(1, 3, 5, 5)], InputError, "layer '4' gets 1 value per channel"),
        (InterruptedLoaderError, InterruptedLoaderError, "third pass"),
    ],
)
def test_upon_an_error_the_model_is_as_it_was(batches, error, message):
    class Broken:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield torch.randn(4, 3, 8, 8)
            if self.passes == 3:  # the first layer has its new statistics by then
                raise InterruptedLoaderError("third pass")
            yield torch.randn(4, 3, 8, 8)

    model = renormify(net()).train()
    before, rest = state(model), everything(model)
    with pytest.raises(error, match=message):
        recalibrate(model, Broken() if batches is InterruptedLoaderError else batches)
    assert same(model, before)
    assert everything(model) == rest


def test_recalibrated_statistics_are_what_converting_wants():
    """On data of another domain the first step after recalibrate is evaluation's again, nothing clipped."""
    model, x = renormify(net()), torch.randn(256, 3, 8, 8) * 4 + 20
    recalibrate(model, x.split(64))
    with torch.no_grad():
        trained, evaluated = copy.deepcopy(model).train()(x), model.eval()(x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-4)
    assert all(is_batch_renorm(layer) for layer in norms(model))


def test_values_that_come_in_parts_are_counted_as_a_whole(monkeypatch):
    monkeypatch.setattr("renormify.observation._MOST", 50)
    x, layer = torch.randn(40, 6) * 3 + 100, BatchRenorm1d(6)
    recalibrate(layer, x.split(17))
    np.testing.assert_allclose(layer.running_mean, x.double().numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, x.double().numpy().var(0), rtol=1e-6)
