"""Models of torchvision, timm and transformers whose forwards are not plain convert whole and train alike."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from norms import (
    C,
    assert_batch_norm_at_the_limit,
    assert_converts,
    assert_moves_by_batch_renorm,
    assert_reverts_to,
    assert_same_output,
    assert_same_state,
    lived_in,
    tensors,
)
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torchvision.models import detection, segmentation

from renormify import convert, renormify, revert
from renormify.errors import UnsupportedModelError
from renormify.layers import is_batch_renorm

# The inputs are small, to be quick.
pytestmark = pytest.mark.filterwarnings("ignore:.* values per channel:renormify.errors.RenormifyWarning")


def _norms(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def _timm(name: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (timm.create_model(name, num_classes=5, **options), torch.randn(2, 3, size, size))


def _torchvision(
    build: Callable[..., nn.Module], size: int, **options: Any
) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (build(weights=None, **options), torch.randn(2, 3, size, size))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "lraspp": _torchvision(segmentation.lraspp_mobilenet_v3_large, 32, weights_backbone=None, num_classes=3),
    "deeplab": _torchvision(
        segmentation.deeplabv3_mobilenet_v3_large, 32, weights_backbone=None, num_classes=3, aux_loss=True
    ),
    "googlenet": _torchvision(
        torchvision.models.googlenet, 64, num_classes=5, aux_logits=True, init_weights=False
    ),
    "densenet": lambda: (
        torchvision.models.DenseNet(4, (2, 2), 8, drop_rate=0.2, num_classes=5),
        torch.randn(2, 3, 32, 32),
    ),
    "efficientnet": _timm("efficientnet_b0", 64, drop_rate=0.2, drop_path_rate=0.2),
    "levit": lambda: (timm.create_model("levit_128s", num_classes=5, img_size=64), torch.randn(4, 3, 64, 64)),
    "resnet10t": _timm("resnet10t", 64),
    "regnet": _timm("regnetx_002", 64),
}


@pytest.mark.parametrize("name", MODELS)
def test_library_model_converts_whole(name: str) -> None:
    model, x = MODELS[name]()
    lived_in(model)
    conversion = assert_converts(model, x)
    assert conversion.report.converted == tuple(_norms(model))
    assert conversion.report.skipped == ()
    assert assert_moves_by_batch_renorm(conversion.model.train(), x) > 0
    assert type(conversion.model) is type(model)


AUXILIARY = {  # and what the model returns in training
    "googlenet": torchvision.models.GoogLeNetOutputs,
    "inception": torchvision.models.inception.InceptionOutputs,
    "deeplab": OrderedDict,
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_heads_follow_the_mode(name: str) -> None:
    if name == "inception":  # whose auxiliary head takes no smaller image
        model = torchvision.models.inception_v3(num_classes=5, init_weights=False)
        x = torch.randn(2, 3, 299, 299)
    else:
        model, x = MODELS[name]()
    conversion = convert(lived_in(model))
    assert conversion.report.converted == tuple(_norms(model))
    converted = conversion.model
    assert_reverts_to(model, converted)
    with torch.no_grad():
        evaluated, expected = converted.eval()(x[:1]), model.eval()(x[:1])
    assert type(evaluated) is type(expected)
    assert_same_output(evaluated, expected)
    assert_same_state(converted, model)  # evaluation moves nothing, of the auxiliary heads neither
    aux = {
        path
        for path, module in converted.named_modules()
        if "aux" in path.lower() and is_batch_renorm(module)
    }
    assert aux
    outputs: list[Any] = []
    converted.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert assert_moves_by_batch_renorm(converted.train(), x) == len(_norms(model))
    assert type(outputs[0]) is AUXILIARY[name]
    assert all(parameter.grad.isfinite().all() for parameter in converted.parameters())
    assert {int(converted.get_submodule(path).num_batches_tracked) for path in aux} == {12}


def _targets() -> list[dict[str, Tensor]]:
    box = torch.tensor([[4.0, 4.0, 30.0, 34.0], [10.0, 8.0, 50.0, 40.0]])
    return [{"boxes": box + i, "labels": torch.tensor([1, 2])} for i in range(2)]


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "fasterrcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ),
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
    "retinanet": lambda: detection.RetinaNet(
        detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5,
            returned_layers=[2, 3, 4],
        ), 3, min_size=64, max_size=64,
        anchor_generator=detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_converts_whole(name: str) -> None:
    model = lived_in(DETECTORS[name]())
    images, targets = [torch.rand(3, 64, 64), torch.rand(3, 60, 52)], _targets()
    conversion = convert(model)
    assert conversion.report.converted == tuple(_norms(model))
    converted = conversion.model
    with torch.no_grad():
        assert_same_output(converted.eval()(images), model.eval()(images))
    assert assert_moves_by_batch_renorm(converted.train(), images, targets) > 10
    assert_reverts_to(model.train(), renormify(model))
    assert_batch_norm_at_the_limit(model.train(), images, targets, steps=1)


def test_detector_with_a_frozen_backbone() -> None:
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((1.0,),) * 5)
    model = lived_in(
        detection.FasterRCNN(backbone, 3, min_size=64, max_size=64, rpn_anchor_generator=anchors)
    )
    assert all(site.reason.startswith("frozen") for site in _skipped(model))
    conversion = convert(model, include_frozen=True)
    assert len(conversion.report.converted) == 20
    images = [torch.rand(3, 64, 64), torch.rand(3, 60, 52)]
    with torch.no_grad():
        assert_same_output(conversion.model.eval()(images), model.eval()(images))
    assert assert_moves_by_batch_renorm(conversion.model.train(), images, _targets()) == 20
    assert_same_state(revert(conversion.model), conversion.model)
    assert_reverts_to(model, convert(model, include_frozen=True).model)


def _skipped(model: nn.Module) -> tuple[Any, ...]:
    with pytest.raises(Exception, match="20 skipped") as caught:
        convert(model)
    return caught.value.report.sites


def test_densenet_with_checkpoints_moves_once_and_has_the_same_gradients() -> None:
    from torchvision.models import DenseNet

    torch.manual_seed(3)
    plain = lived_in(DenseNet(4, (2, 2), 8, memory_efficient=False, num_classes=5)).double()
    saving = DenseNet(4, (2, 2), 8, memory_efficient=True, num_classes=5).double()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32).double()
    both = [renormify(model) for model in (plain, saving)]
    assert_reverts_to(saving, both[1])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(both[1]).eval()(x), copy.deepcopy(saving).eval()(x))
    for model in both:
        model(x).sin().sum().backward()
    for a, b in zip(both[0].parameters(), both[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for (key, a), b in zip(both[0].state_dict().items(), both[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert {int(b) for key, b in both[1].state_dict().items() if "tracked" in key} == {12}


def test_weight_standardisation_is_no_site_and_stays() -> None:
    for name in ("resnetv2_50x1_bit", "nf_regnet_b0", "nfnet_l0"):
        model = timm.create_model(name, num_classes=5)
        for report in _reports(model):
            assert report == ()
    with torch.device("meta"):  # whose padding asks for the size of the input, which no trace can tell
        for name in ("dm_nfnet_f0", "resnetv2_50x1_bit.goog_in21k", "vit_small_r26_s32_224"):
            for report in _reports(timm.create_model(name, num_classes=5)):
                assert report == ()
    standardised = nn.Sequential(
        timm.layers.StdConv2dSame(3, 3, 3), timm.layers.ScaledStdConv2dSame(3, 3, 3), nn.BatchNorm2d(3)
    )
    assert convert(standardised).report.to_dict()["skipped"] == []
    standardised = nn.Sequential(
        timm.layers.StdConv2d(3, C, 3), timm.layers.ScaledStdConv2d(C, C, 3), nn.BatchNorm2d(C)
    )
    conversion = assert_converts(lived_in(standardised), torch.randn(2, 3, 9, 9))
    assert conversion.report.converted == ("2",)
    assert conversion.report.skipped == ()
    assert type(conversion.model[0]) is timm.layers.StdConv2d


def _reports(model: nn.Module) -> list[tuple[Any, ...]]:
    from renormify.sites import find_sites

    return [find_sites(model.train()), find_sites(model.eval())]


def test_bit_resnet_with_batch_norm_keeps_its_standardised_weights() -> None:
    model = timm.models.resnetv2.ResNetV2(
        layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), stem_chs=8, num_classes=5,
        norm_layer=timm.layers.BatchNormAct2d, conv_layer=timm.layers.StdConv2d,
    )  # fmt: skip
    conversion = assert_converts(lived_in(model), torch.randn(2, 3, 64, 64))
    assert len(conversion.report.converted) == len(_norms(model)) > 10
    assert {site.kind for site in conversion.report.sites} == {"BatchNormAct2d"}


def test_levit_after_a_forward_in_evaluation() -> None:
    model = lived_in(timm.create_model("levit_128s", num_classes=5, img_size=32)).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)  # it keeps its attention biases, which are no leaves and cannot be copied
    with pytest.raises(UnsupportedModelError, match=r"Levit.* cannot be copied .*inplace=True"):
        convert(model)
    assert len(_norms(model)) > 10
    conversion = convert(model, inplace=True)
    assert conversion.model is model
    assert conversion.report.skipped == ()
    assert torch.equal(model(x), expected)
    assert assert_moves_by_batch_renorm(model.train(), x) > 10
    revert(model, inplace=True)
    assert not any(map(is_batch_renorm, model.modules()))


# ------------------------------------------------------------------------------------------ of timm's own


def test_features_and_heads_of_timm() -> None:
    model = lived_in(timm.create_model("efficientnet_b0", num_classes=5)).eval()
    converted, x = renormify(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(converted.forward_features(x), model.forward_features(x))
        assert_same_output(
            converted.forward_intermediates(x, intermediates_only=True),
            model.forward_intermediates(x, intermediates_only=True),
        )
        converted.reset_classifier(7)
        assert converted(x).shape == (2, 7)
        assert converted.forward_head(model.forward_features(x)).shape == (2, 7)
    assert converted.get_classifier().out_features == 7
    assert_moves_by_batch_renorm(converted.train(), x)


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet10t"])
def test_extraction_of_features(name: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = lived_in(timm.create_model(name, features_only=True)).eval()
    x = torch.randn(2, 3, 64, 64)
    converted = renormify(model)
    assert type(converted) is type(model)
    with torch.no_grad():
        assert_same_output(converted(x), model(x))
    assert_moves_by_batch_renorm(converted.train(), x)
    if name == "resnet10t":
        whole = renormify(lived_in(torchvision.models.resnet18(num_classes=5)).eval())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, on nodes that differ by mode
            extractor = create_feature_extractor(whole, ["layer1", "layer2.0.bn1"])
        assert set(extractor(x)) == {"layer1", "layer2.0.bn1"}
        assert_moves_by_batch_renorm(extractor.train(), x)


def test_drop_path_and_dropout_follow_the_mode() -> None:
    model = timm.create_model("efficientnet_b0", num_classes=5, drop_rate=0.5, drop_path_rate=0.5)
    converted, x = renormify(lived_in(model)), torch.randn(2, 3, 64, 64)
    frozen = copy.deepcopy(converted).train()
    for module in frozen.modules():
        if is_batch_renorm(module):
            module.eval()
    assert not torch.equal(frozen(x), frozen(x))  # by drop path and dropout alone
    assert torch.equal(converted.eval()(x), converted(x))


@pytest.mark.parametrize("name", ["efficientnet_b0", "levit_128s"])
def test_whole_model_passes_through_a_file_and_a_copy(name: str) -> None:
    options = {"img_size": 32} if name.startswith("levit") else {}
    converted = renormify(lived_in(timm.create_model(name, num_classes=5, **options))).train()
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    x = torch.randn(2, 3, 32, 32)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(converted)):
        assert_same_state(twin, converted)
        assert assert_moves_by_batch_renorm(twin, x) > 10
        copied = copy.deepcopy(converted)
        assert torch.equal(twin.load_state_dict(copied.state_dict()) and twin.eval()(x), copied.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_whole_model_compiles_and_exports(training: bool) -> None:
    torch._dynamo.reset()
    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r1_k3_s2_e2_c8_se0.25"]])
    model = timm.models.EfficientNet(blocks, num_classes=5, stem_size=8, num_features=16)
    converted = renormify(lived_in(model)).train(training)
    eager, exported, x = copy.deepcopy(converted), copy.deepcopy(converted), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    expected = eager(x)
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(exported, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    for a, b in zip(converted.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------- of transformers


def test_patchtst() -> None:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, num_hidden_layers=1,
        d_model=8, num_attention_heads=2, ffn_dim=8, prediction_length=4, norm_type="batchnorm",
    )  # fmt: skip
    model = lived_in(PatchTSTForPrediction(config))
    x = torch.randn(4, 16, 2)
    conversion = assert_converts(model, x)
    assert len(conversion.report.converted) == len(_norms(model)) > 0
    assert assert_moves_by_batch_renorm(conversion.model.train(), x) > 0


def test_rt_detr() -> None:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[8, 8, 8], encoder_hidden_dim=16, d_model=16,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        decoder_layers=1, num_queries=5, decoder_in_channels=[16, 16, 16], num_denoising=0, num_labels=3,
        freeze_backbone_batch_norms=True,
    )  # fmt: skip
    model = lived_in(RTDetrForObjectDetection(config)).eval()
    x = torch.rand(1, 3, 64, 64)
    conversion = convert(model)
    frozen = [site for site in conversion.report.sites if site.action == "skipped"]
    assert {site.kind for site in frozen} == {"RTDetrFrozenBatchNorm2d"}
    assert conversion.report.converted == tuple(_norms(model))
    thawed = convert(model, include_frozen=True)
    assert thawed.report.skipped == ()
    assert len(thawed.report.converted) == len(frozen) + len(conversion.report.converted)
    for converted in (conversion.model, thawed.model):
        with torch.no_grad():
            assert_same_output(converted.eval()(x), model(x))
        assert_same_state(revert(converted), model)
    assert_batch_norm_at_the_limit(model.train(), x, steps=1)
    assert assert_moves_by_batch_renorm(thawed.model.train(), x) == len(thawed.report.converted)
    assert all(t.isfinite().all() for t in tensors(thawed.model(x)))
