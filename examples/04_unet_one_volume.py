"""Fine-tune a trained 3-D UNet, which segments platelets, on other volumes with one of them in each batch.

Volumes take so much memory that one is all that fits, and one holds a single cell, the next holds twelve.
BatchNorm in training normalises each by itself, which it cannot do in evaluation. The script trains the UNet
with BatchNorm and with Batch Renorm, and prints the Dice coefficient of the mask on volumes held out, in
training mode and in evaluation mode; only the latter is what a user gets.

$ pip install renormify; pip install --no-deps platelet-unet-watershed==0.0.3
$ python examples/04_unet_one_volume.py --steps 40
"""

import argparse
import copy
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renormify import renormify


def trained_unet() -> nn.Module:
    """The UNet of platelet-unet-watershed, 18 times BatchNorm3d; by path, as the package imports a viewer."""
    package = importlib.util.find_spec("plateseg")
    if package is None:
        raise SystemExit("its weights are missing: pip install --no-deps platelet-unet-watershed==0.0.3")
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("platelet_unet", folder / "unet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.UNet(in_channels=1, out_channels=5)
    weights = folder / "data" / "unet-210913-zyxmc.pt"
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model


def volume(size: list[int]) -> tuple[Tensor, Tensor]:
    """Noise with one to twelve ellipsoids in it as (1, 1, D, H, W), and their mask."""
    cells = int(torch.randint(1, 13, ()))
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), -1)
    centres = torch.rand(cells, 1, 1, 1, 3) * torch.tensor(size)
    radii = torch.tensor([1.5, 3.0, 3.0]) * (0.7 + 0.8 * torch.rand(cells, 1, 1, 1, 3))
    mask = (((grid - centres) / radii).square().sum(-1) < 1).any(0).float()
    image = 0.1 + (0.1 + 0.2 * torch.rand(())) * mask + 0.05 * torch.randn(size)
    return image[None, None], mask[None, None]


def mask_of(model: nn.Module, image: Tensor) -> Tensor:
    """The fourth of the UNet's outputs, as probabilities."""
    return model(image)[:, 3:4]


@torch.no_grad()
def dice(model: nn.Module, volumes: list[tuple[Tensor, Tensor]]) -> float:
    """Mean overlap of predicted and true masks, from 0 to 1."""
    found = [((mask_of(model, image) > 0.5).float(), mask) for image, mask in volumes]
    return sum(float(2 * (p * q).sum() / (p + q).sum().clamp(min=1)) for p, q in found) / len(found)


def report(name: str, model: nn.Module, held_out: list[tuple[Tensor, Tensor]]) -> None:
    training = dice(copy.deepcopy(model).train(), held_out)  # a copy, since it moves running statistics
    evaluation = dice(model.eval(), held_out)
    print(f"{name}: Dice {training:.3f} in training mode, {evaluation:.3f} in evaluation mode", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=3, default=[10, 32, 32])
    options = parser.parse_args()
    torch.manual_seed(0)
    held_out = [volume(options.size) for _ in range(options.held_out)]
    original = trained_unet()
    report("before", original, held_out)
    for name, model in (("BatchNorm", copy.deepcopy(original)), ("Batch Renorm", renormify(original))):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model.train()
        for _ in range(options.steps):
            image, mask = volume(options.size)
            loss = F.binary_cross_entropy(mask_of(model, image), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report(name, model, held_out)


if __name__ == "__main__":
    main()
