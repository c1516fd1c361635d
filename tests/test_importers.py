"""The Batch Renorm layers of other packages, from files that they wrote: evaluation as theirs, faults told.

The oracle reads each file by itself and evaluates in float64, by the formulas in the package's own source.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from renormify import BatchRenorm1d, BatchRenorm2d, cli, translation
from renormify.checkpoints import load_checkpoint
from renormify.cli import app
from renormify.errors import (
    InputError,
    KeyMismatchError,
    MissingExtraError,
    NothingToConvertError,
    UnsafeCheckpointError,
)
from renormify.importers import import_checkpoint
from renormify.peers import PEERS

DATA = Path(__file__).parent / "data" / "importers"
PACKAGES = ("torchrl", "sb3_contrib", "stable_baselines3", "avalanche", "batchrenorm", "keras")
EPS = np.finfo(np.float32).eps


@pytest.fixture(autouse=True)
def _no_peer_installed(monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)


def numbers(tensors, name):
    return {
        key.removeprefix(f"{name}."): np.asarray(value, np.float64).reshape(-1)
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }


def torchrl(t):
    return t["running_mean"], np.sqrt(t["running_var"] + 1e-5), t["weight"], t["bias"]


def sb3(t):
    return t["ra_mean"], np.sqrt(t["ra_var"] + 1e-3), t["scale"], t["bias"]


def avalanche(t):
    return t["running_avg_mean"], t["running_avg_std"], t["gamma"], t["beta"]


def ludvb(t):
    return t["running_mean"], t["running_std"], t["weight"], t["bias"]


def keras(group, names, eps):
    t = {name: np.asarray(group[f"vars/{index}"], np.float64) for index, name in enumerate(names)}
    return t["moving_mean"], np.sqrt(t["moving_variance"] + eps), t.get("gamma", 1.0), t.get("beta", 0.0)


def keras_model():
    statistics = ["moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    with zipfile.ZipFile(DATA / "keras.keras") as archive, archive.open("model.weights.h5") as weights:
        layers = h5py.File(weights)["layers"]
        return {
            "first": keras(layers["batch_normalization"], ["gamma", "beta", *statistics], 1e-3),
            "block.batch_normalization": keras(
                layers["sequential/layers/batch_normalization"], ["gamma", *statistics], 1e-2
            ),
            "last": keras(layers["batch_normalization_2"], ["beta", *statistics], 1e-3),
        }


def keras_weights():
    statistics = ["moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    with h5py.File(DATA / "keras.weights.h5") as file:
        return {
            "batch_normalization": keras(
                file["layers/batch_normalization"], ["gamma", "beta", *statistics], 1e-3
            )
        }


def state_dict(file, formula, *names):
    tensors = torch.load(DATA / file, weights_only=True)
    return lambda: {name: formula(numbers(tensors, name)) for name in names}


CROSSQ = ("actor.latent_pi.0", "actor.latent_pi.3", "critic.qf0.0", "critic.qf0.3")
# The file, the recorded evaluation, the oracle by layer, the peer.
FILES = {
    "torchrl.pth": ("torchrl", state_dict("torchrl.pth", torchrl, "0", "3"), "torchrl"),
    "sb3.pth": ("sb3", state_dict("sb3.pth", sb3, *CROSSQ), "sb3"),
    "sb3.zip": ("sb3", state_dict("sb3.pth", sb3, *CROSSQ), "sb3"),
    "avalanche.pth": ("avalanche", state_dict("avalanche.pth", avalanche, "0", "3"), "avalanche"),
    "avalanche_replaced.pth": (
        "avalanche_replaced",
        state_dict("avalanche_replaced.pth", avalanche, "norm"),
        "avalanche",
    ),
    "ludvb.pth": ("ludvb", state_dict("ludvb.pth", ludvb, "0", "4"), "ludvb"),
    "keras.keras": ("keras", keras_model, "keras"),
    "keras.weights.h5": ("keras", keras_weights, "keras"),
}


def recorded(file, layer):
    """What the real layer got and gave, channels in the second place."""
    layer = "norm" if file == "keras.weights.h5" else layer  # of its own name the file does not tell
    with np.load(DATA / f"{FILES[file][0]}.npz") as seen:
        values = [seen[f"{layer}|input"], seen[f"{layer}|output"]]
    # The last of the Keras layers was built with axis=1; the others have channels last.
    last = file.startswith("keras") and layer != "last"
    return [torch.from_numpy(np.moveaxis(value, -1, 1) if last else value) for value in values]


def layer_for(state, prefix, eps, dim):
    """A layer of ours with the imported state, loaded strictly."""
    own = {
        key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")
    }
    kind = BatchRenorm2d if dim == 4 else BatchRenorm1d
    layer = kind(len(own["running_mean"]), eps=eps, affine="weight" in own)
    layer.load_state_dict(own)
    return layer.eval()


def assert_as_theirs(layer, file, name):
    """Ours is theirs, and both are the oracle, to what float32 makes of each term."""
    input, theirs = recorded(file, name)
    mean, sigma, weight, bias = FILES[file][1]()[name]
    shape = (1, -1, *[1] * (input.dim() - 2))
    mean, slope = mean.reshape(shape), np.broadcast_to(weight / sigma, sigma.shape).reshape(shape)
    bias = np.broadcast_to(bias, sigma.shape).reshape(shape)
    x = input.numpy().astype(np.float64)
    oracle = (x - mean) * slope + bias
    rounding = EPS * ((np.abs(x) + np.abs(mean)) * np.abs(slope) + np.abs(bias))
    ours = layer(input).detach().numpy()
    assert (np.abs(ours - oracle) <= 4 * rounding).all()
    assert (np.abs(theirs.numpy() - oracle) <= 4 * rounding).all()
    assert (np.abs(ours - theirs.numpy()) <= 8 * rounding).all()


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


def spoilt(file, change):
    def write(path):
        state = torch.load(DATA / file, weights_only=True)
        change(state)
        torch.save(state, path)

    return write


def set_to(key, value):
    return lambda state: state[key].__setitem__(0, value)


def without(key):
    return lambda state: state.__delitem__(key)


def mixed(path):
    state = dict(torch.load(DATA / "sb3.pth", weights_only=True))
    state |= torch.load(DATA / "ludvb.pth", weights_only=True)
    torch.save(state, path)


def copied(file):
    return lambda path: shutil.copy(DATA / file, path)


def cut(file):
    return lambda path: path.write_bytes((DATA / file).read_bytes()[:-4000])


def flipped(path):
    """One bit of one statistic: HDF5 has no checksum, the archive has."""
    content = bytearray((DATA / "keras.keras").read_bytes())
    with zipfile.ZipFile(DATA / "keras.keras") as archive, archive.open("model.weights.h5") as weights:
        value = h5py.File(weights)["layers/batch_normalization/vars/3"][()].tobytes()
    content[content.index(value)] ^= 1
    path.write_bytes(content)


def linked(path):
    shutil.copy(DATA / "keras.weights.h5", path)
    with h5py.File(path, "a") as file:
        del file["layers/batch_normalization/vars/3"]
        file["layers/batch_normalization/vars/3"] = h5py.ExternalLink("/etc/passwd", "/x")


def kept_outside(path):
    shutil.copy(DATA / "keras.weights.h5", path)
    with h5py.File(path, "a") as file:
        group = file["layers/batch_normalization/vars"]
        del group["3"]
        group.create_dataset("3", (27,), "f4", external=[(str(path.parent / "outside"), 0, 108)])


def with_variables(count, change=None):
    def write(path):
        shutil.copy(DATA / "keras.weights.h5", path)
        with h5py.File(path, "a") as file:
            group = file["layers/batch_normalization/vars"]
            for index in range(count, 7):
                del group[str(index)]
            if change is not None:
                change(group)

    return write


def deviate(group):
    group["4"][...] = np.sqrt(group["3"][...] + 1e-2)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(2**27))


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("policy.pth", b"not a state dict")


BAD = {
    # what is wrong: what writes the file, options, exit code, words of the message
    "lost statistics": (
        copied("avalanche_lost.pth"),
        "",
        2,
        "has no running_avg_mean and no running_avg_std",
    ),
    "how to save them": (
        copied("avalanche_lost.pth"),
        "",
        2,
        "save: model.state_dict() | {f'{n}.{k}': v for",
    ),
    "pickled avalanche": (copied("avalanche_whole.pth"), "", 2, "nothing was loaded. Avalanche keeps"),
    "missing": (
        spoilt("sb3.pth", without("critic.qf0.0.ra_var")),
        "",
        2,
        "critic.qf0.0 in a.pth has no ra_var",
    ),
    "missing count": (
        spoilt("ludvb.pth", without("0.num_batches_tracked")),
        "",
        2,
        "has no num_batches_tracked",
    ),
    "nan": (
        spoilt("sb3.pth", set_to("critic.qf0.0.ra_var", np.nan)),
        "",
        2,
        "inf or NaN in 1 of 4 values of ra_var",
    ),
    "torchrl at N = 1": (
        spoilt("torchrl.pth", set_to("0.running_var", np.inf)),
        "",
        2,
        "a batch of one sample",
    ),
    "negative": (
        spoilt("sb3.pth", set_to("critic.qf0.0.ra_var", -1.0)),
        "",
        2,
        "no positive sigma in 1 channels",
    ),
    "untrained": (spoilt("avalanche.pth", set_to("0.running_avg_std", 0.0)), "", 2, "divides by zero"),
    "sizes": (
        spoilt("ludvb.pth", lambda state: state.update({"0.bias": torch.ones(7)})),
        "",
        2,
        "expected one number for each channel (got running_mean (3,)",
    ),
    "integers": (
        spoilt("ludvb.pth", lambda state: state.update({"0.bias": torch.ones(3, dtype=torch.long)})),
        "",
        2,
        "damaged",
    ),
    "mixed": (mixed, "", 2, "layers of sb3-contrib (actor.latent_pi.0) and of ludvb/batchrenorm (0)"),
    "wrong peer": (
        copied("ludvb.pth"),
        "--from sb3",
        2,
        "no layers of sb3-contrib, but of ludvb/batchrenorm (0)",
    ),
    "wrong peer of keras": (copied("keras.keras"), "--from sb3", 2, "use --from keras"),
    "no such peer": (copied("ludvb.pth"), "--from lubdv", 2, "lubdv"),
    "eps": (copied("ludvb.pth"), "--eps 0", 2, "eps must be positive"),
    "nothing": (lambda path: torch.save({"a.weight": torch.ones(2)}, path), "", 1, "nothing to import"),
    "batch norm": (lambda path: torch.save(nn.BatchNorm1d(2).state_dict(), path), "", 1, "renormify convert"),
    "missing file": (lambda path: None, "", 2, "no such file"),
    "text": (lambda path: path.write_text("hello there"), "", 2, "text file"),
    "cut archive": (cut("sb3.zip"), "", 2, "damaged"),
    "cut weights": (cut("keras.weights.h5"), "", 2, "damaged or truncated"),
    "cut model": (cut("keras.keras"), "", 2, "damaged"),
    "flipped bit": (flipped, "", 2, "damaged or truncated: BadZipFile"),
    "policy": (other_zip, "", 2, "policy.pth in a.pth is"),
    "bomb": (bomb, "", 2, "no weights are compressed so well"),
    "link": (linked, "", 2, "holds a link at /layers/batch_normalization/vars/3"),
    "kept outside": (kept_outside, "", 2, "in another file, which is not followed"),
    "one of two": (with_variables(6), "", 2, "whether batch_normalization has gamma or beta"),
    "no renorm": (with_variables(4), "", 1, "no BatchNormalization with renorm=True"),
    "epsilon": (with_variables(7, deviate), "", 2, "but with one near 0.01: give it as --eps"),
    "epsilon told": (copied("keras.keras"), "--eps 0.5", 2, "was built with epsilon=0.001, and not with 0.5"),
    "unknown model": (copied("ludvb.pth"), "--model torchvision:resnt18", 2, "did you mean resnet18"),
    "other model": (copied("ludvb.pth"), "--model torchvision:resnet18", 2, "no norm layer 0"),
    "suffix": (copied("ludvb.pth"), "-o out.bin", 2, ".safetensors, .pt, .pth"),
    "itself": (copied("ludvb.pth"), "-o a.pth --force", 2, "the input itself"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_file_is_one_clear_line_and_nothing_is_written(wrong, tmp_path, monkeypatch):
    write, options, code, words = BAD[wrong]
    monkeypatch.chdir(tmp_path)
    write(Path("a.pth"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    output = [] if "-o" in options else ["-o", "out.safetensors"]
    result = CliRunner().invoke(app, ["import", "a.pth", *options.split(), *output])
    assert result.exit_code == code, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("file", FILES)
def test_the_command_writes_a_checkpoint_that_tells_what_was_mended(file, suffix, tmp_path):
    output = tmp_path / f"out{suffix}"
    before = (DATA / file).read_bytes()
    result = CliRunner().invoke(app, ["import", str(DATA / file), "-o", str(output), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"]
    assert document["output"] == str(output)
    written, imported = load_checkpoint(output), import_checkpoint(DATA / file)
    assert written.keys() == imported.state_dict.keys()
    assert all(torch.equal(value, imported.state_dict[key]) for key, value in written.items())
    assert written.metadata["imported"]["mended"] == document["imported"]["mended"]
    assert written.metadata["imported"]["from"] == FILES[file][2]
    assert (DATA / file).read_bytes() == before


def test_people_see_each_layer_and_each_fault(tmp_path):
    command = [
        "import",
        str(DATA / "sb3.zip"),
        "-o",
        str(tmp_path / "a.pt"),
        "--html",
        str(tmp_path / "a.html"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "4 layers of sb3-contrib evaluate as there" in result.stdout
    assert "critic.qf0.3" in result.stdout
    assert "eps is added twice" in result.stdout
    assert "eps is added twice" in (tmp_path / "a.html").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.pt")])
    assert "eps is added twice" in shown.stdout
    assert "Examples" in CliRunner().invoke(app, ["import", "--help"]).stdout


MODEL = """
from torch import nn

from renormify import BatchRenorm1d, BatchRenorm2d

def net():
    norms = BatchRenorm2d(3), BatchRenorm1d(4)
    return nn.Sequential(norms[0], nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2), norms[1])
"""


def test_with_a_model_the_file_is_for_it_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_for_import", raising=False)
    Path("mine_for_import.py").write_text(MODEL)
    command = ["import", str(DATA / "ludvb.pth"), "--model", "mine_for_import:net", "-o", "a.safetensors"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    import mine_for_import

    checkpoint = load_checkpoint("a.safetensors")
    told = [mend["now"] for mend in checkpoint.metadata["imported"]["mended"]]
    # The dead channel has a sigma of 1e-3, and the faint one of 2e-3, where eps is 1e-5.
    assert "running_var is 0 there, in 2 of 3 channels, and the weight carries the rest" in told
    model = mine_for_import.net()
    model.load_state_dict(checkpoint)
    for name in ("0", "4"):
        assert_as_theirs(model[int(name)].eval(), "ludvb.pth", name)
    assert checkpoint.metadata["model"] == "mine_for_import:net"


def test_a_layer_that_would_evaluate_otherwise_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        translation, "_affine", lambda theirs, scale, target: (theirs.weight, theirs.bias * 1.00001)
    )
    result = CliRunner().invoke(app, ["import", str(DATA / "sb3.pth"), "-o", str(tmp_path / "a.pt")])
    assert result.exit_code == 1
    assert "not as in sb3-contrib in evaluation: " in result.stderr
    assert list(tmp_path.iterdir()) == []
