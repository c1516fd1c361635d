"""The files that other packages wrote, what their layers gave in evaluation, and an oracle for it.

The oracle reads each file by itself and evaluates in float64, by the formulas in the package's own source.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch

from renormify import BatchRenorm1d, BatchRenorm2d

DATA = Path(__file__).parent / "data" / "importers"
EPS = np.finfo(np.float32).eps


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
