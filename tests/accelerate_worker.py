"""What each process does in the test of Accelerate: a plain loop over its share of each batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed.nn  # before the group exists: its default arguments keep a group, and abort the exit
from accelerate import Accelerator
from torch import nn

from renormify import LinearSchedule, Monitor, RenormScheduler, convert_sync, freeze_stats, renormify

STEPS = 12


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = renormify(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    )
    freeze_stats(model, filter_fn=lambda module, name: name == "4")
    alone = train(copy.deepcopy(model), None)
    prepared = train(convert_sync(model), accelerator)
    for ours, theirs in zip(prepared.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        first = ours.clone().float()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, ours.float())
    assert model[1].r_max == LinearSchedule(STEPS).at(STEPS)[0]
    print(f"process {accelerator.process_index} of {accelerator.num_processes} agrees")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def train(model: nn.Module, accelerator: Accelerator | None) -> nn.Module:
    """Trains on this process's half of each batch, or without an accelerator on all of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = model.train()
    if accelerator is not None:
        prepared, optimizer = accelerator.prepare(model, optimizer)
    scheduler, monitor = RenormScheduler(prepared, LinearSchedule(STEPS)), Monitor(prepared, every=4)
    samples = []
    for step in range(STEPS):
        batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        if accelerator is not None:
            batch = batch.chunk(2)[accelerator.process_index]
        prepared.train()
        loss = prepared(batch).square().mean()
        optimizer.zero_grad()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        samples.append(bool(monitor.step()))
    assert sum(samples) == STEPS // 4
    return model


if __name__ == "__main__":
    main()
