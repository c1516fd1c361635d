"""One conformance suite for every Batch Renorm layer: against the oracle, against BatchNorm, and in use."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from renormify import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm, renormify
from renormify.errors import RenormifyWarning
from renormify.functional import batch_renorm

C = 6
# Channels so different that, from mean 0 and variance 1, some are clipped for long and some never.
SCALE = np.array([0.02, 0.5, 1.0, 1.5, 40.0, 1.0])
OFFSET = np.array([0.0, 0.2, 0.0, -0.3, 0.0, 30.0])


@dataclass(frozen=True)
class Kind:
    """A layer class, the BatchNorm it stands for, and an input it takes."""

    layer: Callable[..., Any]
    batch_norm: Callable[..., Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer.__name__}-{len(self.shape)}D"


KINDS = [
    Kind(BatchRenorm1d, nn.BatchNorm1d, (7, C)),
    Kind(BatchRenorm1d, nn.BatchNorm1d, (4, C, 5)),
    Kind(BatchRenorm2d, nn.BatchNorm2d, (3, C, 4, 3)),
    Kind(BatchRenorm3d, nn.BatchNorm3d, (2, C, 2, 3, 4)),
    Kind(SyncBatchRenorm, nn.BatchNorm2d, (3, C, 4, 3)),  # one process: its own batch
]
AFFINE = {"affine": {}, "no bias": {"bias": False}, "no affine": {"affine": False}}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_affine = pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _strided(x: Tensor) -> Tensor:
    """The same values with gaps between them, the axes stored backwards."""
    backwards = x.permute(*reversed(range(x.dim()))).contiguous()
    wide = torch.full((*backwards.shape, 2), torch.nan, dtype=x.dtype)
    wide[..., 0] = backwards
    return wide[..., 0].permute(*reversed(range(x.dim())))


def _repeated(x: Tensor) -> Tensor:
    """Zero stride along the last axis; where that is the channels, all get values both wide and far off."""
    one = x.narrow(-1, 0, 1) if x.dim() > 2 else x[:, 4:5] + 3 * x[:, 5:6]
    return one.expand_as(x)


LAYOUTS = [_contiguous, _channels_last, _strided, _repeated]


def _close(actual: Tensor | None, expected: Any, tolerance: float = 1e-12) -> None:
    assert actual is not None
    torch.testing.assert_close(
        actual.detach(), torch.as_tensor(expected).detach(), rtol=tolerance, atol=tolerance
    )


def _per_channel(values: np.ndarray[Any, Any], x: Tensor) -> Tensor:
    return torch.tensor(values).view(-1, *(1,) * (x.dim() - 2)).to(x.dtype)


def _batch(kind: Kind, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(kind.shape, dtype=dtype)
    return x * _per_channel(SCALE, x) + _per_channel(OFFSET, x)


def _randomised(module: Any) -> Any:
    """Parameters and statistics that are not the defaults, which hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) + 1)
        module.running_mean.copy_(torch.randn(C))
        module.running_var.copy_(torch.rand(C) + 0.3)
    return module


def _stats(module: Any) -> tuple[Tensor, Tensor]:
    return module.running_mean.clone(), module.running_var.clone()


def _assert_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes()


# ---------------------------------------------------------------------------------------------- the paper


@every_kind
@every_affine
@pytest.mark.parametrize("stat", ["sigma", "var"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))
def test_fifty_steps_agree_with_the_paper(
    kind: Kind, affine: dict[str, Any], stat: str, layout: Callable[[Tensor], Tensor], kernels: str
) -> None:
    alpha = 0.03
    layer = kind.layer(C, momentum=alpha, stat=stat, dtype=torch.float64, **affine)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(C) + 1)
    gamma = None if layer.weight is None else layer.weight.detach().numpy()
    beta = None if layer.bias is None else layer.bias.detach().numpy()
    oracle = Oracle(np.zeros(C), np.sqrt(np.ones(C) + 1e-5), alpha, stat=stat)
    clipped_r, clipped_d = [], []
    for index in range(50):
        x = layout(_batch(kind)).requires_grad_()
        dy = torch.randn(kind.shape, dtype=torch.float64)
        if index % 2:  # a gradient that comes from a sum over an axis has stride zero there
            dy = _repeated(dy)
        leaves = [x, *layer.parameters()]
        y = layer(x)
        gradients = torch.autograd.grad(y, leaves, dy)
        step = oracle.train(x.detach().numpy(), dy.numpy(), gamma, beta)
        _close(y, step.y)
        for gradient, expected in zip(gradients, (step.dx, step.dgamma, step.dbeta), strict=False):
            _close(gradient, expected)
        _close(layer.running_mean, oracle.mu)
        _close((layer.running_var + layer.eps).sqrt(), oracle.sigma)
        clipped_r.append(step.clipped_r)
        clipped_d.append(step.clipped_d)
    assert int(layer.num_batches_tracked) == 50
    for clipped in (np.array(clipped_r), np.array(clipped_d)):
        assert clipped.any(), "no channel was clipped: the test would not see a missing limit"
        assert not clipped.all(0).all(), "every channel was clipped"
    x = _batch(kind)
    _close(layer.eval()(x), oracle.infer(x.numpy(), gamma, beta))


@every_kind
def test_gradient_that_is_one_number_expanded(kind: Kind, kernels: str) -> None:
    layer = _randomised(kind.layer(C, dtype=torch.float64))
    oracle = Oracle(
        layer.running_mean.numpy().copy(), np.sqrt(layer.running_var.numpy() + 1e-5), layer.momentum
    )
    x = _batch(kind).requires_grad_()
    y = layer(x)
    y.sum().backward()
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    step = oracle.train(x.detach().numpy(), np.ones(kind.shape), gamma, beta)
    _close(x.grad, step.dx)
    _close(layer.weight.grad, step.dgamma)
    _close(layer.bias.grad, step.dbeta)


@every_kind
def test_mask_on_the_layer_agrees_with_the_paper(kind: Kind) -> None:
    layer = _randomised(kind.layer(C, momentum=0.1, dtype=torch.float64))
    oracle = Oracle(layer.running_mean.numpy().copy(), np.sqrt(layer.running_var.numpy() + 1e-5), 0.1)
    x, dy = _batch(kind).requires_grad_(), torch.randn(kind.shape, dtype=torch.float64)
    mask = torch.rand(kind.shape[0], *kind.shape[2:]) < 0.7
    y = layer(x, mask)
    y.backward(dy)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    step = oracle.train(x.detach().numpy(), dy.numpy(), gamma, beta, mask.numpy())
    for actual, expected in (
        (y, step.y), (x.grad, step.dx), (layer.weight.grad, step.dgamma), (layer.bias.grad, step.dbeta),
        (layer.running_mean, oracle.mu), ((layer.running_var + 1e-5).sqrt(), oracle.sigma),
    ):  # fmt: skip
        _close(actual, expected)
    assert torch.equal(layer.eval()(x, mask=mask), layer(x) * mask.unsqueeze(1))


# ------------------------------------------------------------------------------------------ and BatchNorm


@every_kind
@every_affine
def test_with_r_one_and_d_zero_it_is_batch_norm(kind: Kind, affine: dict[str, Any], kernels: str) -> None:
    layer = _randomised(kind.layer(C, r_max=1.0, d_max=0.0, dtype=torch.float64, **affine))
    reference = kind.batch_norm(C, dtype=torch.float64, **affine)
    reference.load_state_dict(layer.state_dict())
    x, dy = _batch(kind), torch.randn(kind.shape, dtype=torch.float64)
    results = []
    for module in (layer, reference):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
    for mine, theirs in zip(*results, strict=True):
        _close(mine, theirs)


@every_kind
def test_unclipped_training_output_is_evaluation_output(kind: Kind, kernels: str) -> None:
    layer = _randomised(kind.layer(C, r_max=1e9, d_max=1e9, dtype=torch.float64))
    x = torch.randn(kind.shape, dtype=torch.float64)
    expected = copy.deepcopy(layer).eval()(x)
    _close(layer(x), expected, 4e-15)


@every_kind
@every_affine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_evaluation_is_batch_norm_bit_for_bit(
    kind: Kind, affine: dict[str, Any], dtype: torch.dtype, kernels: str
) -> None:
    reference = _randomised(kind.batch_norm(C, eps=1e-3, dtype=dtype, **affine)).eval()
    layer = kind.layer(C, eps=1e-3, dtype=dtype, **affine).eval()
    layer.load_state_dict(reference.state_dict(), assign=True)
    for layout in LAYOUTS:
        x = layout(_batch(kind, dtype))
        assert torch.equal(layer(x), reference(x))
        assert layer(x).stride() == reference(x).stride()


@every_kind
@every_affine
def test_output_has_the_memory_format_of_batch_norms(
    kind: Kind, affine: dict[str, Any], kernels: str
) -> None:
    layer, reference = kind.layer(C, **affine), kind.batch_norm(C, **affine)
    for layout in (_contiguous, _channels_last):
        x = layout(_batch(kind, torch.float32))
        assert layer(x).stride() == reference(x).stride()


@every_kind
@every_affine
def test_state_dict_loads_strictly_in_both_directions(kind: Kind, affine: dict[str, Any]) -> None:
    layer, reference = kind.layer(C, **affine), kind.batch_norm(C, **affine)
    assert list(layer.state_dict()) == list(reference.state_dict())
    assert dict(layer.named_parameters()).keys() == dict(reference.named_parameters()).keys()
    _randomised(layer)
    layer.num_batches_tracked.fill_(12)
    reference.load_state_dict(layer.state_dict(), strict=True)
    other = kind.layer(C, **affine)
    other.load_state_dict(reference.state_dict(), strict=True)
    for key, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
        assert torch.equal(reference.state_dict()[key], value)


@every_kind
def test_checkpoint_from_before_num_batches_tracked_loads(kind: Kind) -> None:
    state = dict(_randomised(kind.batch_norm(C)).state_dict())
    del state["num_batches_tracked"]
    layer = kind.layer(C)
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer.running_var, state["running_var"])
    assert int(layer.num_batches_tracked) == 0


@every_kind
def test_defaults_are_the_papers(kind: Kind) -> None:
    layer = kind.layer(C)
    assert (layer.eps, layer.momentum, layer.affine) == (1e-5, 0.01, True)
    assert (layer.r_max, layer.d_max, layer.stat) == (3.0, 5.0, "sigma")
    assert "r_max=3.0, d_max=5.0, stat='sigma'" in repr(layer)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)


# ------------------------------------------------------------------------------------------- statistics


@every_kind
@pytest.mark.parametrize("stat", ["sigma", "var"])
def test_momentum_none_is_the_cumulative_average(kind: Kind, stat: str, kernels: str) -> None:
    layer = kind.layer(C, momentum=None, stat=stat, dtype=torch.float64)
    means, spreads = [], []
    for _ in range(6):
        x = _batch(kind)
        flat = x.movedim(1, -1).reshape(-1, C)
        means.append(flat.mean(0))
        variance = flat.var(0, correction=1 if stat == "var" else 0)
        spreads.append(variance if stat == "var" else (variance + layer.eps).sqrt())
        layer(x)
        _close(layer.running_mean, torch.stack(means).mean(0))
        spread = layer.running_var if stat == "var" else (layer.running_var + layer.eps).sqrt()
        _close(spread, torch.stack(spreads).mean(0))


def test_cumulative_average_leaves_rejected_batches_out() -> None:
    layer = BatchRenorm1d(C, momentum=None, dtype=torch.float64)
    good = [_batch(KINDS[0]) for _ in range(3)]
    bad = torch.full_like(good[0], torch.nan)
    for x in (bad, good[0], bad, good[1], good[2]):
        layer(x)
    _close(layer.running_mean, torch.stack([x.mean(0) for x in good]).mean(0))


def test_cumulative_average_does_not_count_an_empty_batch() -> None:
    layer = BatchRenorm1d(C, momentum=None, dtype=torch.float64)
    x = torch.randn(8, C, dtype=torch.float64) * 5 + 3
    layer(x[:0])
    layer(x)
    _close(layer.running_mean, x.mean(0))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_zero_leaves_the_statistics_bits(kind: Kind, dtype: torch.dtype, kernels: str) -> None:
    layer = _randomised(kind.layer(C, momentum=0.0, dtype=dtype))
    layer.running_var[:3] = torch.tensor([0.0, 1e-42, 2.7e8])
    before = _stats(layer)
    for _ in range(3):
        layer(_batch(kind, dtype))
    _assert_bits(_stats(layer), before)


@every_kind
def test_running_var_far_below_eps(kind: Kind, kernels: str) -> None:
    layer = kind.layer(C, momentum=0.01, dtype=torch.float64)
    tiny = torch.tensor([0.0, 1e-300, 1e-20, 1e-12, 1e-9, 1e-7], dtype=torch.float64)
    layer.running_var.copy_(tiny)
    oracle = Oracle(np.zeros(C), np.sqrt(tiny.numpy() + 1e-5), 0.01)
    for _ in range(50):
        x, dy = torch.randn(kind.shape, dtype=torch.float64) * 1e-4, torch.zeros(kind.shape)
        y = layer(x)
        _close(y, oracle.train(x.numpy(), dy.numpy()).y)
        assert (layer.running_var >= 0).all()
        _close((layer.running_var + layer.eps).sqrt(), oracle.sigma)


def test_float32_running_var_of_zero_never_turns_negative_or_nan() -> None:
    layer = BatchRenorm1d(C, momentum=0.01)
    layer.running_var.zero_()
    for _ in range(50):
        layer(torch.zeros(8, C))
    assert torch.equal(layer.running_var, torch.zeros(C))
    layer.running_var.fill_(1e-30)
    layer(torch.zeros(8, C))
    assert (layer.running_var >= 0).all()


@every_kind
@pytest.mark.parametrize("stat", ["sigma", "var"])
def test_one_value_per_channel(kind: Kind, stat: str, kernels: str) -> None:
    layer = _randomised(kind.layer(C, momentum=0.5, stat=stat, dtype=torch.float64))
    mean, var = _stats(layer)
    x = torch.randn(1, C, *(1,) * (len(kind.shape) - 2), dtype=torch.float64, requires_grad=True)
    with pytest.warns(RenormifyWarning, match=r"trains on 1 value per channel: its output does not depend"):
        y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert (x.grad == 0).all()
    _assert_bits((layer.running_var.clone(),), (var,))
    _close(layer.running_mean, mean + 0.5 * (x.view(C) - mean))
    layer(x)  # warnings are errors here: the second time there is none
    layer.eval()(x)


@every_kind
def test_two_values_per_channel(kind: Kind, kernels: str) -> None:
    layer = _randomised(kind.layer(C, dtype=torch.float64))
    oracle = Oracle(layer.running_mean.numpy().copy(), np.sqrt(layer.running_var.numpy() + 1e-5), 0.01)
    shape = (2, C, *(1,) * (len(kind.shape) - 2))
    x, dy = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape)
    with pytest.warns(RenormifyWarning, match=r"trains on 2 values per channel: the gradient all but"):
        y = layer(x)
    y.backward(dy.double())
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    step = oracle.train(x.detach().numpy(), dy.double().numpy(), gamma, beta)
    _close(y, step.y)
    _close(x.grad, step.dx)
    _close((layer.running_var + 1e-5).sqrt(), oracle.sigma)


def test_three_values_per_channel_warn_of_nothing() -> None:
    BatchRenorm1d(C)(torch.randn(3, C))


@every_kind
@every_affine
@pytest.mark.parametrize("empty_axis", [0, -1])
def test_empty_batch(kind: Kind, affine: dict[str, Any], empty_axis: int, kernels: str) -> None:
    if empty_axis == -1 and len(kind.shape) == 2:
        empty_axis = 0
    layer = _randomised(kind.layer(C, **affine))
    before = _stats(layer)
    shape = list(kind.shape)
    shape[empty_axis] = 0
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros(C))
    _assert_bits(_stats(layer), before)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_batch_that_is_not_finite_leaves_the_statistics(kind: Kind, value: float, kernels: str) -> None:
    layer = _randomised(kind.layer(C, momentum=0.5))
    before = _stats(layer)
    x = torch.randn(kind.shape)
    x.view(-1)[0] = value
    layer(x)
    layer(x)
    _assert_bits(_stats(layer), before)
    assert int(layer.rejected_batches) == 2
    assert layer.rejected_batches.dtype == torch.int64
    assert not [key for key in layer.state_dict() if "reject" in key]
    layer(torch.randn(kind.shape))
    assert int(layer.rejected_batches) == 2
    assert not torch.equal(layer.running_mean, before[0])
    with pytest.warns(RenormifyWarning, match="saw inf or NaN in 2 batches"):
        layer.eval()
    layer.train()
    layer.eval()  # once


def test_rejected_batches_are_reported_from_the_whole_model_and_not_before_eval() -> None:
    model = nn.Sequential(nn.Flatten(), BatchRenorm1d(C))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.full((4, C), torch.nan))
        model.train()
    with pytest.warns(RenormifyWarning, match="BatchRenorm1d saw inf or NaN in 1 batch"):
        model.eval()


# ------------------------------------------------------------------------------------------------ limits


@every_kind
def test_limits_are_floats_that_may_be_set_at_any_time(kind: Kind, kernels: str) -> None:
    layer = kind.layer(C, r_max=2, d_max=4, dtype=torch.float64)
    assert (layer.r_max, layer.d_max) == (2.0, 4.0)
    assert isinstance(layer.r_max, float)
    x = torch.randn(kind.shape, dtype=torch.float64) * 100 + 1000
    for r_max, d_max in ((1.0, 0.0), (1.25, 0.5), (3, 5)):
        layer.r_max, layer.d_max = r_max, d_max
        assert isinstance(layer.r_max, float)
        twin = kind.layer(C, r_max=r_max, d_max=d_max, dtype=torch.float64)
        assert torch.equal(copy.deepcopy(layer)(x), twin(x))
    assert not [key for key in layer.state_dict() if "max" in key]


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r_max": 0.9}, r"r_max must be at least 1 \(got 0.9\)"),
        ({"r_max": float("nan")}, "r_max must be at least 1"),
        ({"d_max": -1.0}, r"d_max must be at least 0 \(got -1.0\)"),
        ({"d_max": float("nan")}, "d_max must be at least 0"),
    ],
)
def test_limits_out_of_range_are_refused(kind: Kind, change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.layer(C, **change)
    layer = kind.layer(C)
    for name, value in change.items():
        with pytest.raises(ValueError, match=message):
            setattr(layer, name, value)
    assert (layer.r_max, layer.d_max) == (3.0, 5.0)


@every_kind
def test_unknown_stat_is_refused(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"stat must be one of \('sigma', 'var'\) \(got 'std'\)"):
        kind.layer(C, stat="std")


@pytest.mark.parametrize(
    ("layer", "expected", "refused"),
    [
        (BatchRenorm1d, "2D or 3D", (1, 4, 5)),
        (BatchRenorm2d, "4D", (1, 2, 3, 5)),
        (BatchRenorm3d, "5D", (2, 3, 4, 6)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_other_dimensions_are_refused(
    layer: Callable[..., Any], expected: str, refused: tuple[int, ...], training: bool
) -> None:
    module = layer(C).train(training)
    for dims in refused:
        with pytest.raises(ValueError, match=rf"expected {expected} input \(got {dims}D input\)"):
            module(torch.randn((C,) * dims if dims > 1 else (C,)))
    assert int(module.num_batches_tracked) == 0


@every_kind
def test_another_number_of_channels_is_refused(kind: Kind) -> None:
    x = torch.randn(kind.shape[0], C + 1, *kind.shape[2:])
    with pytest.raises(RuntimeError, match=f"running_mean should contain {C + 1} elements not {C}"):
        kind.layer(C)(x)


# ------------------------------------------------------------------------------------- dtypes and devices


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_statistics_in_float32(kind: Kind, dtype: torch.dtype, kernels: str) -> None:
    layer = _randomised(kind.layer(C, momentum=0.01)).to(dtype)
    wide = _stats(layer)
    assert [layer.running_mean.dtype, layer.running_var.dtype] == [torch.float32] * 2
    assert [layer.weight.dtype, layer.bias.dtype] == [dtype] * 2
    x = torch.randn(kind.shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    _, batch_mean = torch.var_mean(x.detach().float(), [0, *range(2, x.dim())])
    torch.testing.assert_close(layer.running_mean, wide[0] + 0.01 * (batch_mean - wide[0]))
    assert layer.eval()(x).dtype == dtype


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_batch_norms_dtype(
    kind: Kind, dtype: torch.dtype, training: bool, kernels: str
) -> None:
    layer, reference = kind.layer(C).train(training), kind.batch_norm(C).train(training)
    x = torch.randn(kind.shape).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == reference(x).dtype
    y.float().sum().backward()
    assert layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32


@every_kind
def test_casts_keep_what_is_not_in_the_state_dict(kind: Kind) -> None:
    layer = kind.layer(C, r_max=2.5, d_max=1.7)
    layer(torch.full(kind.shape, torch.nan))
    for cast in (
        lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.float(),
        lambda m: m.to("cpu"), lambda m: m.requires_grad_(False), copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ):  # fmt: skip
        layer = cast(layer)
        assert (layer.r_max, layer.d_max) == (2.5, 1.7)
        assert layer._r_max.dtype == layer._d_max.dtype == torch.float32
        torch.testing.assert_close(layer._r_max, torch.tensor(2.5))
        torch.testing.assert_close(layer._d_max, torch.tensor(1.7))
        assert layer.rejected_batches.dtype == torch.int64
        assert int(layer.rejected_batches) == 1
        assert layer.num_batches_tracked.dtype == torch.int64
    layer.double()
    assert layer.running_mean.dtype == torch.float64


@every_kind
def test_meta_device_then_to_empty(kind: Kind) -> None:
    source = _randomised(kind.layer(C, r_max=2.5, d_max=1.5))
    layer = kind.layer(C, r_max=2.5, d_max=1.5, device="meta")
    assert layer.running_mean.is_meta
    assert (layer.r_max, layer.d_max) == (2.5, 1.5)
    layer.r_max = 2.0
    layer.eval().train()
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert (layer.r_max, float(layer._r_max), layer.d_max, float(layer._d_max)) == (2.0, 2.0, 1.5, 1.5)
    assert int(layer.rejected_batches) == 0
    source.r_max = 2.0
    x = torch.randn(kind.shape)
    assert torch.equal(layer(x), source(x))
    _assert_bits(_stats(layer), _stats(source))


@every_kind
def test_copies_train_alike_and_apart(kind: Kind) -> None:
    layer = _randomised(kind.layer(C, r_max=1.5))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    before = _stats(layer)
    x = torch.randn(kind.shape)
    outputs = [twin(x) for twin in twins]
    _assert_bits(_stats(layer), before)
    expected = layer(x)
    for twin, output in zip(twins, outputs, strict=True):
        assert torch.equal(output, expected)
        _assert_bits(_stats(twin), _stats(layer))


# ------------------------------------------------------------------------------------ torch's transforms


class Net(nn.Module):
    """A layer between two others, so that its input needs a gradient too."""

    def __init__(self, kind: Kind, **options: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.norm = _randomised(kind.layer(C, dtype=torch.float64, **options))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x * self.scale)) + 1


@every_kind
def test_layer_passes_gradcheck_with_r_and_d_held(kind: Kind, kernels: str) -> None:
    layer = _randomised(kind.layer(C, r_max=1.0, d_max=0.0, dtype=torch.float64))
    state = copy.deepcopy(layer.state_dict())

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer.load_state_dict(state)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))  # type: ignore[no-any-return]

    shape = (3, C, *(1,) * (len(kind.shape) - 3), *(2,) * (len(kind.shape) > 2))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@every_kind
def test_functorch_gradients_with_buffers_passed_in(kind: Kind) -> None:
    net = Net(kind)
    x = _batch(kind)
    state = dict(net.named_parameters()), {k: v.clone() for k, v in net.named_buffers()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        output = torch.func.functional_call(net, (parameters, buffers), (x,))
        return output.square().sum(), buffers

    detached = {k: v.detach() for k, v in state[0].items()}
    gradients, moved = torch.func.grad(loss, has_aux=True)(detached, state[1])
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        _close(gradients[name], parameter.grad)
    for name, buffer in net.named_buffers():
        _close(moved[name], buffer)


# Limits that float32 holds exactly, and their inverses too.
MOVING = [(1.0, 0.0), (2.0, 0.5), (1.0, 0.25), (4.0, 1.0), (2.0, 5.0)]


@every_kind
def test_compiles_whole_and_limits_move_without_a_recompile(kind: Kind) -> None:
    torch._dynamo.reset()
    net = Net(kind, momentum=0.1)
    eager = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for r_max, d_max in MOVING:
        x = _batch(kind)
        results = []
        for forward, model in ((compiled, net), (eager, eager)):
            model.norm.r_max, model.norm.d_max = r_max, d_max
            leaf = x.clone().requires_grad_()
            output = forward(leaf)
            output.square().sum().backward()
            results.append([output, leaf.grad, model.norm.weight.grad, *_stats(model.norm)])
            model.zero_grad()
        for actual, expected in zip(*results, strict=True):
            _close(actual, expected, 1e-11)
    compiled(torch.full_like(x, torch.nan, requires_grad=True))
    assert int(net.norm.rejected_batches) == 1
    assert counter.frame_count == 1


def test_compiles_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    net = Net(KINDS[2], r_max=2.0)
    eager = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    compiled(torch.randn(5, C, 4, 3, dtype=torch.float64))
    once = counter.frame_count
    net.load_state_dict(eager.state_dict())
    for batch in (7, 9, 12):  # none equal to another axis, which would be taken for it
        x = torch.randn(batch, C, 4, 3, dtype=torch.float64)
        _close(compiled(x), eager(x))
        _close(net.norm.running_var, eager.norm.running_var)
    assert counter.frame_count == once


def test_compiled_with_inductor() -> None:
    torch._dynamo.reset()
    net = Net(KINDS[2], r_max=2.0, d_max=0.5)
    eager = copy.deepcopy(net)
    x = _batch(KINDS[2])
    with torch.no_grad():
        _close(torch.compile(net, fullgraph=True)(x), eager(x), 1e-11)
    for actual, expected in zip(_stats(net.norm), _stats(eager.norm), strict=True):
        _close(actual, expected, 1e-11)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_exports_in_both_modes(kind: Kind, training: bool) -> None:
    net = Net(kind, r_max=2.0, d_max=0.5).train(training)
    x = _batch(kind)
    program = torch.export.export(copy.deepcopy(net), (x,))
    exported = program.module()
    before = _stats(net.norm)
    for _ in range(2):
        _close(exported(x), net(x))
    for name in ("running_mean", "running_var"):
        _close(exported.get_buffer(f"norm.{name}"), getattr(net.norm, name))
    assert training != torch.equal(net.norm.running_mean, before[0])


@every_kind
def test_symbolic_trace_keeps_the_layer_whole(kind: Kind) -> None:
    net = Net(kind)
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm"]
    x = _batch(kind)
    twin = copy.deepcopy(net)
    assert torch.equal(traced.eval()(x), twin.eval()(x))
    assert torch.equal(traced.train()(x), twin.train()(x))
    _assert_bits(_stats(traced.norm), _stats(twin.norm))
    assert int(traced.norm.num_batches_tracked) == 1


def test_symbolic_trace_passes_the_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchRenorm1d(C)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)  # type: ignore[no-any-return]

    traced = torch.fx.symbolic_trace(Masked())
    mask = torch.tensor([True, False, True, True])
    assert (traced(torch.randn(4, C), mask)[1] == 0).all()


@every_kind
def test_sync_conversion_of_torch_passes_the_layer_by(kind: Kind) -> None:
    model = nn.Sequential(kind.layer(C), kind.batch_norm(C))
    layer = model[0]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0] is layer
    assert isinstance(converted[1], nn.SyncBatchNorm)


@every_kind
def test_update_bn_passes_the_layer_by(kind: Kind) -> None:
    layer = _randomised(kind.layer(C))
    before = _stats(layer)
    torch.optim.swa_utils.update_bn([torch.randn(kind.shape)], nn.Sequential(layer))
    _assert_bits(_stats(layer), before)


@every_kind
def test_averaged_model(kind: Kind) -> None:
    layer = kind.layer(C)
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(layer), use_buffers=True)
    layer(torch.randn(kind.shape))
    averaged.update_parameters(nn.Sequential(layer))
    torch.testing.assert_close(averaged.module[0].running_mean, layer.running_mean)


def test_batch_norms_hooks_and_parametrizations_work() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = BatchRenorm1d(C)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(8, C)
    assert torch.equal(layer(x), twin(x))


def test_masked_variance_average_is_exact_in_float64() -> None:
    # m / (m - 1) of two int64 tensors is a float32.
    generator = np.random.default_rng(0)
    x, mask = generator.normal(size=(5, C)), np.array([True, True, True, True, False])
    oracle = Oracle(np.zeros(C), np.sqrt(np.ones(C) + 1e-5), 0.5, stat="var")
    oracle.train(x, np.zeros_like(x), mask=mask)
    mean, var = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    batch_renorm(torch.tensor(x), mean, var, None, None, True, 0.5, stat="var", mask=torch.tensor(mask))
    _close((var + 1e-5).sqrt(), oracle.sigma)


@pytest.mark.parametrize("padding", [float("nan"), float("inf")])
def test_what_stands_in_the_padding_reaches_no_gradient(padding: float) -> None:
    # Zero times NaN is NaN: masked_fill on the output alone does not keep it out of the backward.
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 0] = mask[2, 3] = False
    results = []
    for value in (0.0, padding):
        torch.manual_seed(1)
        layer = BatchRenorm1d(C, dtype=torch.float64)
        x = torch.randn(4, C, 5, dtype=torch.float64)
        x.masked_fill_(~mask.unsqueeze(1), value)
        x.requires_grad_()
        y = layer(x, mask)
        y.square().sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    for clean, padded in zip(*results, strict=True):
        _close(padded, clean)


@every_kind
def test_exported_training_agrees_with_eager_at_the_default_limits(kind: Kind) -> None:
    # 1 / r_max is taken in float32, 3e-8 from the 1 / 3.0 that the eager layer uses.
    net = Net(kind)
    x = _batch(kind)
    exported = torch.export.export(copy.deepcopy(net), (x,)).module()
    _close(exported(x), net(x))


def test_limits_as_tensors_agree_with_numbers_when_r_is_clipped_below() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    outputs = []
    for r_max in (3.0, torch.tensor(3.0)):
        mean = torch.zeros(3, dtype=torch.float64)
        outputs.append(batch_renorm(x, mean, torch.full_like(mean, 100.0), training=True, r_max=r_max))
    _close(outputs[1], outputs[0])


@every_kind
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_traces_in_evaluation(kind: Kind) -> None:
    net = Net(kind).eval()
    traced = torch.jit.trace(net, _batch(kind))
    x = torch.cat([_batch(kind)] * 2)
    assert torch.equal(traced(x), net(x))


def test_meta_layer_that_is_assigned_a_checkpoint_counts_and_compiles() -> None:
    # Its buffers outside the state dict stay on the meta device: nothing is counted, nothing compiles.
    with torch.device("meta"):
        layer = BatchRenorm1d(C, r_max=2.0)
    layer.load_state_dict(BatchRenorm1d(C).state_dict(), assign=True)
    layer(torch.full((4, C), torch.nan))
    assert not layer.rejected_batches.is_meta
    assert int(layer.rejected_batches) == 1
    twin = BatchRenorm1d(C, r_max=2.0)
    x = torch.randn(8, C)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_made_in_half_precision_has_statistics_in_float32(dtype: torch.dtype) -> None:
    layer = BatchRenorm2d(C, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_statistics_of_a_converted_bfloat16_model_do_not_stand_still() -> None:
    model = renormify(nn.Sequential(nn.BatchNorm1d(1)).bfloat16(), momentum=0.001)
    for _ in range(2000):
        model(torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(
        model[0].running_mean.float(), torch.tensor([2 * (1 - 0.999**2000)]), rtol=0.01, atol=0
    )


def test_momentum_zero_leaves_a_negative_zero() -> None:
    layer = BatchRenorm1d(C, momentum=0.0)
    layer.running_mean.fill_(-0.0)
    layer(torch.randn(8, C))
    assert layer.running_mean.signbit().all()


def test_type_leaves_the_count_an_integer() -> None:
    assert BatchRenorm1d(C).type(torch.float16).rejected_batches.dtype == torch.int64


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_that_is_not_positive_is_refused_as_batch_norm_refuses_it(eps: float) -> None:
    x = torch.randn(2, 10, 5, 5)
    with pytest.raises(ValueError, match="eps must be positive"):
        nn.BatchNorm2d(10, eps=eps)(x)
    with pytest.raises(ValueError, match="eps must be positive"):
        BatchRenorm2d(10, eps=eps)(x)
