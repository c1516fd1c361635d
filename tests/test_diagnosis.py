"""What diagnose says of a model: its figures against NumPy, its advice on trained networks, and no trace."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn

from renormify import (
    BatchRenorm1d,
    BatchRenorm2d,
    PaperSchedule,
    RenormScheduler,
    diagnose,
    freeze_stats,
    recalibrate,
    renormify,
)
from renormify.errors import InputError, NothingToConvertError, UnsupportedModelError
from renormify.figures import QUANTILES
from renormify.layers import is_batch_renorm


def advice_of(model: nn.Module, batches, **options) -> dict[str, object]:
    return {advice.action: advice for advice in diagnose(model, batches, **options).advice}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Real images in a random order, as the input of a network for photographs, with their labels."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate((images - 0.5) / 0.25, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].contiguous(), torch.tensor(bunch.target)[order]


# --- figures ---------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_formulas():
    """One layer over four batches, its statistics moving as in Algorithm 1, in float64 NumPy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 3, 7)) * [[[1.0], [4.0], [0.05]]] + rng.normal(size=(4, 1, 3, 1)) * 2
    mean, var, alpha, eps, r_max, d_max = rng.normal(size=3), np.array([1.0, 2.0, 0.5]), 0.3, 1e-3, 1.5, 0.8
    model = BatchRenorm1d(3, eps=eps, momentum=alpha, r_max=r_max, d_max=d_max).double()
    model.running_mean.copy_(torch.from_numpy(mean))
    model.running_var.copy_(torch.from_numpy(var))
    (layer,) = diagnose(model, list(torch.from_numpy(x))).layers

    mu, sigma = mean.copy(), np.sqrt(var + eps)
    rs, ds, mus, sigmas = [], [], [], []
    for batch in x:
        mu_b, sigma_b = batch.mean((0, 2)), np.sqrt(batch.var((0, 2)) + eps)
        rs.append(sigma_b / sigma)
        ds.append((mu_b - mu) / sigma)
        mus.append(mu_b)
        sigmas.append(sigma_b)
        mu, sigma = mu + alpha * (mu_b - mu), sigma + alpha * (sigma_b - sigma)
    r, d = np.array(rs), np.array(ds)
    total = np.sqrt(x.var((0, 1, 3)) + eps)
    spread = np.sqrt(((np.var(mus, 0, ddof=1) + np.var(sigmas, 0, ddof=1)) / total**2).mean())
    missing = (r - r.clip(1 / r_max, r_max)) ** 2 + (d - d.clip(-d_max, d_max)) ** 2
    off = ((x.mean((0, 1, 3)) - mean) ** 2 + (total - np.sqrt(var + eps)) ** 2) / (var + eps)

    assert (layer.name, layer.kind, layer.channels, layer.m, layer.calls) == ("", "BatchRenorm1d", 3, 35, 4)
    np.testing.assert_allclose(layer.r, np.quantile(r, QUANTILES), rtol=1e-9)
    np.testing.assert_allclose(layer.d, np.quantile(d, QUANTILES), rtol=1e-9)
    assert layer.clipped_r == pytest.approx(np.mean((r > r_max) | (r < 1 / r_max)))
    assert layer.clipped_d == pytest.approx(np.mean(np.abs(d) > d_max))
    assert layer.spread == pytest.approx(spread, rel=1e-9)
    assert layer.gap == pytest.approx(np.sqrt(missing.mean(0)).mean(), rel=1e-9)
    assert layer.drift == pytest.approx(math.sqrt(max(np.median(off) - spread**2 / 4, 0)), rel=1e-9)
    assert (layer.dead, layer.exploding, layer.nonfinite) == (0, 0, 0)


def test_the_gap_is_what_training_and_evaluation_differ_by():
    """Of BatchNorm and of Batch Renorm, against the layers' own outputs, without weight and bias."""
    x = torch.randn(2, 6, 4, 9, 9, dtype=torch.float64) * 3 + torch.randn(2, 1, 4, 1, 1) * 4
    for norm in (nn.BatchNorm2d(4), BatchRenorm2d(4, r_max=2.0, d_max=1.0, momentum=0.0)):
        norm.double()
        nn.init.normal_(norm.running_mean)
        (layer,) = diagnose(norm, list(x)).layers
        squares = []
        for batch in x:
            twin = copy.deepcopy(norm)
            with torch.no_grad():
                difference = twin.train()(batch) - copy.deepcopy(norm).eval()(batch)
            squares.append(difference.square().mean((0, 2, 3)))
        expected = torch.stack(squares).mean(0).sqrt().mean().item()
        rel = 1e-4 if norm.momentum == 0.0 else 0.1  # a run's statistics move, a single batch's do not
        assert layer.gap == pytest.approx(expected, rel=rel)


def test_dead_exploding_and_nonfinite_channels_are_counted():
    x = torch.randn(3, 8, 4, 5, 5)
    x[:, :, 0] = 7.0
    x[:, :, 1] *= 50
    x[1, 0, 2, 0, 0] = math.inf
    x[1, 0, 2, 0, 1] = math.nan
    (layer,) = diagnose(BatchRenorm2d(4), list(x)).layers
    assert (layer.dead, layer.exploding, layer.nonfinite) == (1, 1, 2)
    assert all(map(math.isfinite, (*layer.r, *layer.d, layer.spread, layer.drift, layer.gap)))
    (layer,) = diagnose(BatchRenorm2d(4), list(x * math.nan)).layers
    assert (layer.r, layer.spread, layer.nonfinite) == ((), None, 3 * 8 * 4 * 25)


def test_one_bad_batch_hides_nothing_and_is_told():
    x = torch.randn(10, 4, 16)
    x[3, 0] = math.nan
    diagnosis = diagnose(nn.Sequential(trained(nn.BatchNorm1d(16)), trained(nn.BatchNorm1d(16))), list(x))
    spreads = [layer.spread for layer in diagnose(trained(nn.BatchNorm1d(16)), [*x[:3], *x[4:]]).layers]
    assert diagnosis.layers[0].spread == pytest.approx(spreads[0])
    advice = {advice.action: advice for advice in diagnosis.advice}
    assert "renormify" in advice
    assert "keep" not in advice
    assert advice["inspect"].layers == ("0", "1")
    assert "first into 0: 16 values" in advice["inspect"].evidence
    assert diagnosis.grouping is not None
    assert math.isfinite(diagnosis.grouping)


def test_running_statistics_that_are_not_finite_are_named():
    model = nn.Sequential(*(trained(nn.BatchNorm1d(16)) for _ in range(3)))
    model[1].running_var[5] = math.nan
    found = diagnose(model, list(torch.randn(10, 64, 16))).advice
    (advice,) = (advice for advice in found if advice.action == "recalibrate")
    assert advice.layers == ("1",)
    assert "first those of 1 (in 1 of 16 channels)" in advice.evidence
    json.dumps(diagnose(model, [torch.full((4, 16), math.nan)]).to_dict(), allow_nan=False)
    every = diagnose(nn.Sequential(trained(nn.BatchNorm1d(16))), [torch.full((4, 16), math.nan)])
    assert [advice.action for advice in every.advice] == ["inspect"]


@pytest.mark.parametrize("size", [64, 16])
@pytest.mark.parametrize("tail", [1, 2, 3])
def test_a_ragged_last_batch_changes_no_advice(size, tail):
    model, x = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32)), torch.randn(8 * size + tail, 16)
    recalibrate(model, [x])
    whole, ragged = diagnose(model, x[:-tail].split(size)), diagnose(model, x.split(size))
    assert [a.action for a in ragged.advice] == [a.action for a in whole.advice]
    assert ragged.layers[0].spread == pytest.approx(whole.layers[0].spread, rel=0.05)
    assert ragged.layers[0].r == pytest.approx(whole.layers[0].r)
    if size == 64:
        assert {advice.action for advice in ragged.advice} == {"keep"}


def test_layers_come_in_the_order_in_which_the_forward_reaches_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return F.batch_norm(self.last(self.first(x)), torch.zeros(3), torch.ones(3))

    diagnosis = diagnose(Odd(), [torch.randn(8, 3)] * 3)
    assert [layer.name for layer in diagnosis.layers] == ["first", "last", "unused"]
    assert (diagnosis.layers[2].calls, diagnosis.layers[2].m, diagnosis.layers[2].spread) == (0, 0, None)
    assert [name for name, _ in diagnosis.unseen] == [""]
    assert "its running statistics lie where no name leads" in diagnosis.unseen[0][1]
    assert not any("unused" in advice.layers for advice in diagnosis.advice)


def test_the_result_is_plain_values():
    diagnosis = diagnose(nn.BatchNorm1d(3), [torch.randn(8, 3)])
    document = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert document["batches"] == 1
    assert document["quantiles"] == list(QUANTILES)
    assert document["layers"][0]["m"] == 8
    assert document["layers"][0]["spread"] is None
    assert {"action", "layers", "evidence"} == set(document["advice"][0])
    with pytest.raises(AttributeError):
        diagnosis.batches = 2


def test_grouping_tells_shuffled_batches_from_sorted_ones():
    samples = torch.randn(10, 1, 3) * 2 + torch.randn(10, 40, 3)  # ten classes of forty
    shuffled = samples.reshape(-1, 3)[torch.randperm(400)].split(40)
    assert diagnose(nn.BatchNorm1d(3), shuffled).grouping == pytest.approx(1, abs=0.7)
    assert diagnose(nn.BatchNorm1d(3), list(samples)).grouping > 20
    assert diagnose(nn.BatchNorm1d(3), list(samples)[:1]).grouping is None


def test_few_shuffled_batches_are_not_called_sorted():
    """By chance the variance of few means is often twice what the samples tell."""
    called = []
    for _ in range(100):
        found = advice_of(nn.BatchNorm2d(1), torch.randn(8, 2, 1, 2, 2).unbind())
        called += [name for name, advice in found.items() if "at random" in advice.evidence]
    assert len(called) <= 4


# --- trained networks ------------------------------------------------------------------------------------


def test_at_batch_2_the_layers_of_smallest_m_are_among_the_worst(efficientnet_lite0, digits):
    model, _ = efficientnet_lite0()
    small = diagnose(model, digits[0][:64].split(2))
    large = diagnose(model, digits[0][:128].split(64))
    least = {layer.name for layer in small.layers if layer.m == 8}
    assert min(layer.m for layer in small.layers) == 8
    assert {layer.name for layer in small.worst(10)} <= least
    before = {layer.name: layer.spread for layer in large.layers}
    for layer in small.worst(10):
        assert layer.spread > 2 * before[layer.name]
    actions = {advice.action: advice for advice in small.advice}
    assert set(actions["renormify"].layers[:10]) <= least
    assert "m = 8" in actions["renormify"].evidence


def test_small_batches_call_for_batch_renorm_and_large_shuffled_ones_do_not(mobilenet_v2, digits):
    images, labels = digits
    model, _ = mobilenet_v2()
    small = advice_of(model, images[:64].split(2))
    assert "renormify" in small
    assert "keep" not in small
    assert "at random" not in small["renormify"].evidence
    large = advice_of(model, images[:128].split(64))
    assert len(large["keep"].layers) == 52
    assert "renormify" not in large
    assert "freeze" not in large
    one_class = advice_of(model, [images[labels == label][:32] for label in range(10)])
    assert "renormify" in one_class
    assert "keep" not in one_class
    assert "not drawn at random" in one_class["renormify"].evidence
    assert list(one_class).index("freeze") < list(one_class).index("renormify")
    assert one_class["freeze"].layers == one_class["renormify"].layers


def test_data_of_another_domain_wants_recalibrating_and_then_does_not(efficientnet_lite0, digits):
    model, _ = efficientnet_lite0()
    batches = F.interpolate(digits[0][:64], (32, 32)).split(32)
    assert "recalibrate" in advice_of(model, batches)
    recalibrate(model, batches)
    diagnosis = diagnose(model, batches)
    assert "recalibrate" not in {advice.action for advice in diagnosis.advice}
    assert (
        sorted(layer.drift for layer in diagnosis.layers)[24] < 0.05
    )  # Batch Renorm at 32 is not quite evaluation


def _shares_clipped(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Of r and d of each layer in a run with a head of its own; from the layers' inputs, in NumPy."""
    torch.manual_seed(seed)
    run = renormify(model).train()
    run._fc = nn.Linear(1280, 10)
    layers = {name: layer for name, layer in run.named_modules() if is_batch_renorm(layer)}
    clipped: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}

    def watch(name):
        def before(layer, args):
            x = args[0].detach().double().numpy()
            sigma = np.sqrt(layer.running_var.double().numpy() + layer.eps)
            r = np.sqrt(x.var((0, 2, 3)) + layer.eps) / sigma
            d = (x.mean((0, 2, 3)) - layer.running_mean.double().numpy()) / sigma
            clipped[name].append((np.mean((r > 3) | (r < 1 / 3)), np.mean(np.abs(d) > 5)))

        return before

    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
    optimizer = torch.optim.SGD(run.parameters(), lr=1e-3)
    for x, y in zip(images.split(2), labels.split(2), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
    return {name: np.mean(shares, 0) for name, shares in clipped.items()}


def test_the_estimate_of_clipping_is_what_runs_show(efficientnet_lite0, digits):
    """32 steps at batch 2. Head and drop connect are random: one layer of one run may stray by 3 points."""
    model, _ = efficientnet_lite0()
    images, labels = digits[0][:64], digits[1][:64]
    estimate = {layer.name: layer for layer in diagnose(model, images.split(2)).layers}
    runs = [_shares_clipped(model, images, labels, seed) for seed in range(3)]
    shown = {name: np.mean([run[name] for run in runs], 0) for name in estimate}
    assert max(r for r, _ in shown.values()) > 0.2  # there is something to estimate
    for name, (r, d) in shown.items():
        assert abs(estimate[name].clipped_r - r) < 0.02, name
        assert abs(estimate[name].clipped_d - d) < 0.02, name


# --- advice ----------------------------------------------------------------------------------------------


def trained(norm: nn.Module) -> nn.Module:
    """A layer whose statistics are those of standard normal data, and not the ones it was made with."""
    norm.running_mean.fill_(0.001)
    return norm


def test_with_one_or_two_values_per_channel_another_norm():
    for n in (1, 2):
        found = advice_of(trained(BatchRenorm1d(8)), list(torch.randn(20, n, 8)))
        assert found["other_norm"].layers == ("",)
        assert f"at most {n} values per channel" in found["other_norm"].evidence
        assert next(iter(found)) == "freeze"  # trained statistics before a norm that has to be trained anew
        assert "keep" not in found
    assert "freeze" not in advice_of(BatchRenorm1d(8), list(torch.randn(20, 2, 8)))
    assert "other_norm" not in advice_of(trained(BatchRenorm1d(8)), list(torch.randn(20, 3, 8)))


def test_a_layer_that_renormify_skips_is_to_be_frozen():
    class Own(nn.BatchNorm1d):
        def forward(self, input):
            if input.sum() > 1e9:
                return input
            return F.batch_norm(input, self.running_mean, self.running_var, training=self.training)

    found = advice_of(trained(Own(64)), list(torch.randn(20, 4, 64)))
    assert found["freeze"].layers == ("",)
    assert "forward of its own" in found["freeze"].evidence
    assert "renormify" not in found


def test_layers_of_a_frozen_class_are_told_and_left():
    model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    diagnosis = diagnose(model, list(torch.randn(4, 2, 3, 5, 5)))
    assert [layer.name for layer in diagnosis.layers] == ["1"]
    assert diagnosis.unseen == (("0", "frozen: its statistics and affine are constants"),)


def test_a_smaller_last_batch_is_not_the_measure_of_all():
    batches = [*torch.randn(80, 64).split(16), torch.randn(1, 64)]
    diagnosis = diagnose(trained(nn.BatchNorm1d(64)), batches)
    assert diagnosis.layers[0].m == 16
    assert "other_norm" not in {advice.action for advice in diagnosis.advice}


def test_a_frozen_model_is_well_as_it_is():
    model = nn.Sequential(trained(nn.BatchNorm1d(64)))
    freeze_stats(model)
    diagnosis = diagnose(model, list(torch.randn(20, 4, 64)))
    assert [advice.action for advice in diagnosis.advice] == ["keep"]
    assert "frozen already" in diagnosis.advice[0].evidence
    assert diagnosis.layers[0].frozen
    assert diagnosis.layers[0].gap == 0.0


def test_a_converted_model_is_told_what_batch_renorm_is_for():
    small = advice_of(trained(BatchRenorm1d(64)), list(torch.randn(20, 4, 64)))
    assert "Batch Renorm is what these need" in small["keep"].evidence
    large = advice_of(trained(BatchRenorm1d(64)), list(torch.randn(20, 256, 64)))
    assert "BatchNorm would do as well" in large["keep"].evidence


@pytest.mark.parametrize(("norm", "action"), [(nn.BatchNorm1d, "renormify"), (BatchRenorm1d, "keep")])
def test_trained_statistics_may_be_frozen_instead_and_fresh_ones_not(norm, action):
    batches = list(torch.randn(20, 4, 64))
    assert "freeze_stats(model)" in advice_of(trained(norm(64)), batches)[action].evidence
    assert "freeze_stats" not in advice_of(norm(64), batches)[action].evidence
    grouped = list(torch.randn(20, 4, 64) + 3 * torch.randn(20, 1, 64))
    found = advice_of(trained(norm(64)), grouped)
    assert list(found)[:2] == ["freeze", action]
    assert "not drawn at random" in found["freeze"].evidence
    assert "freeze_stats" not in found[action].evidence  # said once
    assert "freeze" not in advice_of(norm(64), grouped)
    part = nn.Sequential(trained(norm(64)), norm(64))  # the other's statistics say nothing yet
    assert "freeze_stats(model, filter_fn=...)" in advice_of(part, batches)[action].evidence
    found = advice_of(part, grouped)
    assert found["freeze"].layers == ("0",)
    assert "freeze_stats(model, filter_fn=...)" in found["freeze"].evidence


def test_statistics_as_they_were_made_want_the_papers_schedule():
    found = advice_of(BatchRenorm1d(16), list(torch.randn(9, 32, 16) * 5 + 3))
    assert "look again" in found["keep"].evidence
    assert "PaperSchedule" in found["limits"].evidence
    assert "recalibrate" not in found


def test_limits_too_narrow_are_to_be_raised():
    layer = trained(BatchRenorm1d(64, r_max=1.05, d_max=0.1))
    diagnosis = diagnose(layer, list(torch.randn(20, 16, 64)))
    (limits,) = (advice for advice in diagnosis.advice if advice.action == "limits")
    (figures,) = diagnosis.layers
    assert figures.clipped_r > 0.4
    assert figures.clipped_d > 0.4
    words = limits.evidence.replace(";", "").split()
    layer.r_max, layer.d_max = (float(words[words.index(name) + 2]) for name in ("r_max", "d_max"))
    again = diagnose(layer, list(torch.randn(20, 16, 64)))
    assert again.layers[0].clipped_r < 0.02
    assert again.layers[0].clipped_d < 0.02
    assert "limits" not in {advice.action for advice in again.advice}


def test_limits_that_nothing_comes_near_are_to_be_lowered():
    batches = list(torch.randn(20, 64, 16))
    wide_r, wide_d = BatchRenorm1d(16, r_max=100.0), BatchRenorm1d(16, d_max=math.inf)
    assert "lower r_max to 3, as" in advice_of(trained(wide_r), batches)["limits"].evidence
    assert "lower d_max to 5, as" in advice_of(trained(wide_d), batches)["limits"].evidence
    assert "limits" not in advice_of(trained(BatchRenorm1d(16)), batches)


def test_one_limit_too_wide_and_one_too_narrow_do_not_contradict_each_other():
    layer = trained(BatchRenorm1d(64, r_max=15.0, d_max=0.01))
    found = [a for a in diagnose(layer, list(torch.randn(20, 16, 64))).advice if a.action == "limits"]
    raised, lowered = (advice.evidence for advice in found)
    assert "raise d_max to" in raised
    assert "r_max" not in raised
    assert "lower r_max to 3," in lowered
    assert "d_max" not in lowered


def test_the_limits_of_a_schedules_beginning_are_left_to_it():
    model = nn.Sequential(trained(BatchRenorm1d(64)))
    RenormScheduler(model, PaperSchedule())
    assert "limits" not in advice_of(model, list(torch.randn(20, 4, 64)))


def test_momentum():
    batches = list(torch.randn(20, 64, 16))
    assert "momentum" not in advice_of(trained(BatchRenorm1d(16)), batches)
    overwritten = advice_of(trained(nn.BatchNorm1d(16, momentum=None)), batches)["momentum"]
    assert "the first batch would replace them" in overwritten.evidence
    counted = trained(nn.BatchNorm1d(16, momentum=None))
    counted.num_batches_tracked.fill_(100)
    assert "momentum" not in advice_of(counted, batches)
    assert "never move" in advice_of(trained(nn.BatchNorm1d(16, momentum=0.0)), batches)["momentum"].evidence


def test_a_momentum_that_suits_small_batches():
    batches = list(torch.randn(200, 4, 64))
    evidence = advice_of(trained(nn.BatchNorm1d(64, momentum=0.5)), batches)["momentum"].evidence
    suited = float(evidence.partition("at most ")[2].split()[0])
    layer = nn.BatchNorm1d(64, momentum=suited)
    means = []
    for batch in torch.randn(2000, 4, 64):
        layer(batch)
        means.append(layer.running_mean.clone())
    assert 0.03 < torch.stack(means[500:]).std() < 0.1


def test_one_batch_is_compared_with_the_running_statistics():
    batch = torch.randn(512, 16)
    assert "the one batch" in advice_of(trained(nn.BatchNorm1d(16)), [batch])["keep"].evidence
    assert "the one batch" in advice_of(trained(nn.BatchNorm1d(16)), [batch + 2])["renormify"].evidence


# --- no trace --------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Draws random numbers, writes into its input and its own state, and fails when asked to."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.seen = 0, []

    def forward(self, x):
        x.mul_(2).add_(random.random() + np.random.rand())
        self.count += 1
        self.calls += 1
        self.seen.append(x.shape)
        if x.shape[0] == 3:
            raise RuntimeError("three is\ntoo many")
        return self.drop(self.norm(self.conv(x)))


def everything(model: nn.Module) -> list[object]:
    return [
        {key: (value.tolist(), value._version) for key, value in model.state_dict(keep_vars=True).items()},
        [(module.training, sorted(vars(module))) for module in model.modules()],
        [[len(value) for key, value in vars(m).items() if key.endswith("hooks")] for m in model.modules()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        (model.calls, list(model.seen)),
    ]


@pytest.mark.parametrize("convert", [lambda model: model, renormify], ids=["BatchNorm", "Batch Renorm"])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 2, 2), None), ((2, 3), r"fails on a batch of shape \(3, 3, 8, 8\).*three is too")],
)
def test_nothing_changes_also_when_it_raises(convert, sizes, message):
    model = Restless()
    model.norm.register_forward_hook(lambda *_: None)
    model = convert(model)
    model.drop.eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    batches = [torch.randn(n, 3, 8, 8) for n in sizes]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=message is None)
    before, inputs = everything(model), [batch.clone() for batch in batches]
    if message is None:
        diagnose(model, loader)
    else:
        with pytest.raises(InputError, match=message):
            diagnose(model, loader)
    assert everything(model) == before
    assert all(torch.equal(a, b) for a, b in zip(batches, inputs, strict=True))


def test_a_compiled_model_is_looked_into():
    model = torch.compile(nn.Sequential(nn.BatchNorm1d(3)))
    (layer,) = diagnose(model, [torch.randn(8, 3)] * 2).layers
    assert (layer.name, layer.calls) == ("0", 2)


def test_no_more_batches_are_drawn_than_asked_for():
    drawn = []

    def loader():
        for number in range(100):
            drawn.append(number)
            yield torch.randn(8, 3)

    assert diagnose(nn.BatchNorm1d(3), loader(), max_batches=4).batches == 4
    assert drawn == [0, 1, 2, 3]


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        (nn.BatchNorm1d(3), [], InputError, "batches is empty"),
        (
            nn.BatchNorm1d(3),
            torch.randn(4, 3),
            InputError,
            "iterable of batches .got one Tensor.*into a list",
        ),
        (nn.BatchNorm1d(3), [torch.randn(4, 5)], InputError, r"fails on a batch of shape \(4, 5\)"),
        (
            nn.BatchNorm1d(3),
            [{"wrong": torch.randn(4, 3)}],
            InputError,
            "unexpected keyword argument 'wrong'",
        ),
        (nn.BatchNorm1d(3), [None], InputError, "a batch must be a tensor.*got NoneType"),
        (nn.Linear(3, 3), [torch.randn(4, 3)], NothingToConvertError, "statistics in Linear to diagnose"),
        (
            nn.BatchNorm1d(3, track_running_stats=False),
            [],
            NothingToConvertError,
            "in BatchNorm1d to diagnose",
        ),
        ("resnet18", [torch.randn(4, 3)], UnsupportedModelError, "expected an nn.Module .got str"),
    ],
)
def test_bad_input_is_named(model, batches, error, message):
    with pytest.raises(error, match=message):
        diagnose(model, batches)


@pytest.mark.parametrize("wrong", [0, None, 2.5])
def test_max_batches_is_at_least_one(wrong):
    with pytest.raises(InputError, match="max_batches must be a whole number of at least 1"):
        diagnose(nn.BatchNorm1d(3), [torch.randn(4, 3)], max_batches=wrong)
