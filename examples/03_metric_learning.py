"""Learn an embedding from batches of two classes with four images each, by a triplet loss.

Such batches are no independent samples: what BatchNorm makes of an image depends on the classes that it
happens to be with, and evaluation, where it is alone, is another network. The script trains with BatchNorm,
lets ``diagnose`` look, and trains with Batch Renorm. Of both it prints the recall at 1 in evaluation mode
(how many test images have a training image of their class as nearest neighbour), and how far the embedding of
an image in such a batch is from its embedding in evaluation.

$ pip install 'renormify[demo]'
$ python examples/03_metric_learning.py --steps 600
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renormify import PaperSchedule, RenormScheduler, diagnose, renormify

try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("scikit-learn is needed for its digits: pip install 'renormify[demo]'") from None


def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits as (N, 1, 8, 8), shuffled, and their labels."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    return torch.tensor(bunch.images).float().unsqueeze(1)[order] / 8 - 1, torch.tensor(bunch.target)[order]


def network() -> nn.Module:
    """Digits to 32 dimensions, with a BatchNorm behind the embedding too, as re-identification has it."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 32), nn.BatchNorm1d(32))


def batch_of(labels: Tensor, classes: int = 2, images: int = 4) -> Tensor:
    """The indices of a batch of some images each of some classes."""
    members = [(labels == each).nonzero().flatten() for each in torch.randperm(10)[:classes]]
    return torch.cat([rows[torch.randperm(len(rows))[:images]] for rows in members])


def triplet_loss(points: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """Each point's farthest friend ought to be nearer than its nearest stranger, by a margin."""
    distances, friends = torch.cdist(points, points), labels[:, None] == labels
    farthest = distances.masked_fill(~friends, 0).amax(1)
    nearest = distances.masked_fill(friends, torch.inf).amin(1)
    return (farthest - nearest + margin).relu().mean()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, *schedulers: RenormScheduler) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        batch = batch_of(labels)
        loss = triplet_loss(F.normalize(model(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@torch.no_grad()
def judge(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Prints recall at 1, and the mean distance on the unit sphere between training and evaluation."""
    points = F.normalize(model.eval()(images))
    nearest = torch.cdist(points[-400:], points[:-400]).argmin(1)
    recall = (labels[nearest] == labels[-400:]).float().mean()
    batches = [batch_of(labels) for _ in range(50)]
    model.train()
    apart = torch.stack([(F.normalize(model(images[b])) - points[b]).norm(dim=1).mean() for b in batches])
    print(f"{name}: recall at 1 {recall:.1%}, training and evaluation are {apart.mean():.2f} apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, labels = digits()
    batch_norm = network()
    batch_renorm = renormify(batch_norm)
    train(batch_norm, images[:-400], labels[:-400], steps)
    judge("BatchNorm", batch_norm, images, labels)
    for advice in diagnose(batch_norm, [images[batch_of(labels)] for _ in range(16)]).advice:
        print(f"diagnose says {advice.action}: {advice.evidence}")

    scheduler = RenormScheduler(batch_renorm, PaperSchedule.scaled(steps))
    train(batch_renorm, images[:-400], labels[:-400], steps, scheduler)
    judge("Batch Renorm", batch_renorm, images, labels)


if __name__ == "__main__":
    main()
