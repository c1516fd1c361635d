"""Train a network from scratch with four images per batch, by the paper's schedule, and keep an eye on it.

Prints what ``diagnose`` says of the untrained network, the monitor's figures while the limits rise, and the
accuracy with the running statistics of training and with those counted anew.

$ pip install 'renormify[demo]'
$ python examples/02_from_scratch.py --steps 2000
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renormify import BatchRenorm2d, Monitor, PaperSchedule, RenormScheduler, diagnose, recalibrate

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
    """Four convolutions, each with Batch Renorm behind it."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            BatchRenorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, labels = digits()
    train, test, model = images[:-400], images[-400:], network()

    # 1. What does diagnose say of a network whose statistics mean nothing as yet?
    for advice in diagnose(model, train.split(4)).advice:
        print(f"{advice.action}: {advice.evidence}")

    # 2. So train as BatchNorm first, and raise the limits as in the paper, at the length of this run.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = RenormScheduler(model, PaperSchedule.scaled(steps))
    monitor = Monitor(model, every=max(1, steps // 8))
    model.train()
    for step in range(1, steps + 1):
        batch = torch.randint(len(train), (4,))
        loss = F.cross_entropy(model(train[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if found := monitor.step():
            r_max, d_max, clipped, gap = (
                found[f"renorm/{key}"] for key in ("r_max", "d_max", "clipped_r", "gap")
            )
            print(
                f"step {step}: r_max {r_max:.2f}, d_max {d_max:.2f}, r clipped {clipped:.1%}, gap {gap:.2f}"
            )

    # 3. Evaluate; then once more with statistics counted anew over all training images.
    for what in ("as trained", "recalibrated"):
        model.eval()
        with torch.no_grad():
            accuracy = (model(test).argmax(1) == labels[-400:]).float().mean()
        print(f"accuracy in evaluation mode, statistics {what}: {accuracy:.1%}")
        recalibrate(model, train.split(100))


if __name__ == "__main__":
    main()
