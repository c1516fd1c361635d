"""Reading and writing checkpoints: every format, every damage, and nothing in a file ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pickle
import random
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from renormify import outputs
from renormify.checkpoints import (
    Checkpoint,
    fit_keys,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
)
from renormify.errors import CheckpointError, KeyMismatchError, OutputError, UnsafeCheckpointError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 5))
    model(torch.randn(8, 3, 8, 8))  # statistics that are not the default ones
    return model


@pytest.fixture
def state():
    return network().state_dict()


def assert_same(loaded, state):
    assert list(loaded) == list(state)
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype
        assert loaded[key].shape == value.shape
        assert loaded[key].numpy().tobytes() == value.numpy().tobytes()


class Payload:
    """What a malicious file holds: on loading, it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


FORMATS = {
    "zip": lambda state, path: torch.save(state, path),
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "state_dict": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model": lambda state, path: torch.save({"model": state, "optimizer": {"lr": 0.1}}, path),
    "model_state_dict": lambda state, path: torch.save({"model_state_dict": state}, path),
    "nested twice": lambda state, path: torch.save({"model": {"state_dict": state}}, path),
    "parallel": lambda state, path: torch.save(nn.DataParallel(network()).state_dict(), path),
    "plain dict": lambda state, path: torch.save(dict(state), path),
    "safetensors": lambda state, path: save_file(state, path),
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors", ""])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_told_by_content_and_load_to_the_bit(tmp_path, state, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    FORMATS[kind](state, path)
    before = path.read_bytes()
    checkpoint = fit_keys(network(), load_checkpoint(path))
    assert checkpoint.path == path
    assert checkpoint.metadata == {}
    assert_same(dict(sorted(checkpoint.items())), dict(sorted(state.items())))
    network().load_state_dict(checkpoint, strict=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_loading_writes_into_the_model_and_not_into_the_file(tmp_path, state):
    path = tmp_path / "a.pth"
    torch.save(state, path)
    before = path.read_bytes()
    checkpoint = load_checkpoint(path)
    model = load_weights(network(), checkpoint)
    with torch.no_grad():
        for tensor in [*model.parameters(), *checkpoint.values()]:
            tensor.zero_()
    assert path.read_bytes() == before


class Wrapper(nn.Module):
    """A model with a part of the name that DataParallel gives to its own."""

    def __init__(self):
        super().__init__()
        self.module = network()

    def forward(self, x):
        return self.module(x)


PREFIXED = {
    "dict": lambda state, path: torch.save(dict(state), path),
    "OrderedDict": lambda state, path: torch.save(OrderedDict(state), path),
    "state_dict": lambda state, path: torch.save({"state_dict": dict(state)}, path),
    "model": lambda state, path: torch.save({"model": OrderedDict(state)}, path),
    "safetensors": lambda state, path: save_file(dict(state), path),
}


@pytest.mark.parametrize("kind", PREFIXED)
def test_module_prefix_goes_where_the_model_has_none(tmp_path, state, kind):
    # Once: 'NoneType' object has no attribute 'keys', for every file without torch's record of versions.
    PREFIXED[kind]({f"module.{key}": value for key, value in state.items()}, tmp_path / "a")
    model = load_weights(network().float(), load_checkpoint(tmp_path / "a"))
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize("outer", [Wrapper, lambda: nn.DataParallel(network())], ids=["wrapper", "parallel"])
@pytest.mark.parametrize("stored", ["", "module.", "module.module."])
def test_module_prefix_is_what_the_model_calls_for(tmp_path, state, outer, stored):
    torch.save({stored + key: value for key, value in state.items()}, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert all(key.startswith(stored) for key in checkpoint)
    model = outer()
    nn.init.zeros_(model.module[0].weight)
    load_weights(model, checkpoint)
    assert_same(model.module.state_dict(), state)


def test_module_prefix_stays_where_not_every_key_has_it(tmp_path, state):
    mixed = {f"module.{key}": value for key, value in state.items()} | {"n": torch.ones(1)}
    torch.save(mixed, tmp_path / "a.pth")
    with pytest.raises(KeyMismatchError, match=r"unexpected: module\.0\.weight"):
        load_weights(network(), load_checkpoint(tmp_path / "a.pth"))


def test_the_versions_that_torch_records_survive(tmp_path):
    torch.save(nn.DataParallel(network()).state_dict(), tmp_path / "a.pth")
    stored = load_checkpoint(tmp_path / "a.pth")
    assert stored._metadata["module.1"] == {"version": 2}
    stripped = fit_keys(network(), stored)
    assert stripped._metadata["1"] == {"version": 2}
    assert fit_keys(Wrapper(), stripped)._metadata["module.1"] == {"version": 2}


@pytest.mark.parametrize("versions", [True, False])
def test_checkpoints_from_before_num_batches_tracked_load(tmp_path, state, versions):
    old = OrderedDict((key, value) for key, value in state.items() if "num_batches" not in key)
    if versions:
        old._metadata = state._metadata
    torch.save(old, tmp_path / "old.pth")
    model = load_weights(network(), load_checkpoint(tmp_path / "old.pth"))
    assert torch.equal(model[1].running_var, state["1.running_var"])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_named(tmp_path, state, legacy):
    path, mark = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"state_dict": state, "x": Payload(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    path, mark = tmp_path / "evil.safetensors", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Payload(mark), protocol=protocol))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_is_refused_with_how_to_go_on(tmp_path, legacy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(network(), tmp_path / "whole.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=r"whole pickled model.*state_dict\(\)"):
        load_checkpoint(tmp_path / "whole.pth")


class Config:
    lr = 1


class Settings(dict):
    """As EasyDict and its like are."""


def test_other_classes_in_a_checkpoint_are_named(tmp_path, state):
    torch.save({"state_dict": state, "args": Config()}, tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"test_checkpoints\.Config"):
        load_checkpoint(tmp_path / "a.pth")


def beside(monkeypatch):
    """What people's tools save beside the weights; the last two as if by packages that are not here."""
    for owner, kind in (("addict", Config), ("easydict", Settings)):
        monkeypatch.setitem(sys.modules, owner, types.SimpleNamespace(**{kind.__name__: kind}))
        monkeypatch.setattr(kind, "__module__", owner)
    return [
        argparse.Namespace(lr=1, nested=argparse.Namespace(path=Path("a"))),
        {"best": np.float64(3.5), "history": np.arange(3), "objects": np.array([{}], dtype=object)},
        datetime.datetime.now(datetime.timezone.utc),
        collections.defaultdict(list, a=[1]),
        Config(),
        Settings(a=1),
    ]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("number", range(6))
def test_settings_beside_the_weights_are_left_out_and_never_made(
    tmp_path, state, number, legacy, monkeypatch
):
    thing = beside(monkeypatch)[number]
    torch.save(
        {"x": thing, "state_dict": state, "y": thing},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    for name in ("addict", "easydict"):
        monkeypatch.delitem(sys.modules, name)
    found = load_checkpoint(tmp_path / "a.pth")
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert len(found.notes) == 1
    assert "not loaded, as it stands beside the weights" in found.notes[0]


def test_what_stands_beside_the_weights_may_not_be_a_disguise(tmp_path, state, monkeypatch):
    # numpy has functions that run what they are given; none is looked up.
    mark = tmp_path / "executed"
    monkeypatch.setattr(Payload, "__reduce__", lambda self: (np.fromfile, (str(mark),)))
    mark.write_text("x")
    torch.save({"state_dict": state, "x": Payload(mark)}, tmp_path / "a.pth")
    calls = []
    monkeypatch.setattr(np, "fromfile", calls.append)
    assert load_checkpoint(tmp_path / "a.pth").keys() == state.keys()
    assert calls == []
    torch.save({"x": np.float64(1)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"holds no state dict: it holds the keys 'x'"):
        load_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [4, 5])
def test_later_protocols_of_pickle_are_told_from_danger(tmp_path, state, protocol, legacy):
    path = tmp_path / "a.pth"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=f"is a pickle of protocol {protocol}, of which torch"):
        load_checkpoint(path)
    assert torch.equal(load_checkpoint(path, trust_pickle=True)["1.bias"], state["1.bias"])
    # Names that the pickle repeats by reference are told right.
    torch.save([Payload("x"), "system", Payload("x")], path, pickle_protocol=protocol)
    with pytest.raises(UnsafeCheckpointError, match=r"\(posix\.system\)"):
        load_checkpoint(path)


def test_torchs_advice_on_switching_safety_off_is_not_repeated(tmp_path, state):
    torch.save(state, tmp_path / "a.pth", pickle_protocol=1)
    with pytest.raises(CheckpointError, match="not a checkpoint") as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert "Unsupported operand" in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused_plainly(tmp_path, state, kind, share):
    path = tmp_path / "cut.pth"
    FORMATS[kind](state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|text file|not a checkpoint") as caught:
        load_checkpoint(path)
    assert not isinstance(caught.value, UnsafeCheckpointError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello, this is text\n", "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n\0\0\0", "HDF5"),
        (b"\x00\x01\x02\x03" * 9, "not a checkpoint"),
        (b"\xff" * 8 + b'{"a": 1}', "damaged or truncated safetensors"),
        (b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
        (b"PK\x03\x04" + b"\0" * 60, "damaged"),
        (pickle.dumps({"a": 1}, protocol=2), "not a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints_are_told_what_they_are(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (torch.ones(3), "a single tensor"),
        ([torch.ones(3)], "type list"),
        ({}, "empty mapping"),
        ({"epoch": 1, "state_dict": {}}, "the keys 'epoch', 'state_dict'"),
        ({"a": torch.ones(1), "lr": 0.1}, "it holds beside tensors 'lr', of type float"),
        (
            {"G": {"a": torch.ones(1)}, "D": {"a": torch.ones(1)}},
            "the keys 'G', 'D'; state dicts are under G, D: add --key G",
        ),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(tmp_path, saved, words):
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds no state dict") as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert words in str(caught.value)


def test_missing_files_and_folders(tmp_path, state):
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match=r"no such file.*did you mean resnet18\.pth\?"):
        load_checkpoint(tmp_path / "resnet8.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "nowhere" / "a.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_keys_that_do_not_fit_are_named_and_counted(tmp_path, state):
    wrong = {f"body.{key}": value for key, value in state.items()}
    with pytest.raises(KeyMismatchError) as caught:
        load_weights(network(), wrong)
    # The counter is not counted as missing: it need not be there.
    assert "8 missing: 0.weight, 0.bias, 1.weight, ..." in str(caught.value)
    assert "9 unexpected: body.0.weight, body.0.bias, body.1.weight, ..." in str(caught.value)


def test_shapes_that_do_not_fit_are_named(state):
    state["2.weight"] = torch.ones(7, 6)
    with pytest.raises(
        KeyMismatchError, match=r"1 of another shape: 2\.weight \(\(7, 6\) in the file, \(5, 6\)"
    ):
        load_weights(network(), state)


def test_float64_is_not_lost(state):
    wide = {
        key: value.double() + 1e-12 if value.is_floating_point() else value for key, value in state.items()
    }
    model = load_weights(network(), wide)
    assert_same(model.state_dict(), wide)


def test_float64_that_float32_holds_leaves_the_model_alone(state):
    wide = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    assert_same(load_weights(network(), wide).state_dict(), state)
    # One tensor in float64 does not make the whole model one in float64.
    assert_same(load_weights(network(), {**state, "0.bias": state["0.bias"].double()}).state_dict(), state)
    with pytest.raises(KeyMismatchError, match=r"0\.bias is float64 in the file and float32 in the model"):
        load_weights(network(), {**state, "0.bias": state["0.bias"].double() + 1e-12})


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("0.weight", lambda x: x, "0.weight is float32 in the file and float16 in the model"),
        ("0.weight", lambda x: x.bfloat16() * 1e-6, "0.weight is bfloat16 in the file and float16"),
        ("0.weight", lambda x: x * (1 + 1j), "0.weight is complex64 in the file and float16"),
        ("1.running_mean", lambda x: (x * 9).long(), "1.running_mean is int64 in the file and float16"),
        (
            "1.num_batches_tracked",
            lambda x: x + 0.5,
            "1.num_batches_tracked is float32 in the file and int64",
        ),
    ],
)
def test_no_value_is_rounded_silently(state, key, change, words):
    model = network().half()
    half = {k: value.half() if value.is_floating_point() else value for k, value in state.items()}
    load_weights(model, half)
    before = {k: value.clone() for k, value in model.state_dict().items()}
    with pytest.raises(KeyMismatchError) as caught:
        load_weights(model, {**half, key: change(state[key])})
    assert words in str(caught.value)
    assert_same(model.state_dict(), before)


def test_values_that_the_model_holds_may_have_another_dtype(state):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    wide = {key: value.float() for key, value in half.items()}
    model = load_weights(network().half(), wide)
    assert_same(model.state_dict(), half)


@pytest.mark.filterwarnings("ignore")  # torch's own, that these kinds are beta or deprecated
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.to_sparse(), "2.weight as a sparse_coo tensor, and the model does not; save to_dense()"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "a quantised tensor"),
    ],
)
def test_sparse_and_quantised_tensors_are_called_by_name(tmp_path, state, change, words):
    torch.save({**state, "2.weight": change(state["2.weight"])}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(), load_checkpoint(tmp_path / "a.pth"))
    assert words in str(caught.value)
    assert "right one" not in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "fuzzed"
    FORMATS[kind]({"a.weight": torch.randn(8, 4), "b": torch.arange(5)}, path)
    content, refusals = path.read_bytes(), []
    draws = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draws.randint(1, 6)):
            damaged[draws.randrange(len(damaged))] = draws.randrange(256)
        path.write_bytes(damaged if draws.random() < 0.7 else damaged[: draws.randrange(len(damaged))])
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert not any("\n" in message for message in refusals)
    assert os.listdir(tmp_path) == [path.name]


# ---- writing


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_what_is_written_reads_back_to_the_bit(tmp_path, state, suffix):
    path = tmp_path / f"out{suffix}"
    metadata = {"model": "torchvision:resnet18", "input_shape": [[1, 3, 8, 8]], "settings": {"r_max": 3.0}}
    assert save_checkpoint(path, state, metadata) == path
    checkpoint = load_checkpoint(path)
    assert_same(dict(sorted(checkpoint.items())), dict(sorted(state.items())))
    assert checkpoint.metadata == metadata
    network().load_state_dict(checkpoint, strict=True)
    assert os.listdir(tmp_path) == [path.name]
    # A file that others may read too, as any other program would have written it.
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_safetensors_header_is_plain_json(tmp_path, state):
    save_checkpoint(tmp_path / "a.safetensors", state, {"model": "timm:x"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert json.loads(header["renormify"]) == {"model": "timm:x"}


def test_foreign_metadata_of_any_shape_is_survived(tmp_path, state):
    for text in ("not json", "[1]", "3", "[" * 100_000):
        save_file(state, tmp_path / "a.safetensors", metadata={"renormify": text})
        assert load_checkpoint(tmp_path / "a.safetensors").metadata == {}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tied_and_strided_tensors(tmp_path, suffix):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "a": base,
        "tied": base,
        "row": base[1],
        "turned": base.t(),
        "step": base[:, ::2],
        "none": torch.empty(0),
    }
    save_checkpoint(tmp_path / f"a{suffix}", state)
    loaded = load_checkpoint(tmp_path / f"a{suffix}")
    assert set(loaded) == set(state)
    for key, value in state.items():
        assert torch.equal(loaded[key], value)
    assert state["a"] is state["tied"]
    assert not state["turned"].is_contiguous()


def test_safetensors_refuses_what_is_no_tensor(tmp_path, state):
    state["0._extra_state"] = {"a": 1}
    with pytest.raises(OutputError, match=r"_extra_state.*use \.pt"):
        save_checkpoint(tmp_path / "a.safetensors", state)
    assert os.listdir(tmp_path) == []
    save_checkpoint(tmp_path / "a.pt", state)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded["0._extra_state"] == {"a": 1}
    with pytest.raises(KeyMismatchError, match=r"1 unexpected: 0\._extra_state"):
        load_weights(network(), loaded)


def test_existing_files_are_replaced_only_with_force(tmp_path, state):
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        save_checkpoint(path, state)
    assert path.read_text() == "mine"
    save_checkpoint(path, state, force=True)
    assert_same(dict(sorted(load_file(path).items())), dict(sorted(state.items())))


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "relative"])
def test_an_input_is_never_replaced(tmp_path, state, link, monkeypatch):
    source = tmp_path / "in.pt"
    torch.save(state, source)
    before = source.read_bytes()
    path = source
    if link == "symlink":
        path = tmp_path / "link.pt"
        path.symlink_to(source)
    elif link == "hardlink":
        path = tmp_path / "hard.pt"
        path.hardlink_to(source)
    elif link == "relative":
        monkeypatch.chdir(tmp_path)
        path = Path("in.pt")
    with pytest.raises(OutputError, match="the input itself"):
        save_checkpoint(path, state, force=True, inputs=[source])
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.onnx", "suffix '.onnx'"),
        ("a", "suffix ''"),
        ("none/a.pt", "does not exist"),
        ("dir.pt", "is a folder"),
    ],
)
def test_bad_outputs_are_refused(tmp_path, state, name, words):
    (tmp_path / "dir.pt").mkdir()
    with pytest.raises(OutputError) as caught:
        save_checkpoint(tmp_path / name, state)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == ["dir.pt"]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, state, monkeypatch, moment, error, old):
    path = tmp_path / "a.safetensors"
    if old is not None:
        path.write_text(old)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(outputs.os, moment, fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is OutputError else None):
        save_checkpoint(path, state, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ([] if old is None else [path.name])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_disk_that_fills_up_while_writing(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"a": torch.zeros(1_000_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            save_checkpoint(tmp_path / f"a{suffix}", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_files_written_beside_the_output_move_with_it(tmp_path):
    with outputs.staged(tmp_path / "m.onnx") as target:
        assert target.name == "m.onnx"
        target.write_text("graph")
        target.with_name("m.onnx.data").write_text("weights")
        assert [file.name for file in tmp_path.iterdir()] == [target.parent.name]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


def test_load_model_builds_and_loads(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 5))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    state = network().state_dict()
    save_checkpoint(tmp_path / "a.safetensors", state)
    assert_same(load_model("mine:build", tmp_path / "a.safetensors").state_dict(), state)
    assert isinstance(load_model("mine:build"), nn.Sequential)


def test_a_checkpoint_is_a_state_dict():
    checkpoint = Checkpoint({"a": torch.ones(1)}, path=Path("a"))
    assert isinstance(checkpoint, dict)
    assert checkpoint.metadata == {}
