"""``renormify import``: bad files are one clear line, and what is written tells where it came from."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from peer_files import DATA, FILES, assert_as_theirs
from torch import nn
from typer.testing import CliRunner

from renormify import translation
from renormify.checkpoints import load_checkpoint
from renormify.cli import app
from renormify.errors import RenormifyError
from renormify.importers import import_checkpoint


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
    """One bit of one statistic: HDF5 has no checksum, the archive has, at the end of a member."""
    with zipfile.ZipFile(DATA / "keras.keras") as archive, archive.open("model.weights.h5") as weights:
        value = h5py.File(weights)["layers/batch_normalization/vars/3"][()].tobytes()
        with zipfile.ZipFile(path, "w") as large:
            large.writestr("config.json", archive.read("config.json"))
            # Too long for a reader to come across the end by chance.
            large.writestr("model.weights.h5", archive.read("model.weights.h5") + bytes(2**20))
    content = bytearray(path.read_bytes())
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


@pytest.mark.parametrize("file", ["keras.keras", "keras.weights.h5", "sb3.zip"])
def test_a_damaged_archive_is_read_or_refused_and_nothing_else(file, tmp_path):
    chance = random.Random(file)
    content, path = (DATA / file).read_bytes(), tmp_path / file
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            start = chance.randrange(len(damaged))
            damaged[start : start + 8] = chance.choice([b"\xff" * 8, bytes(8), b"", chance.randbytes(8)])
        path.write_bytes(damaged)
        with contextlib.suppress(RenormifyError):
            import_checkpoint(path)
