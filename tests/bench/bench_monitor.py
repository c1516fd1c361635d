"""What a Monitor costs beside the training step that it watches: ResNet-50 at 4x3x128x128.

Run this file with ``--rounds N``. The target, 2 % of a step, is held to with a sample in every step; by
default there is one in a hundred.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torchvision.models import resnet50

from renormify import Monitor, renormify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for name, convert in (("BatchNorm", lambda model: model), ("Batch Renorm", renormify)):
        model = convert(resnet50()).train()
        monitor = Monitor(model, every=1)
        optimizer, images = torch.optim.SGD(model.parameters(), lr=1e-4), torch.randn(4, 3, 128, 128)
        steps, samples = [], []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            optimizer.zero_grad()
            model(images).sum().backward()
            optimizer.step()
            middle = time.perf_counter()
            monitor.step()
            steps.append(middle - start)
            samples.append(time.perf_counter() - middle)
        step, sample = statistics.median(steps[1:]), statistics.median(samples[1:])
        print(
            f"{name}: a step {1e3 * step:.0f} ms, a sample {1e3 * sample:.1f} ms: {sample / step:.2%}, "
            "target 2 %"
        )


if __name__ == "__main__":
    main()
