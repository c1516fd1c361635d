"""batch_renorm() itself: its gradients of every order, its masks, its checks, its dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from renormify import functional
from renormify.functional import batch_renorm

with warnings.catch_warnings():
    # torch scripts these when forward mode is first used, and warns of its own scripting.
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp

SHAPES = {"1d": (5, 3), "1d-L": (4, 3, 5), "2d": (3, 3, 2, 4), "3d": (2, 3, 2, 3, 2)}
# r and d do not move with the input, so numerical differentiation may be asked: Batch Norm, or all clipped.
HELD = {
    "batch norm": {"r_max": 1.0, "d_max": 0.0, "mean": 0.0, "var": 1.0},
    "all clipped high": {"r_max": 1.5, "d_max": 0.5, "mean": -50.0, "var": 1e-4},
    "all clipped low": {"r_max": 1.5, "d_max": 0.5, "mean": 50.0, "var": 30.0},
}


def _held(case: str, **options: Any) -> Callable[..., Tensor]:
    """batch_renorm as a pure function: fresh statistics at each call, r and d not moved by the input."""
    limits = HELD[case]

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        mean = torch.full((x.shape[1],), limits["mean"], dtype=torch.float64)
        var = torch.full((x.shape[1],), limits["var"], dtype=torch.float64)
        return batch_renorm(
            x, mean, var, weight, bias, True, 0.1, r_max=limits["r_max"], d_max=limits["d_max"], **options
        )

    return function


def _leaves(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64) + 0.2
    weight, bias = torch.rand(shape[1], dtype=torch.float64) + 0.5, torch.randn(shape[1], dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def _close(actual: Tensor, expected: np.ndarray[Any, Any] | Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_of_first_and_second_order_are_those_of_numerical_differentiation(
    shape: tuple[int, ...], case: str, kernels: str
) -> None:
    leaves = _leaves(shape)
    assert gradcheck(_held(case), leaves)
    assert gradgradcheck(_held(case), leaves)


@pytest.mark.parametrize("case", HELD)
def test_gradients_without_affine_and_without_bias(case: str, kernels: str) -> None:
    x, weight, _ = _leaves((4, 3, 5))
    assert gradcheck(_held(case), (x,))
    assert gradgradcheck(_held(case), (x,))
    assert gradcheck(_held(case), (x, weight))
    assert gradgradcheck(_held(case), (x, weight))


@pytest.mark.parametrize("case", HELD)
def test_gradients_with_a_mask(case: str) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert gradcheck(_held(case, mask=mask), _leaves((3, 3, 5)))
    assert gradgradcheck(_held(case, mask=mask), _leaves((3, 3, 5)))


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_mode_agrees_with_numerical_differentiation(shape: tuple[int, ...], case: str) -> None:
    assert gradcheck(_held(case), _leaves(shape), check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_agrees_with_reverse_mode_where_r_and_d_are_free() -> None:
    x, weight, bias = _leaves((4, 3, 5))
    tangents = [torch.randn_like(leaf) for leaf in (x, weight, bias)]

    def function(*leaves: Tensor) -> Tensor:
        return batch_renorm(
            leaves[0],
            torch.full((3,), 0.3, dtype=torch.float64),
            torch.full((3,), 0.7, dtype=torch.float64),
            *leaves[1:],
            True,
        )

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(leaf, t) for leaf, t in zip((x, weight, bias), tangents, strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    cotangent = torch.randn_like(x)
    gradients = torch.autograd.grad(function(x, weight, bias), (x, weight, bias), cotangent)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert tangent is not None
    _close((tangent * cotangent).sum(), expected)


def test_forward_mode_leaves_no_tangent_in_the_statistics() -> None:
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(
            torch.randn(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
        )
        batch_renorm(x, mean, var, training=True)
        assert forward_ad.unpack_dual(mean).tangent is None
        assert forward_ad.unpack_dual(var).tangent is None


@pytest.mark.parametrize("needing", ["x", "weight", "bias", "x weight", "x bias", "weight bias"])
def test_only_some_arguments_require_gradients(needing: str, kernels: str) -> None:
    leaves = dict(zip(("x", "weight", "bias"), _leaves((4, 3, 5)), strict=True))
    function = _held("all clipped high")
    cotangent = torch.randn(4, 3, 5, dtype=torch.float64)
    all_gradients = torch.autograd.grad(function(**leaves), list(leaves.values()), cotangent)
    expected = dict(zip(leaves, all_gradients, strict=True))

    some = {k: v if k in needing.split() else v.detach() for k, v in leaves.items()}
    function(**some).backward(cotangent)
    for name, leaf in some.items():
        if name in needing.split():
            assert leaf.grad is not None
            _close(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


def test_no_argument_requires_gradients(kernels: str) -> None:
    output = _held("batch norm")(torch.randn(4, 3, dtype=torch.float64))
    assert not output.requires_grad
    with torch.no_grad():
        assert not _held("batch norm")(*_leaves((4, 3))).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_functorch_gradients_are_those_of_autograd(training: bool) -> None:
    x, weight, bias = _leaves((4, 3, 5))
    stats = (torch.full((3,), 0.3, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64))

    def loss(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output = batch_renorm(x, mean, var, weight, bias, training, 0.1)
        return output.square().sum(), (mean, var)

    mine = [buffer.clone() for buffer in stats]
    expected = torch.autograd.grad(loss(x, weight, bias, *mine)[0], (x, weight, bias))
    given = [buffer.clone() for buffer in stats]
    leaves = [leaf.detach() for leaf in (x, weight, bias)]
    grads, moved = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(*leaves, *given)
    for actual, wanted in zip(grads, expected, strict=True):
        _close(actual, wanted)
    for actual, wanted in zip(moved, mine, strict=True):
        _close(actual, wanted)
    assert training != torch.equal(mine[0], stats[0])


@pytest.mark.parametrize("stat", functional.STATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mask_agrees_with_the_oracle(shape: tuple[int, ...], stat: str) -> None:
    generator = np.random.default_rng(0)
    gamma, beta = generator.uniform(0.5, 2, 3), generator.normal(size=3)
    oracle = Oracle(np.zeros(3), np.ones(3), 0.1, r_max=1.5, d_max=1.0, stat=stat)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1 - 1e-5, dtype=torch.float64)
    seen = []
    for _ in range(50):
        x = generator.normal(size=shape) * np.array([0.05, 1, 3]).reshape(-1, *(1,) * (len(shape) - 2))
        x += np.array([0, 0.3, 4]).reshape(-1, *(1,) * (len(shape) - 2))
        mask = generator.uniform(size=(shape[0], *shape[2:])) < 0.7
        dy = generator.normal(size=shape)
        step = oracle.train(x, dy, gamma, beta, mask)
        seen.append((step.clipped_r, step.clipped_d))

        leaves = [torch.tensor(value, requires_grad=True) for value in (x, gamma, beta)]
        output = batch_renorm(
            leaves[0], mean, var, *leaves[1:], True, 0.1, r_max=1.5, d_max=1.0, stat=stat,
            mask=torch.tensor(mask),
        )  # fmt: skip
        output.backward(torch.tensor(dy))
        _close(output, step.y)
        for leaf, expected in zip(leaves, (step.dx, step.dgamma, step.dbeta), strict=True):
            assert leaf.grad is not None
            _close(leaf.grad, expected)
        _close(mean, oracle.mu)
        _close((var + 1e-5).sqrt(), oracle.sigma)
        padded = torch.tensor(~mask).unsqueeze(1).expand(shape)
        assert (output[padded] == 0).all()
        assert leaves[0].grad is not None
        assert (leaves[0].grad[padded] == 0).all()
    for clipped in map(np.array, zip(*seen, strict=True)):
        assert clipped.any()
        assert not clipped.all()


def test_mask_of_everything_changes_nothing() -> None:
    outcomes = []
    for mask in (None, torch.ones(4, 5, dtype=torch.bool)):
        torch.manual_seed(1)
        x, weight, bias = _leaves((4, 3, 5))
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        output = batch_renorm(x, mean, var, weight, bias, True, mask=mask)
        output.square().sum().backward()
        outcomes.append([output, x.grad, weight.grad, bias.grad, mean, var])
    for plain, masked in zip(*outcomes, strict=True):
        _close(masked, plain.detach())


def test_mask_broadcasts() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    row = torch.tensor([1, 1, 0, 1, 0], dtype=torch.bool)
    outputs = []
    for mask in (row, row.expand(4, 5)):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        outputs.append(batch_renorm(x, mean, var, training=True, mask=mask))
    assert torch.equal(*outputs)


def test_mask_that_leaves_nothing_or_one_value() -> None:
    for valid in (0, 1):
        mask = torch.zeros(4, 5, dtype=torch.bool)
        mask.view(-1)[:valid] = True
        x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        output = batch_renorm(x, mean, var, training=True, momentum=0.5, mask=mask)
        output.sum().backward()
        assert output.isfinite().all()
        assert x.grad is not None
        assert (x.grad == 0).all()
        assert torch.equal(var, torch.ones(3, dtype=torch.float64))
        _close(mean, valid * 0.5 * x[0, :, 0])


def test_mask_in_evaluation_only_blanks() -> None:
    x = torch.randn(4, 3, 5)
    mask = torch.rand(4, 5) < 0.5
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    output = batch_renorm(x, mean, var, mask=mask)
    assert torch.equal(output, F.batch_norm(x, mean, var) * mask.unsqueeze(1))


def test_mask_must_be_bool() -> None:
    with pytest.raises(ValueError, match=r"mask must be of dtype torch.bool.*got torch.float32"):
        batch_renorm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), training=True, mask=torch.ones(4))


def test_native_kernels_are_used_where_they_are_and_only_there(kernels: str) -> None:
    output = _held("batch norm")(*_leaves((4, 3)))
    assert output.grad_fn is not None
    assert ("BatchNorm" not in output.grad_fn.name()) == (kernels == "native")


def test_evaluation_is_batch_norm_bit_for_bit() -> None:
    x, weight, bias = torch.randn(4, 3, 5), torch.randn(3), torch.randn(3)
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    output = batch_renorm(x, mean, var, weight, bias, momentum=0.5, eps=1e-3)
    assert torch.equal(output, F.batch_norm(x, mean, var, weight, bias, eps=1e-3))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.0, 0.0), (float("inf"), float("inf"))])
def test_limits_may_be_numbers_or_tensors(limits: tuple[float, float], kernels: str) -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64) * 7 + 9
    outputs = []
    for r_max, d_max in (limits, map(torch.tensor, limits)):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        outputs.append(batch_renorm(x, mean, var, training=True, r_max=r_max, d_max=d_max))
        outputs.extend((mean, var))
    for number, tensor in zip(outputs[:3], outputs[3:], strict=True):
        _close(tensor, number)


def test_momentum_may_be_a_tensor(kernels: str) -> None:
    x = torch.randn(4, 3, 5)
    stats = []
    for momentum in (0.25, torch.tensor(0.25)):
        mean, var = torch.zeros(3), torch.ones(3)
        batch_renorm(x, mean, var, training=True, momentum=momentum)
        stats.append((mean, var))
    assert torch.equal(stats[0][0], stats[1][0])
    assert torch.equal(stats[0][1], stats[1][1])
    assert not torch.equal(stats[0][0], torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_low_precision_input_keeps_statistics_in_float32(
    dtype: torch.dtype, masked: bool, kernels: str
) -> None:
    x = (torch.randn(8, 3, 6) * 2 + 3).to(dtype).requires_grad_()
    weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    mask = torch.ones(8, 6, dtype=torch.bool) if masked else None
    output = batch_renorm(x, mean, var, weight, bias, True, 0.5, mask=mask)
    assert output.dtype == dtype
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    assert [leaf.grad.dtype for leaf in (x, weight, bias)] == [dtype, torch.float32, torch.float32]

    exact = x.detach().double().requires_grad_()
    affine = [leaf.detach().double().requires_grad_() for leaf in (weight, bias)]
    mean64, var64 = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    reference = batch_renorm(exact, mean64, var64, *affine, True, 0.5)
    # Rounded to bfloat16 on the way, a statistic would be off by 4e-3.
    torch.testing.assert_close(mean.double(), mean64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), var64, rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), reference, rtol=eps, atol=eps)
    reference.backward(cotangent.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=eps, atol=eps)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_large_float16_inputs_do_not_overflow(masked: bool, kernels: str) -> None:
    x = torch.full((4, 2, 8), 6e4, dtype=torch.float16)
    x[:, :, ::2] = -6e4
    x.requires_grad_()
    mean, var = torch.zeros(2), torch.ones(2)
    mask = torch.ones(4, 8, dtype=torch.bool) if masked else None
    output = batch_renorm(x, mean, var, training=True, momentum=0.5, mask=mask)
    (output.float() ** 3).sum().backward()
    oracle = Oracle(np.zeros(2), np.sqrt(np.ones(2) + 1e-5), 0.5)
    wide = x.detach().double().numpy()
    step = oracle.train(wide, 3 * output.detach().double().numpy() ** 2)
    torch.testing.assert_close(output.double().detach(), torch.tensor(step.y), rtol=1e-3, atol=0)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close((var.double() + 1e-5).sqrt(), torch.tensor(oracle.sigma), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(3)}, ValueError, r"at least 2 dimensions \(got 1D input\)"),
        ({"running_mean": None}, ValueError, "needs running_mean and running_var"),
        ({"running_var": None}, ValueError, "needs running_mean and running_var"),
        ({"running_mean": torch.zeros(4)}, RuntimeError, "running_mean should contain 3 elements not 4"),
        ({"running_var": torch.zeros(1)}, RuntimeError, "running_var should contain 3 elements not 1"),
        ({"weight": torch.zeros(2)}, RuntimeError, "weight should contain 3 elements not 2"),
        ({"bias": torch.zeros(5)}, RuntimeError, "bias should contain 3 elements not 5"),
        ({"stat": "std"}, ValueError, r"stat must be one of \('sigma', 'var'\) \(got 'std'\)"),
        ({"r_max": 0.5}, ValueError, r"r_max must be at least 1 \(got 0.5\)"),
        ({"r_max": float("nan")}, ValueError, "r_max must be at least 1"),
        ({"d_max": -0.1}, ValueError, r"d_max must be at least 0 \(got -0.1\)"),
        ({"d_max": float("nan")}, ValueError, "d_max must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, training: bool
) -> None:
    arguments = {"input": torch.randn(4, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with pytest.raises(error, match=message):
        batch_renorm(**{**arguments, **change, "training": training})


def test_signature_is_that_of_batch_norm_and_then_keywords() -> None:
    x = torch.randn(4, 3)
    mean, var = torch.randn(3), torch.rand(3)
    weight, bias = torch.randn(3), torch.randn(3)
    positional = batch_renorm(x, mean, var, weight, bias, False, 0.1, 1e-3)
    assert torch.equal(positional, F.batch_norm(x, mean, var, weight, bias, False, 0.1, 1e-3))
    with pytest.raises(TypeError, match="positional"):
        batch_renorm(x, mean, var, weight, bias, True, 0.1, 1e-3, 3.0)  # type: ignore[misc]


def test_rejected_batches_are_counted_by_the_function(kernels: str) -> None:
    rejected = torch.zeros((), dtype=torch.int64)
    mean, var = torch.full((3,), 0.3), torch.full((3,), 0.7)
    x = torch.randn(4, 3)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[0, 1] = value
        batch_renorm(x, mean, var, training=True, rejected=rejected)
    assert int(rejected) == 3
    assert torch.equal(mean, torch.full((3,), 0.3))
    assert torch.equal(var, torch.full((3,), 0.7))
    batch_renorm(torch.randn(4, 3), mean, var, training=True, rejected=rejected)
    assert int(rejected) == 3
    assert not torch.equal(mean, torch.full((3,), 0.3))
