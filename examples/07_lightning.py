"""Train within Lightning, with one callback that converts, schedules, logs, resumes and exports.

The run is stopped half-way and resumed from its checkpoint. Prints what was logged, the accuracy in
evaluation mode, and the ONNX file, which is kept only if onnxruntime agrees with the model.

$ pip install 'renormify[lightning,demo]'
$ python examples/07_lightning.py --epochs 4 --output digits.onnx
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from renormify import PaperSchedule

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from sklearn.datasets import load_digits

    from renormify.callbacks.lightning import RenormCallback
except ImportError:
    raise SystemExit(
        "Lightning and scikit-learn are needed: pip install 'renormify[lightning,demo]'"
    ) from None


def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits as (N, 1, 8, 8), shuffled, and their labels."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    return torch.tensor(bunch.images).float().unsqueeze(1)[order] / 8 - 1, torch.tensor(bunch.target)[order]


class Digits(pl.LightningModule):
    """A LightningModule as anyone would write it; of Batch Renorm it knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("digits.onnx"))
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:-400], labels[:-400]), batch_size=4, shuffle=True)
    schedule = PaperSchedule.scaled(options.epochs * len(loader))

    def train(module: pl.LightningModule, epochs: int, resume: Path | None, **export: Any) -> pl.Trainer:
        callbacks = [RenormCallback(schedule=schedule, monitor_every=50, **export)]
        where = {"accelerator": "cpu", "logger": CSVLogger(folder), "enable_checkpointing": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **where, **quiet)
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
        logged = trainer.logged_metrics
        limits = f"r_max {logged['renorm/r_max']:.2f}, d_max {logged['renorm/d_max']:.2f}"
        print(f"logged by step {trainer.global_step}: {limits}, r clipped {logged['renorm/clipped_r']:.1%}")
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        # 1. Half of the run, and a checkpoint.
        half = Path(folder, "half.ckpt")
        train(Digits(), options.epochs // 2, None).save_checkpoint(half)

        # 2. The rest, as another process would do it. The schedule goes on where it was.
        module = Digits()
        train(module, options.epochs, half, export_to=options.output, example=images[:2])

    module.eval()
    with torch.no_grad():
        accuracy = (module(images[-400:]).argmax(1) == labels[-400:]).float().mean()
    print(f"accuracy in evaluation mode: {accuracy:.1%}")
    print(f"{options.output}: {options.output.stat().st_size:,} bytes, confirmed by onnxruntime")


if __name__ == "__main__":
    main()
