"""convert, renormify, revert and rewrite: nothing changes at step 0, nothing is lost, nothing goes unsaid."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from renormify import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    convert,
    register_rule,
    renormify,
    revert,
)
from renormify.errors import InputError, NothingToConvertError, RenormifyError, UnsupportedModelError
from renormify.rewriting import rewrite
from renormify.settings import Settings

C = 3
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


class OwnArithmetic(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return input - self.running_mean.view(1, -1, 1, 1)


class Plain(nn.BatchNorm2d):
    """A subclass with nothing of its own but its construction."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.2)
        self.note = "kept"

    def extra_repr(self) -> str:
        return "plain"


class Call(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var)


class Untraceable(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e30 else x  # type: ignore[no-any-return]


class NotCopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def __deepcopy__(self, memo: dict[int, Any]) -> NotCopied:
        raise TypeError("one of a kind")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


def _lived_in(model: nn.Module) -> nn.Module:
    """Statistics and affine as after training; the defaults hide errors."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
                module.num_batches_tracked.fill_(11)
                if module.weight is not None:
                    module.weight.normal_(1, 0.3)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3)
    return model


def _conv_net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.1), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, C, 1), nn.BatchNorm2d(C, momentum=None)), nn.Flatten(2), nn.BatchNorm1d(C),
    )  # fmt: skip
    return _lived_in(model)  # type: ignore[return-value]


def _x() -> Tensor:
    return torch.randn(4, C, 8, 8)


def _assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


def _train_step(model: nn.Module, x: Tensor) -> None:
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    (output**3).mean().backward()  # the mean square after a norm is a constant


def _assert_moves_by_batch_renorm(model: nn.Module, x: Tensor, alpha: float = 0.01) -> None:
    """Each converted site takes, in one training forward, the paper's step of mu and of sigma."""
    inputs: dict[nn.Module, Tensor] = {}
    before = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, RENORMS):
            before[name] = (module, module.running_mean.clone(), module.running_var.clone())
            hooks.append(module.register_forward_pre_hook(lambda m, args: inputs.setdefault(m, args[0])))
    assert before
    model.train()
    _train_step(model, x)
    for hook in hooks:
        hook.remove()
    for name, (module, mean, var) in before.items():
        values = inputs[module].detach().movedim(1, -1).reshape(-1, module.num_features).double()
        sigma_b = (values.var(0, correction=0) + module.eps).sqrt()
        sigma = (var.double() + module.eps).sqrt()
        moved = (module.running_var.double() + module.eps).sqrt()
        wanted = sigma + alpha * (sigma_b - sigma)
        torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-6, msg=name)
        wanted = mean.double() + alpha * (values.mean(0) - mean.double())
        torch.testing.assert_close(module.running_mean.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(module.running_var, var), name


# --------------------------------------------------------------------------------------------- real networks


@pytest.mark.parametrize(
    ("network", "sites"), [("mobilenet_v2", 52), ("efficientnet_lite0", 49), ("platelet_unet", 18)]
)
def test_trained_networks_convert_whole_and_exactly(
    network: str, sites: int, request: pytest.FixtureRequest
) -> None:
    model, x = request.getfixturevalue(network)()
    state = copy.deepcopy(model.state_dict())
    conversion = convert(model)
    assert len(conversion.report.converted) == sites
    assert conversion.report.skipped == ()
    assert not any(isinstance(m, BATCH_NORMS) for m in conversion.model.modules())
    assert sum(isinstance(m, RENORMS) for m in conversion.model.modules()) == sites
    assert sum(isinstance(m, BATCH_NORMS) for m in model.modules()) == sites
    assert type(conversion.model) is type(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(conversion.model(x), expected)
        assert torch.equal(revert(conversion.model)(x), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    model.load_state_dict(conversion.model.state_dict(), strict=True)


@pytest.mark.parametrize("network", ["mobilenet_v2", "efficientnet_lite0", "platelet_unet"])
def test_trained_networks_start_training_where_evaluation_is(
    network: str, request: pytest.FixtureRequest
) -> None:
    model, x = request.getfixturevalue(network)()
    model = model.double()
    layers = {name for name, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    converted = renormify(model, r_max=1e30, d_max=1e30, momentum=0.0)
    for name in layers:
        converted.get_submodule(name).train()  # and dropout stays as in evaluation
    assert layers
    with torch.no_grad():
        torch.testing.assert_close(converted(x.double()), model(x.double()), rtol=0, atol=1e-13)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(num_classes=5),
    "timm resnet10t": lambda: timm.create_model("resnet10t", num_classes=5),
    "timm levit": lambda: timm.create_model("levit_128s", num_classes=5, img_size=64),
    "hand-made": _conv_net,
}


@pytest.mark.parametrize("name", ZOO)
def test_library_models_are_exact_at_step_zero_and_train(name: str) -> None:
    model = _lived_in(ZOO[name]()).eval()
    x = torch.randn(3, C, 64, 64)
    conversion = convert(model)
    assert conversion.report.skipped == ()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(conversion.model(x), expected)
        assert expected.std() > 0
    if name != "hand-made":
        _assert_moves_by_batch_renorm(conversion.model, x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)  # the original took no part in it


def test_converted_layers_move_by_the_papers_rule_and_not_batch_norms() -> None:
    model = _conv_net()
    assert [module.momentum for module in model.modules() if isinstance(module, BATCH_NORMS)] == [
        0.1,
        None,
        0.1,
    ]
    _assert_moves_by_batch_renorm(renormify(model), _x())
    _assert_moves_by_batch_renorm(renormify(model, momentum=0.2), _x(), alpha=0.2)
    with pytest.raises(AssertionError):  # this helper would see a converter that returns a plain copy
        _assert_moves_by_batch_renorm(copy.deepcopy(model), _x())


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_or_a_copy(inplace: bool) -> None:
    model = _conv_net()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    modules = list(model.modules())
    twin = copy.deepcopy(model)
    conversion = convert(model, inplace=inplace)
    assert (conversion.model is model) == inplace
    if inplace:
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(any(a is b for b in model.buffers()) for a in buffers)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    else:
        assert not set(map(id, conversion.model.parameters())) & set(map(id, parameters))
        _assert_same_state(model, twin)
        assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    _assert_same_state(conversion.model, twin)


def test_optimizer_built_before_an_in_place_conversion_goes_on_working() -> None:
    model = _conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _train_step(model, _x())
    optimizer.step()
    optimizer.zero_grad()
    renormify(model, inplace=True)
    # Not what another norm takes out again: a constant, or a factor, before it.
    learning = [model[1].weight, model[5].weight, model[5].bias]
    before = [p.detach().clone() for p in learning]
    _train_step(model, _x())
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, learning, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_shared_layer_stays_one(inplace: bool) -> None:
    norm = nn.BatchNorm2d(C)
    model = _lived_in(nn.Sequential(norm, nn.ReLU(), norm, nn.Sequential(norm)))
    conversion = convert(model, inplace=inplace)
    converted = conversion.model
    assert conversion.report.converted == ("0",)
    assert isinstance(converted[0], BatchRenorm2d)
    assert converted[0] is converted[2] is converted[3][0]
    converted(_x())
    assert int(converted[0].num_batches_tracked) == 14


def test_shared_parameters_stay_shared() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    model[1].weight = model[0].weight
    converted = renormify(model)
    assert converted[0].weight is converted[1].weight
    assert converted[0].weight is not model[0].weight


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_fire_as_before(inplace: bool) -> None:
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.append(name)

    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    norm = model[1]
    norm.register_forward_pre_hook(note("pre"))
    norm.register_forward_hook(note("forward"))
    norm.register_full_backward_hook(note("backward"))
    norm.register_full_backward_pre_hook(note("backward pre"))
    norm.register_state_dict_post_hook(note("state dict"))
    norm.register_load_state_dict_post_hook(note("load"))
    norm.weight.register_hook(note("weight"))
    converted = renormify(model, inplace=inplace)
    assert calls == []
    if not inplace:
        converted[1].weight.register_hook(note("weight"))  # a tensor's hooks are not copied by torch
    for module in (converted, revert(converted, inplace=True)):
        calls.clear()
        module(_x()).sum().backward()
        module.load_state_dict(module.state_dict())
        expected = {"pre", "forward", "backward", "backward pre", "state dict", "load", "weight"}
        assert set(calls) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = _conv_net().to(dtype).eval()
    converted = renormify(model)
    _assert_same_state(model, converted)
    x = _x().to(dtype)
    assert torch.equal(converted(x), model(x))
    assert converted.train()(x).dtype == dtype
    _assert_same_state(revert(renormify(model)), model)


def test_requires_grad_is_kept() -> None:
    model = _conv_net()
    model[1].weight.requires_grad_(False)
    model[3].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in renormify(model).named_parameters()} == flags
    assert set(flags.values()) == {True, False}


@pytest.mark.parametrize("inplace", [False, True])
def test_training_flags_are_kept_and_frozen_layers_stay_frozen(inplace: bool) -> None:
    model = _conv_net().train()
    model[3].eval()
    flags = [m.training for m in model.modules()]
    converted = renormify(model, inplace=inplace)
    assert [m.training for m in converted.modules()] == flags
    assert len(set(flags)) == 2
    frozen, free = converted[3][1], converted[1]
    before = frozen.running_mean.clone(), free.running_mean.clone()
    converted(_x())
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(free.running_mean, before[1])
    assert [m.training for m in revert(converted).modules()] == flags


def test_meta_device_is_kept() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=5)
    conversion = convert(model)
    assert len(conversion.report.converted) == 20
    assert all(t.is_meta for t in (*conversion.model.parameters(), *conversion.model.buffers()))
    real = conversion.model.to_empty(device="cpu")
    real.load_state_dict(_lived_in(torchvision.models.resnet18(num_classes=5)).state_dict())
    assert (real.bn1.r_max, real.bn1.d_max) == (3.0, 5.0)
    _assert_moves_by_batch_renorm(real, torch.randn(4, C, 32, 32))


def test_converted_models_can_be_copied_and_pickled() -> None:
    converted = renormify(_conv_net()).eval()
    x = _x()
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), converted(x))
        assert torch.equal(revert(twin)(x), converted(x))


def test_model_keeps_its_python() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.norm(x), 0.5, self.training)

    converted = renormify(Dropping().train())
    assert type(converted) is Dropping
    assert (converted(_x()) == 0).float().mean() > 0.3
    assert (converted.eval()(_x()) != 0).all()


# ------------------------------------------------------------------------------------------------- settings


def test_settings_reach_every_layer() -> None:
    converted = renormify(_conv_net(), r_max=2.0, d_max=0.5, stat="var", momentum=0.3)
    layers = [m for m in converted.modules() if isinstance(m, RENORMS)]
    assert len(layers) == 3
    assert {(m.r_max, m.d_max, m.stat, m.momentum) for m in layers} == {(2.0, 0.5, "var", 0.3)}
    assert [m.eps for m in layers] == [1e-3, 1e-5, 1e-5]


@pytest.mark.parametrize(
    ("momentum", "expected"), [("keep", [0.1, None, 0.0]), (None, [None] * 3), (0.0, [0.0] * 3)]
)
def test_momentum_may_be_kept(momentum: Any, expected: list[float | None]) -> None:
    model = _conv_net()
    model[5].momentum = 0.0
    converted = renormify(model, momentum=momentum)
    assert [m.momentum for m in converted.modules() if isinstance(m, RENORMS)] == expected
    assert [m.momentum for m in revert(converted).modules() if isinstance(m, BATCH_NORMS)] == [0.1, None, 0.0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"r_max": 0.5}, r"r_max must be a number of at least 1 \(got 0.5\)"),
        ({"r_max": float("nan")}, "r_max must be a number of at least 1"),
        ({"d_max": -1.0}, r"d_max must be a number of at least 0 \(got -1.0\)"),
        ({"momentum": 1.5}, r"momentum must be a number from 0 to 1, None or 'keep' \(got 1.5\)"),
        ({"momentum": -0.1}, "momentum must be a number from 0 to 1"),
        ({"momentum": "kept"}, r"momentum must be a number from 0 to 1, None or 'keep' \(got 'kept'\)"),
        ({"stat": "std"}, r"stat must be one of sigma, var \(got 'std'\)"),
    ],
)
@pytest.mark.parametrize("function", [convert, renormify])
def test_bad_settings_are_refused_and_the_model_is_left(
    function: Callable[..., Any], setting: dict[str, Any], message: str
) -> None:
    model = _conv_net()
    with pytest.raises(InputError, match=message):
        function(model, inplace=True, **setting)
    assert not any(isinstance(m, RENORMS) for m in model.modules())


def test_filter_chooses_by_module_and_name() -> None:
    model = _conv_net()
    seen = {}

    def only_2d(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return isinstance(module, nn.BatchNorm2d) and name != "1"

    conversion = convert(model, filter_fn=only_2d)
    assert seen == {"1": model[1], "3.1": model[3][1], "5": model[5]}
    assert conversion.report.converted == ("3.1",)
    assert conversion.report.skipped == ("1", "5")
    assert {site.reason for site in conversion.report.sites} == {"", "left out by filter_fn"}
    assert [type(m) for m in (conversion.model[1], conversion.model[3][1])] == [nn.BatchNorm2d, BatchRenorm2d]


def test_filter_that_leaves_nothing() -> None:
    model = _conv_net()
    with pytest.raises(NothingToConvertError, match=r"3 skipped, the first 1 .left out by filter_fn"):
        convert(model, filter_fn=lambda module, name: False, inplace=True)
    assert isinstance(model[1], nn.BatchNorm2d)


# ------------------------------------------------------------------------------------------------ the report


def _skips() -> dict[str, tuple[nn.Module, str]]:
    overridden = nn.BatchNorm2d(C)
    overridden.forward = lambda x: x  # type: ignore[method-assign]
    uncounted = nn.BatchNorm2d(C)
    uncounted.num_batches_tracked = None
    return {
        "own": (OwnArithmetic(C), "OwnArithmetic has a forward of its own, which does not call batch_norm"),
        "overridden": (overridden, "forward was replaced on the instance"),
        "stateless": (nn.BatchNorm2d(C, track_running_stats=False), "set track_running_stats=True"),
        "uncounted": (uncounted, "has no num_batches_tracked"),
        "frozen": (torchvision.ops.FrozenBatchNorm2d(C), "frozen"),
        "renorm": (BatchRenorm2d(C), "is Batch Renorm already"),
        "call": (Call(), "frozen: the call has training=False"),
    }


@pytest.mark.parametrize(
    ("name", "inplace"),
    [(name, inplace) for name in _skips() for inplace in (False, True)],
)
def test_what_cannot_be_converted_is_reported_and_left(name: str, inplace: bool) -> None:
    module, reason = _skips()[name]
    kind, attributes = type(module), dict(module.__dict__)
    model = nn.Sequential(nn.BatchNorm2d(C), module)
    conversion = convert(model, inplace=inplace)
    assert conversion.report.converted == ("0",)
    assert conversion.report.skipped == ("1",)
    site = conversion.report.sites[1]
    assert reason in site.reason
    assert site.action == "skipped"
    assert "\n" not in site.reason
    assert type(module) is kind
    assert dict(module.__dict__).keys() == attributes.keys()
    assert type(conversion.model[1]).__name__ == kind.__name__


def test_include_frozen_asks_for_every_frozen_site() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), torchvision.ops.FrozenBatchNorm2d(C), Call())
    assert convert(model).report.skipped == ("1", "2")
    assert {site.reason[:7] for site in convert(model).report.sites[1:]} == {"frozen:"}
    assert convert(model, include_frozen=True).report.converted == ("0", "1", "2")


def test_report_as_plain_values() -> None:
    conversion = convert(nn.Sequential(nn.BatchNorm2d(C), Call(), nn.LazyBatchNorm2d()), inplace=True)
    plain = json.loads(json.dumps(conversion.to_dict()))
    assert plain == conversion.report.to_dict()
    assert plain["converted"] == ["0", "2"]
    assert plain["skipped"] == ["1"]
    assert [site["kind"] for site in plain["sites"]] == ["BatchNorm2d", "batch_norm()", "LazyBatchNorm2d"]
    assert [site["channels"] for site in plain["sites"]] == [C, C, None]
    assert set(plain["sites"][0]) == {"name", "kind", "action", "reason", "channels"}
    with pytest.raises(AttributeError):
        conversion.report.sites[0].action = "skipped"  # type: ignore[misc]


@pytest.mark.parametrize("training", [True, False])
def test_report_does_not_depend_on_whether_the_model_can_be_traced(training: bool) -> None:
    modules = [module for name, (module, _) in _skips().items() if name != "call"]
    for build in (_conv_net, lambda: nn.Sequential(nn.BatchNorm2d(C), *modules)):
        model = build().train(training)
        traced = convert(model).report.sites
        from_tree = convert(Untraceable(model)).report.sites
        assert [f"inner.{site.name}" for site in traced] == [site.name for site in from_tree]
        assert [site.to_dict() | {"name": ""} for site in traced] == [
            site.to_dict() | {"name": ""} for site in from_tree
        ]


def test_inert_subclass_is_converted_and_comes_back_as_itself() -> None:
    model = _lived_in(nn.Sequential(Plain(C))).eval()
    converted = renormify(model)
    assert isinstance(converted[0], Plain)
    assert isinstance(converted[0], BatchRenorm2d)
    assert (converted[0].note, converted[0].eps) == ("kept", 1e-3)
    x = _x()
    assert torch.equal(converted(x), model(x))
    back = revert(converted)
    assert type(back[0]) is Plain
    assert (back[0].momentum, back[0].eps, back[0].note) == (0.2, 1e-3, "kept")
    assert repr(back) == repr(model)


def test_synchronised_layer_becomes_its_counterpart() -> None:
    model = _lived_in(nn.Sequential(nn.SyncBatchNorm(C))).eval()
    conversion = convert(model)
    assert conversion.report.converted == ("0",)
    assert type(conversion.model[0]).__name__ == "SyncBatchRenorm"
    x = _x()
    assert torch.equal(conversion.model(x), model(x))
    assert type(revert(conversion.model)[0]) is nn.SyncBatchNorm
    _assert_same_state(revert(conversion.model), model)


# ------------------------------------------------------------------------------------------------ refusals


def test_root_batch_norm_comes_back_as_the_layer() -> None:
    norm = _lived_in(nn.BatchNorm2d(C)).eval()
    conversion = convert(norm)
    assert type(conversion.model) is BatchRenorm2d
    assert conversion.report.converted == ("",)
    assert type(norm) is nn.BatchNorm2d
    x = _x()
    assert torch.equal(conversion.model(x), norm(x))
    with pytest.raises(
        UnsupportedModelError, match="BatchNorm2d itself cannot become another layer in place"
    ):
        convert(norm, inplace=True)
    assert type(norm) is nn.BatchNorm2d
    assert type(revert(conversion.model)) is nn.BatchNorm2d
    with pytest.raises(UnsupportedModelError, match="in place"):
        revert(conversion.model, inplace=True)
    assert type(conversion.model) is BatchRenorm2d


def test_model_that_cannot_be_copied_says_so_and_converts_in_place() -> None:
    model = NotCopied()
    with pytest.raises(
        UnsupportedModelError, match=r"NotCopied cannot be copied \(TypeError: one of a kind\)"
    ):
        convert(model)
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert renormify(model, inplace=True) is model
    assert isinstance(model.norm, BatchRenorm2d)
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        revert(model)
    assert isinstance(revert(model, inplace=True).norm, nn.BatchNorm2d)


def test_nothing_to_convert() -> None:
    with pytest.raises(NothingToConvertError, match="found no BatchNorm to convert in Linear") as caught:
        convert(nn.Linear(2, 2))
    assert caught.value.exit_code == 1
    with pytest.raises(NothingToConvertError, match=r"1 skipped, the first the model itself .OwnArithm"):
        convert(OwnArithmetic(C))
    with pytest.raises(NothingToConvertError, match="Batch Renorm already"):
        convert(renormify(_conv_net()))
    with pytest.raises(NothingToConvertError, match="found no Batch Renorm in Sequential to revert"):
        revert(_conv_net())


@pytest.mark.parametrize("function", [convert, renormify, revert])
@pytest.mark.parametrize("thing", [None, "resnet18", torch.zeros(2), {"weight": torch.zeros(2)}])
def test_what_is_no_module(function: Callable[..., Any], thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"expected an nn.Module \(got {type(thing).__name__}\)"):
        function(thing)


@pytest.mark.parametrize("function", [convert, revert])
def test_scripted_models(function: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that scripting is going away
        scripted = torch.jit.script(_conv_net())
    with pytest.raises(UnsupportedModelError, match="scripted module cannot be rewritten"):
        function(scripted)


def test_scripted_part_of_a_model_is_reported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that scripting is going away
        scripted = torch.jit.script(nn.BatchNorm2d(C))
    conversion = convert(nn.Sequential(nn.BatchNorm2d(C), scripted), inplace=True)
    assert conversion.report.skipped == ("1",)
    assert conversion.report.sites[1].kind == "BatchNorm2d"


# -------------------------------------------------------------------------------------------------- revert


@pytest.mark.parametrize("inplace", [False, True])
def test_revert_gives_the_original_bit_for_bit(inplace: bool) -> None:
    model = _conv_net()
    converted = renormify(model, r_max=1.5, stat="var")
    back = revert(converted, inplace=inplace)
    assert (back is converted) == inplace
    _assert_same_state(back, model)
    for ours, original in zip(back.modules(), model.modules(), strict=True):
        assert type(ours) is type(original)
        assert ours.__dict__.keys() == original.__dict__.keys()
        assert ours._non_persistent_buffers_set == original._non_persistent_buffers_set
        assert ours._buffers.keys() == original._buffers.keys()
        if isinstance(original, BATCH_NORMS):
            assert (ours.momentum, ours.eps, ours.affine) == (
                original.momentum,
                original.eps,
                original.affine,
            )
    assert repr(back) == repr(model)
    x = _x()
    assert torch.equal(back.train()(x), model.train()(x))
    _assert_same_state(back, model)


def test_revert_keeps_what_training_taught() -> None:
    converted = renormify(_conv_net())
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    for _ in range(3):
        _train_step(converted, _x())
        optimizer.step()
        optimizer.zero_grad()
    back = revert(converted)
    _assert_same_state(back, converted)
    x = _x()
    assert torch.equal(back.eval()(x), converted.eval()(x))


def test_revert_of_layers_that_were_never_batch_norm() -> None:
    model = nn.Sequential(BatchRenorm2d(C, eps=1e-3, momentum=0.07, affine=False))
    back = revert(model)
    assert type(back[0]) is nn.BatchNorm2d
    assert (back[0].eps, back[0].momentum, back[0].affine) == (1e-3, 0.07, False)
    assert type(convert(back).model[0]) is BatchRenorm2d


def test_there_and_back_twice() -> None:
    model = _conv_net()
    for _ in range(2):
        renormify(model, inplace=True, momentum=0.5)
        revert(model, inplace=True)
    assert [m.momentum for m in model.modules() if isinstance(m, BATCH_NORMS)] == [0.1, None, 0.1]


# ------------------------------------------------------------------------------------------- GraphModules


@pytest.mark.parametrize("inplace", [False, True])
def test_graph_module_goes_through_as_a_graph(inplace: bool) -> None:
    graph_module = fx.symbolic_trace(_conv_net()).eval()
    nodes = [str(node) for node in graph_module.graph.nodes]
    x = _x()
    expected = graph_module(x)
    converted = renormify(graph_module, inplace=inplace)
    assert isinstance(converted, fx.GraphModule)
    assert (converted is graph_module) == inplace
    assert [str(node) for node in converted.graph.nodes] == nodes
    assert torch.equal(converted(x), expected)
    converted.graph.lint()
    converted.recompile()
    back = revert(converted)
    assert isinstance(back, fx.GraphModule)
    assert torch.equal(back(x), expected)
    _assert_moves_by_batch_renorm(converted, x)


def test_rewrite_is_an_fx_pass() -> None:
    graph_module = fx.symbolic_trace(_conv_net())
    result = rewrite(graph_module, Settings(r_max=2.0, momentum="keep"))
    assert result.graph_module is graph_module
    assert result.modified
    assert isinstance(graph_module.get_submodule("3.1"), BatchRenorm2d)
    assert graph_module.get_submodule("3.1").momentum is None
    assert graph_module.get_submodule("1").r_max == 2.0
    assert not rewrite(graph_module).modified
    assert not rewrite(fx.symbolic_trace(nn.Sequential(nn.ReLU()))).modified


def test_rewrite_fits_into_a_pipeline_of_passes() -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    result = PassManager(passes=[rewrite])(fx.symbolic_trace(_conv_net()))
    assert sum(isinstance(m, RENORMS) for m in result.graph_module.modules()) == 3


@pytest.mark.parametrize("training", [True, False])
def test_exported_graph_gets_layers(training: bool) -> None:
    model = _conv_net().train(training)
    model[3][1].momentum = 0.1  # with None, it is computed in the graph
    exported = torch.export.export(model, (_x(),)).module()
    conversion = convert(exported)
    assert conversion.report.skipped == ()
    assert len(conversion.report.converted) == 3
    assert sum(isinstance(m, RENORMS) for m in conversion.model.modules()) == 3
    _assert_same_state(conversion.model, exported)


# ----------------------------------------------------------------------------------- compiled and wrapped


def test_compiled_models_train_by_the_new_rule() -> None:
    torch._dynamo.reset()
    model = _conv_net()
    model[3][1].momentum = 0.1  # None breaks the graph of torch's own
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = 3 * _x() + 2
    compiled(x)
    conversion = convert(compiled)
    assert conversion.report.converted == ("_orig_mod.1", "_orig_mod.3.1", "_orig_mod.5")
    assert isinstance(model[1], nn.BatchNorm2d)
    renormify(compiled, inplace=True, r_max=2.0)
    assert isinstance(model[1], BatchRenorm2d)
    eager = copy.deepcopy(model)
    torch.testing.assert_close(compiled(x), eager(x))
    for ours, expected in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)
    _assert_moves_by_batch_renorm(eager, x)


def test_pruned_layer_keeps_its_mask() -> None:
    from torch.nn.utils import prune

    model = _lived_in(nn.Sequential(nn.BatchNorm2d(C))).eval()
    prune.l1_unstructured(model[0], "weight", 1)
    x = _x()
    expected = model(x)
    converted = renormify(model, inplace=True)  # torch cannot copy a pruned layer
    assert torch.equal(converted(x), expected)
    assert (converted[0].weight == 0).sum() == 1


def test_every_refusal_is_of_one_tree() -> None:
    for broken in (
        lambda: convert(3),
        lambda: convert(nn.Linear(1, 1)),
        lambda: convert(_conv_net(), r_max=0),
    ):
        with pytest.raises(RenormifyError):
            broken()


def test_copy_of_a_graph_module_keeps_hooks_and_attributes() -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(C)))
    calls: list[int] = []
    graph_module.register_forward_hook(lambda *args: calls.append(1))
    graph_module.note = "kept"
    converted = renormify(graph_module)
    converted(torch.randn(4, C))
    assert calls == [1]
    assert converted.note == "kept"


def test_revert_refuses_a_subclass_of_ours_whole() -> None:
    class Doubled(BatchRenorm1d):
        def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
            return 2 * super().forward(input, mask)

    model = nn.Sequential(BatchRenorm1d(C), Doubled(C))
    with pytest.raises(UnsupportedModelError, match="Doubled derives from a Batch Renorm layer"):
        revert(model, inplace=True)
    assert [type(layer) for layer in model] == [BatchRenorm1d, Doubled]


@pytest.mark.parametrize("setting", [{"momentum": [1]}, {"r_max": "3"}, {"d_max": None}])
def test_settings_of_another_type_are_input_errors(setting: dict[str, Any]) -> None:
    from renormify.errors import InputError

    with pytest.raises(InputError):
        convert(nn.Sequential(nn.BatchNorm1d(C)), **setting)


def test_revert_gives_float32_statistics_beside_a_half_precision_weight_back() -> None:
    norm = nn.BatchNorm1d(C)
    norm.weight.data, norm.bias.data = norm.weight.data.half(), norm.bias.data.half()
    norm.running_mean.normal_()
    back = revert(renormify(nn.Sequential(norm)))
    assert back[0].running_mean.dtype == torch.float32
    assert torch.equal(back[0].running_mean, norm.running_mean)


def test_rewrite_takes_graph_modules_alone() -> None:
    norm = nn.BatchNorm1d(C)
    with pytest.raises((TypeError, ValueError)):
        rewrite(norm)  # type: ignore[arg-type]
    assert type(norm) is nn.BatchNorm1d


# ------------------------------------------------------------------------------------------ rules of a user


class Centred(nn.Module):
    """A norm of a user's own: no BatchNorm by its ancestors, nor by its name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) / (self.running_var.view(shape) + 1e-5).sqrt()


class CentredRenorm(BatchRenorm2d):
    """The layer of ours that keeps the two names of its state."""

    def __init__(self, channels: int, **limits: float) -> None:
        super().__init__(channels, affine=False, **limits)
        self.num_batches_tracked = None


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renormify.registry._rules", {})


def _centred(module: nn.Module, settings: Settings) -> nn.Module:
    layer = CentredRenorm(len(module.running_mean), r_max=settings.r_max, d_max=settings.d_max)
    layer.running_mean, layer.running_var = module.running_mean, module.running_var
    return layer


@pytest.mark.usefixtures("rules")
def test_registered_rule_teaches_a_class() -> None:
    shared = Centred(C)
    model = _lived_in(nn.Sequential(shared, nn.BatchNorm2d(C), nn.ModuleDict({"again": shared})))
    assert convert(model).report.converted == ("1",)
    register_rule(Centred, _centred)
    conversion = convert(model, r_max=2.0)
    converted = conversion.model
    assert conversion.report.converted == ("0", "1")
    assert conversion.report.sites[0].kind == "Centred"
    assert converted[0] is converted[2]["again"]
    assert converted[0].r_max == 2.0
    assert type(model[0]) is Centred
    _assert_same_state(converted, model)
    _assert_moves_by_batch_renorm(converted[:2], _x())
    back = revert(converted)
    assert type(back[0]) is Centred
    assert back[0] is back[2]["again"]
    _assert_same_state(back, converted)


class CentredAffine(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))
        self.register_buffer("bias", torch.rand(channels))
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


def _centred_affine(module: nn.Module, settings: Settings) -> nn.Module:
    layer = BatchRenorm2d(len(module.running_mean), dtype=module.weight.dtype)
    layer.load_state_dict(module.state_dict())
    return layer


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_module_that_a_rule_replaced_comes_back_with_the_dtype_and_device_of_the_layer(
    dtype: torch.dtype,
) -> None:
    register_rule(CentredAffine, _centred_affine)
    model = nn.Sequential(CentredAffine(C))
    expected = copy.deepcopy(model).to(dtype)
    converted = renormify(model).to(dtype)
    weight = converted[0].weight
    back = revert(converted, inplace=True)
    _assert_same_state(back, expected)
    assert {name for name, _ in back.named_parameters()} == {"0.weight"}
    assert back[0].weight is weight
    moved = revert(renormify(nn.Sequential(CentredAffine(C))).to("meta"))
    assert all(tensor.is_meta for tensor in moved.state_dict().values())


@pytest.mark.usefixtures("rules")
def test_rule_of_an_ancestor_and_of_the_root() -> None:
    class Child(Centred):
        pass

    register_rule(Centred, _centred)
    assert type(renormify(Child(C))) is CentredRenorm
    assert convert(nn.Sequential(Child(C)), filter_fn=lambda m, n: True).report.converted == ("0",)
    assert type(revert(renormify(Child(C)))) is Child
    with pytest.raises(NothingToConvertError, match="left out by filter_fn"):
        convert(nn.Sequential(Child(C)), filter_fn=lambda module, name: False)


@pytest.mark.usefixtures("rules")
def test_rule_that_breaks_its_promise() -> None:
    model = nn.Sequential(Centred(C))
    for rule, message in (
        (lambda module, settings: nn.Identity(), r"must return a Batch Renorm layer \(got Identity\)"),
        (lambda module, settings: BatchRenorm2d(C), "must keep the names of its state: expected"),
    ):
        register_rule(Centred, rule)
        with pytest.raises(UnsupportedModelError, match=message):
            convert(model, inplace=True)
        assert type(model[0]) is Centred
    for norm_class, rule in ((Centred(C), _centred), (dict, _centred), (Centred, "rule")):
        with pytest.raises(InputError, match="register_rule expects"):
            register_rule(norm_class, rule)  # type: ignore[arg-type]
