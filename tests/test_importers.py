"""The Batch Renorm layers of other packages, from their own files: evaluation as theirs, faults told."""

from __future__ import annotations

import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_files import DATA, EPS, FILES, assert_as_theirs, layer_for, recorded
from torch import nn
from torch.nn import functional as F

from renormify import BatchRenorm1d, BatchRenorm2d, cli, translation
from renormify.errors import (
    InputError,
    KeyMismatchError,
    MissingExtraError,
    NothingToConvertError,
    UnsafeCheckpointError,
)
from renormify.importers import import_checkpoint
from renormify.peers import PEERS

PACKAGES = ("torchrl", "sb3_contrib", "stable_baselines3", "avalanche", "batchrenorm", "keras")


@pytest.fixture(autouse=True)
def _no_peer_installed(monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("file", FILES)
def test_evaluation_is_what_the_real_package_recorded(file):
    imported = import_checkpoint(DATA / file)
    assert imported.report.peer == FILES[file][2]
    assert [layer.name for layer in imported.report.layers] == list(FILES[file][1]())
    for layer in imported.report.layers:
        input, _ = recorded(file, layer.name)
        assert_as_theirs(layer_for(imported.state_dict, layer.name, layer.eps, input.dim()), file, layer.name)


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-3, 0.3])
@pytest.mark.parametrize("file", FILES)
def test_evaluation_is_theirs_whatever_the_eps_of_the_model(file, eps):
    oracle = FILES[file][1]()
    model = nn.ModuleDict()
    for name, (mean, *_) in oracle.items():
        model[name.replace(".", "_")] = nn.BatchNorm1d(len(mean), eps=eps)
    modules = {name: model[name.replace(".", "_")] for name in oracle}
    model.named_modules = lambda: iter(modules.items())  # paths with dots, without building each network
    model.state_dict = lambda: {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    imported = import_checkpoint(DATA / file, model=model)
    assert imported.report.passed
    for layer in imported.report.layers:
        assert layer.eps == eps
        input, _ = recorded(file, layer.name)
        assert_as_theirs(layer_for(imported.state_dict, layer.name, eps, input.dim()), file, layer.name)
        assert (imported.state_dict[f"{layer.target}.running_var"] >= 0).all()
        below = (oracle[layer.name][1] ** 2 < eps).any()
        assert below == any("below sqrt(eps)" in mend.fault for mend in layer.mended)


@pytest.mark.parametrize("file", ["torchrl.pth", "sb3.pth"])
def test_statistics_are_kept_to_the_bit_where_eps_is_theirs(file):
    theirs, ours = torch.load(DATA / file, weights_only=True), import_checkpoint(DATA / file).state_dict
    names = {
        "ra_mean": "running_mean",
        "ra_var": "running_var",
        "scale": "weight",
        "steps": "num_batches_tracked",
    }
    for key, value in theirs.items():
        prefix, _, leaf = key.rpartition(".")
        own = ours[f"{prefix}.{names.get(leaf, leaf)}"]
        assert own.dtype == value.dtype
        assert torch.equal(own, value)
    assert len(ours) == len(theirs)


def test_a_whole_model_loads_strictly_in_batch_norm_and_in_ours():
    imported = import_checkpoint(DATA / "torchrl.pth")
    for kind in (nn.BatchNorm1d, BatchRenorm1d):
        model = nn.Sequential(kind(4), nn.Linear(4, 5), nn.ReLU(), kind(5), nn.Linear(5, 2))
        model.load_state_dict(imported.state_dict)
        assert list(model.state_dict()) == list(imported.state_dict)
    first, _ = imported.report.layers
    assert (first.count, first.channels, first.read) == (400, 4, PEERS["torchrl"].keys)
    assert imported.report.kept == 4


def test_the_count_of_steps_survives():
    state = import_checkpoint(DATA / "ludvb.pth").state_dict
    assert state["0.num_batches_tracked"] == 400
    report = import_checkpoint(DATA / "avalanche.pth").report
    assert report.layers[0].count is None
    assert any("does not count" in note for note in report.notes)


@given(
    log_sigma=st.lists(st.floats(-7, 4), min_size=1, max_size=5),
    eps=st.sampled_from([1e-12, 1e-5, 1e-3, 1.0]),
    mean=st.floats(-100, 100),
)
@settings(max_examples=60, deadline=None)
def test_any_sigma_fits_any_eps(log_sigma, eps, mean):
    std = 10.0 ** torch.tensor(log_sigma)
    tensors = {
        "running_mean": torch.full_like(std, mean),
        "running_std": std,
        "weight": torch.linspace(-2, 2, len(std)),
        "bias": torch.linspace(1, 0, len(std)),
        "num_batches_tracked": torch.tensor(7),
    }
    norm = translation.Norm("", tensors, 1e-3)
    state, layer = translation.translate(norm, PEERS["ludvb"], translation.Target("", eps))
    x = torch.full_like(std, mean) + std * torch.tensor([[-2.0], [0.5]])
    ours = F.batch_norm(
        x, state["running_mean"], state["running_var"], state["weight"], state["bias"], eps=eps
    )
    slope = tensors["weight"].double() / std.double()
    center = tensors["running_mean"].double()
    oracle = (x.double() - center) * slope + tensors["bias"].double()
    rounding = EPS * ((x.double().abs() + center.abs()) * slope.abs() + 1)
    assert ((ours.double() - oracle).abs() <= 4 * rounding).all()
    assert layer.tolerance_used <= 1


def mend_of(report, words):
    (found,) = [mend for mend in report.mended() if words in mend["fault"]]
    return found


def test_torchrl_tells_how_far_its_warm_up_factor_has_gone(tmp_path):
    state = torch.load(DATA / "torchrl.pth", weights_only=True)
    state["3.num_batches_tracked"].fill_(35_000)
    torch.save(state, tmp_path / "a.pth")
    mend = mend_of(import_checkpoint(tmp_path / "a.pth").report, "warm-up factor")
    assert (mend["effect"], mend["layer"], mend["layers"]) == (3.0, "3", 2)


def test_sb3_tells_what_eps_added_twice_did():
    mend = mend_of(import_checkpoint(DATA / "sb3.pth").report, "eps is added twice")
    variance = torch.load(DATA / "sb3.pth", weights_only=True)[f"{mend['layer']}.ra_var"].double().numpy()
    wide = 1e9  # a batch of that variance, r without a limit, as sb3's training normalises it
    r = np.sqrt(wide + 1e-3) / np.sqrt(variance + 1e-3)
    theirs = 1 / np.sqrt(wide / r**2 + 1e-3)
    due = 1 / np.sqrt(wide + 1e-3) * r
    np.testing.assert_allclose(mend["effect"], (due / theirs - 1).max(), rtol=1e-6)


def test_avalanche_tells_what_its_conversion_has_changed(tmp_path):
    norm = nn.BatchNorm2d(1)
    norm.running_var.fill_(1e-6)
    x = torch.full((1, 1, 1, 1), 1e-3)
    theirs = x / norm.running_var.sqrt()  # BatchRenorm2D of replace_bn_with_brn, in evaluation
    state = {"gamma": torch.ones(1, 1, 1, 1), "beta": torch.zeros(1, 1, 1, 1)}
    state |= {
        "running_avg_mean": torch.zeros(1, 1, 1, 1),
        "running_avg_std": norm.running_var.sqrt().view(1, 1, 1, 1),
    }
    torch.save({f"bn.{key}": value for key, value in state.items()}, tmp_path / "a.pth")
    imported = import_checkpoint(tmp_path / "a.pth")
    factor = (theirs / norm.eval()(x)).item()
    assert factor == pytest.approx(3.3166, abs=1e-4)
    assert mend_of(imported.report, "leaves BatchNorm's eps out")["effect"] == pytest.approx(factor - 1)
    assert layer_for(imported.state_dict, "bn", 1e-5, 4)(x).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_ludvb_tells_how_much_eps_on_the_deviation_adds():
    mend = mend_of(import_checkpoint(DATA / "ludvb.pth").report, "added to the standard deviation")
    std = torch.load(DATA / "ludvb.pth", weights_only=True)["0.running_std"].double().numpy() - 1e-3
    by_paper = np.sqrt(np.maximum(std, 0) ** 2 + 1e-6)  # the dead channel: 1e-3 on both sides
    np.testing.assert_allclose(mend["effect"], ((std + 1e-3) / by_paper - 1).max(), rtol=1e-6)
    assert mend["layer"] == "0"


def test_keras_tells_how_far_its_two_means_are_apart_and_its_limits():
    report = import_checkpoint(DATA / "keras.keras").report
    assert 0 < mend_of(report, "relative to renorm_mean")["effect"] < 0.1
    assert mend_of(report, "rmax=3, rmin=0.3333, dmax=5")["layer"] == "first"
    assert report.left_out == ("plain", "block.dense")
    assert any("strict=False" in note for note in report.notes)


def keras_target(order=("a", "b", "c"), channels=(3, 2, 3), **kwargs):
    norms = [nn.BatchNorm2d(count, eps=1e-5, **kwargs) for count in channels]
    return nn.Sequential(OrderedDict(zip(order, norms, strict=True)))


def test_layers_of_keras_get_the_names_of_the_model():
    model = keras_target()
    imported = import_checkpoint(DATA / "keras.keras", model=model)
    assert [(layer.name, layer.target) for layer in imported.report.layers] == [
        ("first", "a"),
        ("block.batch_normalization", "b"),
        ("last", "c"),
    ]
    model.load_state_dict(imported.state_dict)
    for name, module in (("first", model.a), ("block.batch_normalization", model.b), ("last", model.c)):
        assert_as_theirs(module.eval(), "keras.keras", name)


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        (
            "keras.keras",
            keras_target(channels=(3, 3, 2)),
            r"\[3, 2, 3\] in the file and \[3, 3, 2\] in the model",
        ),
        ("keras.keras", keras_target(affine=False), "a has no bias and no weight"),
        ("sb3.pth", keras_target(), "no norm layer actor.latent_pi.0"),
        (
            "torchrl.pth",
            nn.Sequential(nn.BatchNorm1d(4), nn.Identity(), nn.Identity(), nn.BatchNorm1d(9)),
            "9",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(file, model, words):
    with pytest.raises(KeyMismatchError, match=words):
        import_checkpoint(DATA / file, model=model)


def test_the_prefix_of_data_parallel_is_the_models_business(tmp_path):
    state = torch.load(DATA / "ludvb.pth", weights_only=True)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "a.pth")
    model = nn.Sequential(BatchRenorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2), BatchRenorm1d(4))
    model.load_state_dict(import_checkpoint(tmp_path / "a.pth", model=model).state_dict)
    assert_as_theirs(model[0].eval(), "ludvb.pth", "0")
    assert "module.0.running_var" in import_checkpoint(tmp_path / "a.pth").state_dict


def test_batch_norm_beside_their_layers_and_what_a_subclass_adds_are_kept(tmp_path):
    state = torch.load(DATA / "sb3.pth", weights_only=True)
    state |= {f"plain.{key}": value for key, value in nn.BatchNorm1d(2).state_dict().items()}
    state["critic.qf0.0.temperature"] = torch.tensor(2.0)
    torch.save(state, tmp_path / "a.pth")
    imported = import_checkpoint(tmp_path / "a.pth")
    assert imported.state_dict["plain.running_var"].tolist() == [1.0, 1.0]
    assert imported.state_dict["critic.qf0.0.temperature"] == 2
    assert imported.report.kept == 10 + 5 + 1


def test_half_precision_is_read_and_statistics_become_float32(tmp_path):
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in torch.load(DATA / "sb3.pth", weights_only=True).items()
    }
    torch.save(state, tmp_path / "a.pth")
    imported = import_checkpoint(tmp_path / "a.pth")
    assert imported.report.passed
    assert imported.state_dict["critic.qf0.0.running_var"].dtype == torch.float32
    assert imported.state_dict["critic.qf0.1.weight"].dtype == torch.float16


def test_torchrl_is_told_from_batch_norm_by_torchs_record_or_by_the_user(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "bn.pth")
    with pytest.raises(NothingToConvertError, match="renormify convert"):
        import_checkpoint(tmp_path / "bn.pth")
    with pytest.raises(NothingToConvertError):
        import_checkpoint(tmp_path / "bn.pth", "torchrl")
    bare = dict(torch.load(DATA / "torchrl.pth", weights_only=True))
    torch.save(bare, tmp_path / "bare.pth")
    with pytest.raises(NothingToConvertError, match="--from torchrl"):
        import_checkpoint(tmp_path / "bare.pth")
    assert len(import_checkpoint(tmp_path / "bare.pth", "torchrl").report.layers) == 2


def test_what_was_imported_is_not_imported_again(tmp_path):
    imported = import_checkpoint(DATA / "torchrl.pth")
    torch.save(imported.state_dict, tmp_path / "a.pth")
    with pytest.raises(NothingToConvertError):
        import_checkpoint(tmp_path / "a.pth")


def test_h5py_is_asked_for_only_by_files_of_keras(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert import_checkpoint(DATA / "ludvb.pth").report.passed
    with pytest.raises(MissingExtraError, match=r"pip install 'renormify\[keras\]'"):
        import_checkpoint(DATA / "keras.keras")


def test_an_unknown_peer_is_named_with_the_nearest():
    with pytest.raises(InputError, match="did you mean torchrl"):
        import_checkpoint(DATA / "torchrl.pth", "torchlr")
    assert {peer.value for peer in cli.Peer} == {"auto", *PEERS}


def test_a_pickle_of_others_is_refused_as_everywhere():
    with pytest.raises(UnsafeCheckpointError, match="whole pickled model"):
        import_checkpoint(DATA / "avalanche_whole.pth", "ludvb")
