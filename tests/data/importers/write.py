"""Writes the files beside it, each by the package whose layers it holds: python write.py PEER [PEER ...].

A layer is trained for some hundred steps on data that has a constant channel, a faint one and one far from
zero; the model is saved as the package's users save it; and what each norm layer gets and gives in
evaluation goes into PEER.npz under ``PATH|input`` and ``PATH|output``, with the package's ``version``.

    torchrl, sb3, avalanche    pip install torchrl sb3-contrib avalanche-lib
    ludvb                      pip install git+https://github.com/ludvb/batchrenorm@143076f
    keras                      pip install keras h5py; KERAS_BACKEND=torch
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
STEPS = 400


def batch(features: int, *spatial: int) -> torch.Tensor:
    """Of 16; the first channel is constant, the second faint, the third far from zero."""
    values = torch.randn(16, features, *spatial)
    for channel, (scale, shift) in enumerate(((0.0, 0.5), (1e-3, 0.1), (2.0, 40.0))):
        values[:, channel] = values[:, channel] * scale + shift
    return values


def train(model: nn.Module, shape: tuple[int, ...]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(STEPS):
        loss = (model(batch(*shape)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()


def record(model: nn.Module, norm: type, call, path: Path, version: str) -> None:
    """Writes what each layer of class ``norm`` gets and gives while ``call`` runs the model."""
    seen: dict[str, np.ndarray] = {"version": np.array(version)}

    def hook(name):
        def keep(module, args, output):
            seen[f"{name}|input"] = args[0].detach().numpy()
            seen[f"{name}|output"] = output.detach().numpy()

        return keep

    for name, module in model.named_modules():
        if isinstance(module, norm):
            module.register_forward_hook(hook(name))
    model.eval()
    with torch.no_grad():
        call()
    np.savez_compressed(path, **seen)


def write_torchrl() -> None:
    from torchrl.modules import BatchRenorm1d

    kwargs = {"momentum": 0.05, "warmup_steps": 100}
    model = nn.Sequential(
        BatchRenorm1d(4, **kwargs), nn.Linear(4, 5), nn.ReLU(), BatchRenorm1d(5, **kwargs), nn.Linear(5, 2)
    )
    train(model, (4,))
    torch.save(model.state_dict(), HERE / "torchrl.pth")
    version = importlib.metadata.version("torchrl")
    record(model, BatchRenorm1d, lambda: model(batch(4)), HERE / "torchrl.npz", version)


def write_sb3() -> None:
    from sb3_contrib import CrossQ
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    agent = CrossQ(
        "MlpPolicy",
        "Pendulum-v1",
        learning_starts=16,
        batch_size=16,
        buffer_size=1000,
        policy_kwargs={"net_arch": [3], "n_critics": 1, "batch_norm_momentum": 0.05},
        seed=0,
        device="cpu",
    )
    agent.learn(200)
    agent.save(HERE / "sb3.zip")
    torch.save(agent.policy.state_dict(), HERE / "sb3.pth")
    observations = torch.randn(8, 3)
    policy = agent.policy

    def call() -> None:
        policy.critic(observations, policy.actor(observations, deterministic=True))

    record(policy, BatchRenorm1d, call, HERE / "sb3.npz", importlib.metadata.version("sb3-contrib"))


def write_avalanche() -> None:
    from avalanche.models.batch_renorm import BatchRenorm2D
    from avalanche.training.utils import replace_bn_with_brn

    version = importlib.metadata.version("avalanche-lib")
    model = nn.Sequential(
        BatchRenorm2D(3, momentum=0.05),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        BatchRenorm2D(4, momentum=0.05),
        nn.Conv2d(4, 1, 1),
    )
    train(model, (3, 5, 5))
    torch.save(model.state_dict(), HERE / "avalanche_lost.pth")
    torch.save(model, HERE / "avalanche_whole.pth")
    torch.save(with_statistics(model), HERE / "avalanche.pth")
    record(model, BatchRenorm2D, lambda: model(batch(3, 5, 5)), HERE / "avalanche.npz", version)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.norm(input)

    model = Net()
    train(model, (3, 5, 5))
    replace_bn_with_brn(model)
    torch.save(with_statistics(model), HERE / "avalanche_replaced.pth")
    path = HERE / "avalanche_replaced.npz"
    record(model, BatchRenorm2D, lambda: model(batch(3, 5, 5)), path, version)


def with_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the error for a file without them says to save."""
    return model.state_dict() | {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.startswith("running_avg")
    }


def write_ludvb() -> None:
    from batchrenorm import BatchRenorm1d, BatchRenorm2d

    model = nn.Sequential(
        BatchRenorm2d(3, momentum=0.05),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(2),
        BatchRenorm1d(4, eps=1e-2, momentum=0.05),
    )
    train(model, (3, 5, 5))
    torch.save(model.state_dict(), HERE / "ludvb.pth")
    norms = (BatchRenorm1d, BatchRenorm2d)
    version = "0.1.0 (143076f952f0861bbf8af55833d046e10ffaa99b)"
    record(model, norms, lambda: model(batch(3, 5, 5)), HERE / "ludvb.npz", version)


def write_keras() -> None:
    import keras

    def renorm(**kwargs):
        return keras.layers.BatchNormalization(renorm=True, momentum=0.95, renorm_momentum=0.9, **kwargs)

    keras.utils.set_random_seed(0)
    layers = keras.layers
    input = keras.Input((3, 3, 3))
    hidden = renorm(name="first", renorm_clipping={"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0})(input)
    hidden = layers.BatchNormalization(name="plain")(hidden)
    block = keras.Sequential([layers.Dense(2), renorm(epsilon=1e-2, center=False)], name="block")
    output = renorm(axis=1, scale=False, name="last")(block(hidden))
    model = keras.Model(input, output)
    for _ in range(STEPS):
        model(np.moveaxis(batch(3, 3, 3).numpy(), 1, -1), training=True)
    for layer in (model.get_layer("first"), model.get_layer("last"), block.layers[1]):
        for weight in layer.trainable_weights:
            weight.assign(weight + 0.3 * np.random.randn(*weight.shape))
    model.save(HERE / "keras.keras")
    one = keras.Sequential([input, layers.Flatten(), renorm(name="norm")])
    for _ in range(STEPS):
        one(np.moveaxis(batch(3, 3, 3).numpy(), 1, -1), training=True)
    one.save_weights(HERE / "keras.weights.h5")
    seen = {"version": np.array(keras.__version__)}
    value = np.moveaxis(batch(3, 3, 3).numpy(), 1, -1)
    seen["norm|input"] = value.reshape(16, -1)
    seen["norm|output"] = keras.ops.convert_to_numpy(one(value, training=False))

    def step(layer, name: str, value: np.ndarray) -> np.ndarray:
        output = keras.ops.convert_to_numpy(layer(value, training=False))
        seen[f"{name}|input"], seen[f"{name}|output"] = value, output
        return output

    value = step(model.get_layer("first"), "first", value)
    value = keras.ops.convert_to_numpy(model.get_layer("plain")(value, training=False))
    value = keras.ops.convert_to_numpy(block.layers[0](value))
    value = step(block.layers[1], f"block.{block.layers[1].name}", value)
    step(model.get_layer("last"), "last", value)
    np.savez_compressed(HERE / "keras.npz", **seen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for peer in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"write_{peer}"]()
