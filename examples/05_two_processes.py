"""Train in two processes with two images each, whose batches SyncBatchRenorm joins to one of four.

Each process sees half of each batch. It prints the accuracy in evaluation mode, and that both processes ended
with the same weights and running statistics to the bit. On GPUs, only the backend's name would be another.

$ pip install 'renormify[demo]'
$ torchrun --standalone --nproc-per-node 2 examples/05_two_processes.py --steps 600
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group exists: its default arguments keep a group, and abort the exit
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from renormify import PaperSchedule, RenormScheduler, convert_sync, renormify

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
    """Three convolutions, each with BatchNorm behind it."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def same_everywhere(model: nn.Module) -> bool:
    """Whether this process has the state of the first, to the bit."""
    for value in model.state_dict().values():
        first = value.clone()
        dist.broadcast(first, src=0)
        if not torch.equal(first, value):
            return False
    return True


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Trains as usual, each process on its share of a batch with two images per process."""
    # Statistics need no broadcast: they stay the same by themselves.
    wrapped = DistributedDataParallel(model, forward_sync_buffers=False)
    rank, processes = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    scheduler = RenormScheduler(wrapped, PaperSchedule.scaled(steps))
    wrapped.train()
    for _ in range(steps):
        batch = torch.randint(len(images) - 400, (2 * processes,)).chunk(processes)[rank]
        loss = F.cross_entropy(wrapped(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model, and the same order of images, in all processes
    images, labels = digits()

    # 1. Convert before the model is wrapped. 2. Train it.
    model = convert_sync(renormify(network()))
    train(model, images, labels, steps)

    # 3. In evaluation nothing is exchanged, so that one process can do it.
    rank, processes = dist.get_rank(), dist.get_world_size()
    print(f"process {rank} of {processes}: same state as the first: {same_everywhere(model)}", flush=True)
    if rank == 0:
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[-400:]).argmax(1) == labels[-400:]).float().mean()
        print(f"accuracy in evaluation mode: {accuracy:.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
