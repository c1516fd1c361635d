"""Train a model of transformers by its Trainer, with one callback for all that Batch Renorm needs.

The model is a small ResNet with random weights, made offline; for one ``from_pretrained`` leave the schedule
out, as its statistics are good from the start. Prints what the Trainer logged of the limits, the accuracy in
evaluation mode, and the ONNX file, which is kept only if onnxruntime agrees with the model.

$ pip install 'renormify[transformers,demo]'
$ python examples/08_transformers.py --steps 600 --output digits.onnx
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from renormify import PaperSchedule

try:
    from sklearn.datasets import load_digits
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    from renormify.callbacks.transformers import RenormCallback
except ImportError:
    command = "pip install 'renormify[transformers,demo]'"
    raise SystemExit(f"transformers, accelerate and scikit-learn are needed: {command}") from None


def digits() -> list[dict[str, Tensor]]:
    """1,797 handwritten digits of (1, 32, 32), shuffled, as transformers wants them."""
    bunch = load_digits()
    images = torch.tensor(bunch.images).float().unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, (32, 32), mode="bilinear")
    order = torch.randperm(len(images)).tolist()
    return [{"pixel_values": images[i], "labels": torch.tensor(bunch.target[i])} for i in order]


def network() -> nn.Module:
    """A small ResNet for ten classes, with random weights."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("digits.onnx"))
    options = parser.parse_args()
    torch.manual_seed(0)
    data = digits()
    model = network()
    example = torch.stack([item["pixel_values"] for item in data[:2]])
    callback = RenormCallback(
        schedule=PaperSchedule.scaled(options.steps),
        monitor_every=max(1, options.steps // 6),
        export_to=options.output,
        example=example,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data[:-400], callbacks=[callback])
        trainer.train()

    for entry in trainer.state.log_history:
        if "renorm/gap" in entry:
            names = ("r_max", "d_max", "clipped_r", "gap")
            figures = ", ".join(f"{name} {entry[f'renorm/{name}']:.2f}" for name in names)
            print(f"step {entry['step']}: {figures}")
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack([item["pixel_values"] for item in data[-400:]])).logits
    accuracy = (logits.argmax(1) == torch.stack([item["labels"] for item in data[-400:]])).float().mean()
    print(f"accuracy in evaluation mode: {accuracy:.1%}")
    print(f"{options.output}: {options.output.stat().st_size:,} bytes, confirmed by onnxruntime")


if __name__ == "__main__":
    main()
