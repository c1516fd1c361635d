"""Exported programs: the norms train again, dropout follows the mode, and what does not is said."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from renormify import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Conversion, convert, renormify, revert
from renormify.errors import NothingToConvertError

Loaded = tuple[nn.Module, Tensor]
RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


class Net(nn.Module):
    """Norms of two kinds, one of them called twice, and dropout of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.twice = nn.BatchNorm2d(4, eps=1e-3, affine=False)
        self.features = nn.Dropout2d(0.5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.BatchNorm1d(4, momentum=0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(self.stem(x))))
        return self.head(self.drop(self.features(x).mean((2, 3))))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> Net:
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net


def _x(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))


def _exported(model: nn.Module, training: bool, x: Tensor | None = None, **options: Any) -> ExportedProgram:
    model = copy.deepcopy(model).train(training)
    return torch.export.export(model, (_x() if x is None else x,), **options)


def _saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def _kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


@pytest.mark.parametrize("loaded", [False, True], ids=["live", "loaded"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_program_becomes_a_module_that_trains_and_evaluates(net: Net, training: bool, loaded: bool) -> None:
    program = _exported(net, training, dynamic_shapes=({0: Dim("batch", min=2)},))
    program = _saved_and_loaded(program) if loaded else program
    conversion = convert(program)
    model = conversion.model
    assert isinstance(model, fx.GraphModule)
    assert sorted(conversion.report.converted) == ["head", "stem.1", "twice"]
    assert (conversion.report.skipped, conversion.report.notes) == ((), ())
    assert {BatchRenorm1d, BatchRenorm2d, nn.Dropout, nn.Dropout2d} <= _kinds(model)
    assert [model.get_submodule(name).eps for name in ("stem.1", "twice", "head")] == [1e-5, 1e-3, 1e-5]
    assert {layer.momentum for layer in model.modules() if isinstance(layer, RENORMS)} == {0.01}
    assert model.state_dict().keys() == net.state_dict().keys()

    x = _x(6)  # another batch size than the example's
    assert torch.equal(model.eval()(x), net.eval()(x))
    # In training: what the model itself, converted, gives; that one is held against the paper elsewhere.
    reference = _without_dropout(renormify(net)).train()
    _without_dropout(model).train()
    assert torch.equal(model(x), reference(x))
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert int(model.twice.num_batches_tracked) == 2
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_reason_is_recorded_for_what_was_exported_in_evaluation(net: Net) -> None:
    sites = convert(_exported(net, False)).report.sites
    assert all("recorded as evaluation" in site.reason for site in sites)
    assert all(site.reason == "" for site in convert(_exported(net, True)).report.sites)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_limits_of_one_and_zero_are_batch_norm(net: Net, training: bool) -> None:
    model = convert(_exported(net, training), r_max=1.0, d_max=0.0, momentum="keep", stat="var").model
    original = _without_dropout(copy.deepcopy(net)).train()
    _without_dropout(model).train()
    x = _x()
    torch.testing.assert_close(model(x), original(x))
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_follows_the_mode(net: Net, training: bool) -> None:
    model = convert(_exported(net, training)).model
    x = _x()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_inplace_dropout_stays_in_place() -> None:
    class Inplace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(1.0, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            self.drop(x)
            return x

    model = convert(_exported(Inplace(), True)).model
    assert model.train()(_x()).abs().max() == 0
    assert model.eval()(_x()).abs().max() > 0


def test_decomposed_program_trains_and_says_what_is_lost(net: Net) -> None:
    conversion = convert(_exported(net, False).run_decompositions())
    assert sorted(conversion.report.converted) == ["head", "stem.1", "twice"]
    [note] = conversion.report.notes
    assert "decomposed" in note
    assert conversion.to_dict()["notes"] == [note]
    model = conversion.model
    x = _x()
    assert torch.equal(model.eval()(x), net.eval()(x))
    reference = _without_dropout(renormify(net)).train()
    assert torch.equal(model.train()(x), reference(x))
    assert torch.equal(model.head.running_var, reference.head.running_var)


def test_program_decomposed_in_training_keeps_one_copy_of_each_movement(net: Net) -> None:
    _without_dropout(net)
    conversion = convert(_exported(net, True).run_decompositions())
    model, reference = conversion.model.train(), renormify(net).train()
    x = _x()
    torch.testing.assert_close(model(x), reference(x))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_randomness_that_stays_is_named(net: Net) -> None:
    [note] = convert(_exported(net, True).run_decompositions()).report.notes
    assert "bernoulli" in note
    assert "stays so in evaluation" in note


@pytest.mark.parametrize("inplace", [True, False])
def test_in_place_shares_the_programs_tensors(net: Net, inplace: bool) -> None:
    program = _exported(net, True)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    model = convert(program, inplace=inplace).model.train()
    model(_x())
    moved = [name for name, value in program.state_dict.items() if not torch.equal(value, before[name])]
    assert ("head.running_mean" in moved) == inplace
    assert bool(moved) == inplace


def test_graph_module_of_a_program_is_served_alike(net: Net) -> None:
    module = _exported(net, True).module()
    converted = convert(module).model
    assert torch.equal(converted.eval()(_x()), net.eval()(_x()))
    with pytest.raises(NotImplementedError):
        module.eval()  # it stays as it was


def test_revert_gives_batch_norm_that_still_trains(net: Net) -> None:
    back = revert(convert(_exported(net, False)).model)
    assert {nn.BatchNorm1d, nn.BatchNorm2d} <= _kinds(back)
    assert not _kinds(back) & set(RENORMS)
    assert torch.equal(back.eval()(_x()), net.eval()(_x()))
    assert back.head.momentum == 0.2
    back.train()(_x())
    assert int(back.head.num_batches_tracked) == 1


def test_state_under_names_of_its_own_gets_a_call_below_its_module() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mu", torch.full((3,), 0.3))
            self.register_buffer("sigma2", torch.full((3,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mu, self.sigma2, training=self.training)

    model = nn.Sequential(Own(), nn.Conv2d(3, 2, 1))
    conversion = convert(_exported(model, True))
    assert conversion.report.converted == ("0",)
    converted = conversion.model
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(converted.eval()(_x()), model.eval()(_x()))
    converted.train()(_x())
    # Algorithm 1 of the paper, for the statistics of the batch.
    x = _x().double().transpose(0, 1).flatten(1)
    sigma = (2 + 1e-5) ** 0.5
    moved = sigma + 0.01 * ((x.var(1, correction=0) + 1e-5).sqrt() - sigma)
    torch.testing.assert_close(converted.get_buffer("0.mu").double(), 0.3 + 0.01 * (x.mean(1) - 0.3))
    torch.testing.assert_close(converted.get_buffer("0.sigma2").double(), moved.square() - 1e-5)
    assert torch.equal(revert(converted).eval()(_x()), converted.eval()(_x()))


def test_trained_network_goes_through_export_and_back(mobilenet_v2: Callable[[], Loaded]) -> None:
    original, x = mobilenet_v2()
    conversion: Conversion = convert(_exported(original, False, x))
    assert len(conversion.report.converted) == 52
    with torch.no_grad():
        assert torch.equal(conversion.model.eval()(x), original(x))
    before = conversion.model.get_buffer("features.0.1.running_mean").clone()
    conversion.model.train()(x).sum().backward()
    assert not torch.equal(conversion.model.get_buffer("features.0.1.running_mean"), before)


def test_operator_of_unknown_kind_is_left_and_named() -> None:
    class Stats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            mean, invstd = torch.batch_norm_stats(x, 1e-5)
            return self.norm(torch.batch_norm_elemt(x, None, None, mean, invstd, 1e-5))  # type: ignore[no-any-return]

    graph_module = fx.symbolic_trace(Stats())
    nodes = [(node.op, node.target) for node in graph_module.graph.nodes]
    conversion = convert(graph_module)
    assert conversion.report.converted == ("norm",)
    skipped = {site.kind: site.reason for site in conversion.report.sites if site.action == "skipped"}
    assert skipped == dict.fromkeys(
        ("batch_norm_stats()", "batch_norm_elemt()"), "an operator of unknown kind"
    )
    assert [(node.op, node.target) for node in conversion.model.graph.nodes] == nodes


def test_call_whose_batch_statistics_are_used_is_left() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            state = (None, None, self.norm.running_mean, self.norm.running_var)
            x, mean, _ = torch.native_batch_norm(x, *state, True, 0.1, 1e-5)
            return self.norm(x) + mean.sum()  # type: ignore[no-any-return]

    report = convert(fx.symbolic_trace(Uses())).report
    assert report.converted == ("norm",)
    assert [site.reason for site in report.sites if site.action == "skipped"] == [
        "the statistics of the batch that it returns are used"
    ]


def test_block_without_gradient_follows_the_mode() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.second = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.drop(self.first(x))
            return self.second(x)  # type: ignore[no-any-return]

    original = Block()
    conversion = convert(_exported(original, True, torch.randn(5, 4)))
    assert len(conversion.report.converted) == 2
    assert any("block of the program" in note for note in conversion.report.notes)
    model, x = conversion.model.eval(), torch.randn(5, 4)
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), original.eval()(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preserved", [(), ("twice",)], ids=["", "signature"])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's
def test_unflattened_program_is_refused_with_what_to_do(
    net: Net, training: bool, preserved: tuple[str, ...]
) -> None:
    def unflattened() -> nn.Module:
        program = _exported(net, training, preserve_module_call_signature=preserved)
        return torch.export.unflatten(program)

    model = unflattened()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingToConvertError, match="convert the exported program instead") as caught:
        convert(model, inplace=True)
    assert {site.name.partition(":")[0].partition("@")[0] for site in caught.value.report.sites} == {
        "stem.1",
        "twice",
        "head",
    }
    assert model.state_dict().keys() == before.keys()
    both = nn.Sequential(nn.BatchNorm2d(3), unflattened())
    report = convert(both, inplace=True).report
    assert report.converted == ("0",)
    assert {site.kind for site in report.sites[1:]} == {"batch_norm()"}
    assert both[1](_x()).shape == (4, 4)
