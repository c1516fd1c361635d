"""The callbacks in the trainers they are for: conversion, schedule, figures, resuming bit for bit, export."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from renormify import LinearSchedule, RenormScheduler, renormify
from renormify.callbacks import lightning as with_lightning
from renormify.callbacks import transformers as with_transformers
from renormify.callbacks.road import Road
from renormify.errors import InputError, MissingExtraError, NothingToConvertError, OutputError, ProofError
from renormify.layers import is_batch_renorm

STEPS, STOP = 200, 97
SCHEDULE = LinearSchedule(STEPS, r_max=2.0, d_max=1.0, start=0.1, end=0.9)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)


class Net(nn.Module):
    """As transformers wants it: labels in, a loss out."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.body(x)
        return (
            {"logits": scores}
            if labels is None
            else {"loss": F.cross_entropy(scores, labels), "logits": scores}
        )


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def limits(model: nn.Module) -> list[tuple[float, float]]:
    return [(layer.r_max, layer.d_max) for layer in model.modules() if is_batch_renorm(layer)]


def plain_loop(model: nn.Module, steps: int = STEPS) -> nn.Module:
    model = renormify(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = RenormScheduler(model, SCHEDULE)
    for step in range(steps):
        x, labels = batch(step)
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()
        scheduler.step()
    return model


# --- Lightning -------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """One batch for each epoch, so that an epoch is a step and a run can be resumed between any two."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["logits"]

    def training_step(self, samples, batch_idx):
        return self.net(*samples)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([batch(self.trainer.current_epoch)], batch_size=None)


def lightning_run(module, folder, *callbacks, epochs=STEPS, **fit):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in callbacks),
        logger=pl.loggers.CSVLogger(folder),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of workers, of logging intervals
        trainer.fit(module, **fit)
    return trainer


def test_lightning_trains_as_a_plain_loop_and_resumes_bit_for_bit(tmp_path):
    whole = Module()
    lightning_run(whole, tmp_path, with_lightning.RenormCallback(schedule=SCHEDULE))
    assert same(whole.net, plain_loop(Net()))
    assert limits(whole) == [SCHEDULE.at(STEPS)]

    part = Module()
    trainer = lightning_run(part, tmp_path, with_lightning.RenormCallback(schedule=SCHEDULE), epochs=STOP)
    assert limits(part) == [SCHEDULE.at(STOP)]
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    state = torch.load(tmp_path / "part.ckpt", weights_only=True)["callbacks"]
    assert list(state.values()) == [{"step": STOP}]
    resumed = Module()
    callback = with_lightning.RenormCallback(schedule=SCHEDULE)
    lightning_run(resumed, tmp_path, callback, ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    assert same(resumed.net, whole.net)
    assert limits(resumed) == limits(whole)


@pytest.mark.parametrize("hook", ["configure_model", "setup"])
@pytest.mark.parametrize("half", [False, True])
def test_lightning_converts_what_is_made_late(tmp_path, hook, half):
    class Late(Module):
        def __init__(self):
            super().__init__()
            self.made = self.net
            self.net = None if not half else nn.Module()
            if half:  # one norm is there from the start
                self.net.body = nn.Sequential(*self.made.body[:2])
            vars(self)["made"] = self._modules.pop("made")

        def make(self, stage=None):
            self.net = self.made

    setattr(Late, hook, Late.make)
    module = Late()
    lightning_run(module, tmp_path, with_lightning.RenormCallback(schedule=SCHEDULE), epochs=STOP)
    assert same(module.net, plain_loop(Net(), STOP))
    assert limits(module) == [SCHEDULE.at(STOP)]

    trainer = lightning_run(Late(), tmp_path, with_lightning.RenormCallback(schedule=SCHEDULE), epochs=5)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed, callback = Late(), with_lightning.RenormCallback(schedule=SCHEDULE)
    path = tmp_path / "part.ckpt"
    lightning_run(resumed, tmp_path, callback, epochs=STOP, ckpt_path=path, weights_only=True)
    assert same(resumed.net, module.net)


def test_lightning_without_batch_norm_is_told(tmp_path):
    with pytest.raises(NothingToConvertError, match="found no BatchNorm to convert in Module"):
        lightning_run(Module(nn.Linear(2, 2)), tmp_path, with_lightning.RenormCallback(), epochs=1)


class Stateful:
    """A loader that says where it is, as torchdata's StatefulDataLoader: Lightning goes on from there."""

    def __init__(self) -> None:
        self.step = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.step < STEPS:
            self.step += 1
            yield batch(self.step - 1)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class OneEpoch(Module):
    def train_dataloader(self):
        return Stateful()


def test_lightning_resumes_in_the_midst_of_an_epoch(tmp_path):
    def run(module, *callbacks, **fit):
        callback = with_lightning.RenormCallback(schedule=SCHEDULE)
        lightning_run(module, tmp_path, callback, *callbacks, epochs=1, **fit)
        assert limits(module) == [SCHEDULE.at(STEPS)]
        return module

    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=STOP, save_top_k=-1
    )
    whole = run(OneEpoch(), checkpoint)
    assert same(whole.net, plain_loop(Net()))
    path = tmp_path / f"step={STOP}.ckpt"
    assert same(run(OneEpoch(), ckpt_path=path, weights_only=True), whole)


def test_lightning_logs_and_exports(tmp_path):
    callback = with_lightning.RenormCallback(
        monitor_every=2, export_to=tmp_path / "net.onnx", example=torch.randn(2, 3, 8, 8)
    )
    trainer = lightning_run(Module(), tmp_path, callback, epochs=4)
    assert trainer.logged_metrics["renorm/r_max"] == 3.0
    assert (tmp_path / "net.onnx").is_file()


def test_lightning_follows_the_optimizer_when_gradients_accumulate(tmp_path):
    class Accumulating(Module):
        def train_dataloader(self):
            return torch.utils.data.DataLoader([batch(step) for step in range(8)], batch_size=None)

    module = Accumulating()
    callback = with_lightning.RenormCallback(schedule=lambda step: (1.0 + step, 0.0))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=4,
        callbacks=[callback],
        logger=False,
        **quiet,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(module)
    assert limits(module) == [(3.0, 0.0)]


# --- transformers ----------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, labels = batch(index)
        return {"x": x, "labels": labels}


class Stop(TrainerCallback):
    """Interrupts a run, with its whole schedule before it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.at


def transformers_run(model, folder, *callbacks, resume=None, steps=STEPS):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )

    trainer = Trainer(
        model,
        arguments,
        train_dataset=Data(),
        data_collator=lambda items: items[0],
        callbacks=list(callbacks),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_transformers_resumes_bit_for_bit(tmp_path):
    whole = Net()
    transformers_run(whole, tmp_path / "whole", with_transformers.RenormCallback(schedule=SCHEDULE))
    assert limits(whole) == [SCHEDULE.at(STEPS)]
    part = Net()
    transformers_run(part, tmp_path / "part", with_transformers.RenormCallback(schedule=SCHEDULE), Stop(STOP))
    assert limits(part) == [SCHEDULE.at(STOP)]
    assert not same(part, whole)
    resumed = Net()
    checkpoint = str(tmp_path / "part" / f"checkpoint-{STOP}")
    callback = with_transformers.RenormCallback(schedule=SCHEDULE)
    transformers_run(resumed, tmp_path / "rest", callback, resume=checkpoint)
    assert same(resumed, whole)
    assert limits(resumed) == limits(whole)


def test_transformers_logs_and_exports(tmp_path):
    logged: list[dict[str, float]] = []
    callback = with_transformers.RenormCallback(
        monitor_every=3, log=logged.append, export_to=tmp_path / "net.onnx", example=torch.randn(2, 3, 8, 8)
    )
    trainer = transformers_run(Net(), tmp_path, callback, steps=7)
    assert len(logged) == 2
    assert [entry["step"] for entry in trainer.state.log_history if "renorm/gap" in entry] == [3, 6]
    assert (tmp_path / "net.onnx").is_file()


# --- Accelerate ------------------------------------------------------------------------------------------


def test_two_processes_of_torchrun_with_accelerate_train_as_one():
    """Schedule, monitor and frozen layers in a plain loop, with gloo and SyncBatchRenorm."""
    worker = Path(__file__).with_name("accelerate_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker]
    root = worker.parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(f"process {rank} of 2 agrees" in done.stdout for rank in range(2))


# --- both ------------------------------------------------------------------------------------------------


def test_a_model_converted_already_goes_on():
    road, model = Road(), renormify(Net(), r_max=7.0)
    road.begin(model, 3)
    assert limits(model) == [(3.0, 5.0)]
    with pytest.raises(NothingToConvertError, match="no BatchNorm to convert in Linear"):
        Road().begin(nn.Linear(2, 2))


def test_an_export_that_cannot_be_is_known_before_the_training(tmp_path):
    with pytest.raises(InputError, match="export_to needs an example"):
        Road(export_to=tmp_path / "net.onnx")
    with pytest.raises(OutputError, match="does not exist"):
        Road(export_to=tmp_path / "no" / "net.onnx", example=torch.zeros(1))
    (tmp_path / "net.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        Road(export_to=tmp_path / "net.onnx", example=torch.zeros(1))


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    import renormify.onnx as onnx

    def verify_another(model, path, args):
        return honest(Net().eval(), path, args)

    honest = onnx.verify_onnx
    monkeypatch.setattr(onnx, "verify_onnx", verify_another)
    road, model = Road(export_to=tmp_path / "net.onnx", example=torch.randn(2, 3, 8, 8)), Net()
    road.begin(model)
    nn.init.normal_(model.body[4].weight)
    with pytest.raises(ProofError, match=r"net.onnx was not written: .* at batch size"):
        road.end(model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_trainer_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch" if name == "lightning" else name, None)
    monkeypatch.delitem(sys.modules, f"renormify.callbacks.{name}")
    with pytest.raises(MissingExtraError, match=rf"pip install 'renormify\[{name}\]'"):
        __import__(f"renormify.callbacks.{name}")
