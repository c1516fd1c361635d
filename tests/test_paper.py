"""The study of the paper's findings: its parts do what they say; the committed tables are the results'."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paper import pictures, tables
from paper.data import Images, Sampler, load, missing
from paper.intervals import difference, mean, p_value, ratio
from paper.networks import Constant, Microbatches, Pooled, Workers, build, for_deployment, for_training
from paper.phases import phases
from paper.records import Records
from paper.settings import FULL, QUICK, SCRATCH, Arm, Run
from paper.training import hold, perform
from torch import nn

from renormify import BatchRenorm2d

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "examples" / "paper"
LIMITS = {"r_max": 1.5, "d_max": 0.5}  # clip some channels of the inputs below, not all


def norms():
    return {
        "bn": nn.BatchNorm2d(3, momentum=0.1),
        "sigma": BatchRenorm2d(3, momentum=0.1, **LIMITS),
        "var": BatchRenorm2d(3, momentum=0.1, stat="var", **LIMITS),
    }


def trained(norm):
    """The same layer with statistics and affine that are not those it was made with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(3, generator=generator))
        norm.running_var.copy_(torch.rand(3, generator=generator) + 0.5)
        norm.weight.copy_(torch.randn(3, generator=generator))
        norm.bias.copy_(torch.randn(3, generator=generator))
    return norm.double()


@pytest.mark.parametrize("kind", list(norms()))
def test_workers_are_as_many_copies_of_the_layer(kind):
    norm = trained(norms()[kind])
    copies = [copy.deepcopy(norm) for _ in range(4)]
    x = torch.randn(8, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(8, 3, 5, 4, dtype=torch.float64)
    expected = torch.cat([each(part) for each, part in zip(copies, x.split(2), strict=True)])
    (expected_grad,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
    expected.backward(grad)
    workers = Workers(norm, 2)
    output = workers(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(output, x, grad, retain_graph=True)[0], expected_grad)
    output.backward(grad)
    for name in ("weight", "bias"):
        total = sum(getattr(each, name).grad for each in copies)
        torch.testing.assert_close(getattr(norm, name).grad, total)
    means = torch.stack([each.running_mean for each in copies])
    variances = torch.stack([each.running_var for each in copies])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    if kind == "sigma":
        sigma = (variances + norm.eps).sqrt().mean(0)
        torch.testing.assert_close((norm.running_var + norm.eps).sqrt(), sigma)
    else:
        torch.testing.assert_close(norm.running_var, variances.mean(0))


def test_pooled_workers_dealt_anew_differ_in_the_gradient_alone():
    """With limits that never bind; statistics are those of all images, against float64 by hand."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 4, dtype=torch.float64) + torch.arange(8).view(-1, 1, 1, 1)
    grad = torch.randn(8, 3, 5, 4, dtype=torch.float64)
    dealt = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    norm = trained(BatchRenorm2d(3, momentum=0.1, r_max=1e6, d_max=1e6))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    evaluated = copy.deepcopy(norm).eval()(x)
    found = []
    for order in (torch.arange(8), dealt):
        own = copy.deepcopy(norm)
        images = x[order].requires_grad_()
        output = Pooled(own, 2)(images)
        (input_grad,) = torch.autograd.grad(output, images, grad[order])
        torch.testing.assert_close(output, evaluated[order])
        values = x.transpose(0, 1).flatten(1)
        mean = 0.9 * before["running_mean"] + 0.1 * values.mean(1)
        torch.testing.assert_close(own.running_mean, mean)
        torch.testing.assert_close(own.running_var, 0.9 * before["running_var"] + 0.1 * values.var(1))
        found.append(torch.empty_like(grad).index_copy(0, order, input_grad))
    assert (found[0] - found[1]).abs().max() > 0.1


def test_constant_statistics_have_no_gradient_and_move_as_pooled_ones():
    x = (torch.randn(8, 3, 5, 4, dtype=torch.float64) + 1).requires_grad_()
    norm = trained(BatchRenorm2d(3, momentum=0.1, r_max=1e6, d_max=1e6))
    pooled = copy.deepcopy(norm)
    evaluated = copy.deepcopy(norm).eval()
    output, expected = Constant(norm, 2)(x), evaluated(x)
    torch.testing.assert_close(output, expected)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.pow(3).sum(), x)[0])
    Pooled(pooled, 2)(x)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(pooled.named_buffers()))
    assert not torch.equal(norm.running_mean, evaluated.running_mean)


@pytest.mark.parametrize("norm", ["bn", "br"])
def test_statistics_held_are_those_of_all_images_and_feel_no_microbatch(norm):
    run = replace(SCRATCH, network="plain6", norm=norm, microbatch=2)
    model = for_training(build(run), run)
    x = torch.randn(8, 1, 28, 28) + torch.arange(8.0).view(-1, 1, 1, 1)
    model.train()(x)
    parameters = list(model.parameters())
    hold(model, [x[:4], x[4:]])
    first = model[0](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, first.mean(1))
    torch.testing.assert_close(
        model[1].running_var, first.var(1, unbiased=norm == "bn"), rtol=1e-5, atol=1e-6
    )
    held = copy.deepcopy(dict(model.named_buffers()))
    alone = torch.cat([model.train()(part) for part in x.split(1)])
    torch.testing.assert_close(alone, model.eval()(x))
    torch.testing.assert_close(dict(model.named_buffers()), held, rtol=0, atol=0)
    for mine, before in zip(model.parameters(), parameters, strict=True):  # which the optimiser goes on with
        assert mine is before


def test_held_from_the_middle_on(tmp_path):
    """Until then it is the run that is not, as its points of accuracy say, and from then on another."""
    folder = made_up_data(tmp_path)
    run = Run(network="plain6", norm="br", microbatch=8, batch=16, steps=40, lr=0.05, momentum=0.1, test=0)
    moving, held = (perform(replace(run, labels=1, held=share), folder) for share in (1.0, 0.5))
    assert moving["curve"][0] == held["curve"][0]
    assert moving["curve"][1] != held["curve"][1]


@pytest.mark.parametrize("norm", ["bn", "br"])
def test_microbatches_in_one_pass_are_those_one_after_the_other(norm):
    run = replace(SCRATCH, norm=norm, microbatch=4, ramp=False)
    expected, wrapped = build(run).double(), build(run).double()
    for name, module in list(wrapped.named_children()):
        if isinstance(module, (nn.BatchNorm2d, BatchRenorm2d)):
            wrapped[int(name)] = Microbatches(module, 4)
    x = torch.randn(12, 1, 28, 28, dtype=torch.float64)
    torch.cat([expected(part) for part in x.split(4)]).square().sum().backward()
    wrapped(x).square().sum().backward()
    theirs = dict(expected.named_parameters())
    for name, parameter in for_deployment(wrapped).named_parameters():
        assert parameter.shape == theirs[name].shape
    for (_, ours), (name, parameter) in zip(wrapped.named_parameters(), theirs.items(), strict=True):
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)
    buffers = dict(for_deployment(wrapped).named_buffers())
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)


def test_a_microbatch_has_equal_shares_of_its_labels():
    labels = torch.arange(1000) % 10
    drawn = labels[Sampler(labels, 32, 2, seed=0).step(256)].view(8, 32)
    for microbatch in drawn:
        found = microbatch.unique(return_counts=True)
        assert len(found[0]) == 2
        assert found[1].tolist() == [16, 16]
    assert len(labels[Sampler(labels, 32, 10, seed=0).step(256)].unique()) == 10
    with pytest.raises(ValueError, match="no equal shares"):
        Sampler(labels, 5, 2, seed=0)


def test_intervals_against_known_figures():
    # t(0.975, 2) = 4.302653, s = 1; the paired test of (1, 2, 4) and (0, 1, 1) has t = 2.5, p = 0.1296.
    assert mean([1, 2, 3]).value == 2
    assert mean([1, 2, 3]).half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert difference([1, 2, 4], [0, 1, 1]).value == pytest.approx(5 / 3)
    assert p_value([1, 2, 4], [0, 1, 1]) == pytest.approx(0.1296, abs=1e-4)
    assert np.isnan(mean([1.0]).half)


def test_the_interval_of_a_ratio_holds_what_a_paired_test_cannot_tell():
    won, gap = [0.05, 0.07, 0.06, 0.05, 0.08], [0.08, 0.09, 0.07, 0.08, 0.09]
    value, low, high = ratio(won, gap)
    assert value == pytest.approx(0.31 / 0.41)
    for end in (low, high):  # scipy's paired t-test is at 5 % there
        assert p_value(won, [end * each for each in gap]) == pytest.approx(0.05, abs=1e-9)
    assert low < value < high
    assert ratio(won, [0.02, -0.01, 0.0, 0.01, -0.02]) is None
    assert ratio([0.1], [0.2]) is None


def test_tables_of_made_up_results():
    results, seeds = {}, 2
    study = replace(FULL, main=tuple(replace(arm, grid={}) for arm in FULL.main), seeds=seeds)
    for arm in study.main:
        level = {"bn": {32: 0.9, 8: 0.89, 4: 0.88, 2: 0.8}, "br": {32: 0.91, 8: 0.9, 4: 0.89, 2: 0.86}}
        base = level.get(arm.base.norm, level["br"])[arm.base.microbatch]
        for run in arm.finals({}, seeds):
            test = base + 0.01 * run.seed
            if run.seed and run.norm == "bn" and run.microbatch == 2:
                test -= 0.002
            curve = [(100, test - 0.05), (200, test - 0.01)]
            found = {"test": test, "test_recalibrated": test - 0.03, "curve": curve, "diverged": False}
            results[run.key()] = found
    lines = tables.microbatch(study, results).splitlines()
    one_label = tables.biased(study, results).splitlines()[-4:]
    assert [line.split("|")[4].strip() for line in one_label] == [
        "BatchNorm",
        "Batch Renorm",
        "BatchNorm, held",
        "Batch Renorm, held",
    ]
    assert lines[4] == (
        "| 20 layers | 2 | 80.4 ± 5.1 | 86.5 ± 6.4 | 6.1 ± 1.3 | 0.010 | 60 % (55 to 65) | 200 / 100 "
        "| 77.4 ± 5.1 | -30 % (-34 to -26) | +9.1 (0.007) |"
    )
    assert "| 20 layers | 4 |" in lines[3]
    assert "50 %" in lines[3]


def test_tables_of_made_up_fine_tuning():
    """Recalibrated afterwards is of the same runs; frozen statistics are counted first or not at all."""
    results, seeds = {}, 3
    study = replace(FULL, finetuning=tuple(replace(arm, grid={}, like=None) for arm in FULL.finetuning))
    for arm in study.finetuning:
        level = {"bn": 0.4, "br": 0.7, "frozen": 0.6, "gn": 0.5}[arm.base.norm] + 0.1 * arm.base.recalibrate
        for run in arm.finals({}, seeds):
            results[run.key()] = {"test": level + 0.01 * run.seed, "diverged": False}
            if run.norm in ("bn", "br") and not run.recalibrate:
                results[run.key()]["test_recalibrated"] = level + 0.05 + 0.02 * run.seed
    rows = [line.split(" | ") for line in tables.finetuning(study, results).splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("| BatchNorm", "41.0 ± 2.5"),
        ("| BatchNorm, recalibrated afterwards", "47.0 ± 5.0"),
        ("| BatchNorm, recalibrated first", "51.0 ± 2.5"),
        ("| BatchNorm, frozen", "61.0 ± 2.5"),
        ("| BatchNorm, frozen, recalibrated first", "71.0 ± 2.5"),
        ("| GroupNorm", "51.0 ± 2.5"),
        ("| Batch Renorm", "71.0 ± 2.5"),
        ("| Batch Renorm, recalibrated afterwards", "77.0 ± 5.0"),
        ("| Batch Renorm, recalibrated first", "81.0 ± 2.5"),
    ]
    compared = [line.split(" | ")[:2] for line in tables.comparisons(study, results).splitlines()[2:]]
    assert compared[0] == ["| Batch Renorm less BatchNorm", "+30.0"]  # no spread: no p
    assert compared[2] == ["| Batch Renorm less BatchNorm recalibrated afterwards", "+24.0 (< 0.001)"]
    assert compared[3] == ["| Batch Renorm less frozen", "+10.0"]
    del results[next(key for key in results if '"bn"' in key)]
    assert tables.finetuning(study, results).splitlines()[2].split(" | ")[1] == "to be run"


def test_a_text_keeps_what_is_around_its_tables():
    once = tables.fill("# Title\n\n<!-- a -->old<!-- end of a -->\n\nwords\n", {"a": "new \\1"})
    assert once == "# Title\n\n<!-- a -->\n\nnew \\1\n\n<!-- end of a -->\n\nwords\n"
    assert tables.fill(once, {"a": "new \\1"}) == once


def test_results_are_gone_on_with(tmp_path):
    run = QUICK.main[0].base
    Records(tmp_path / "r.jsonl").add(run, {"test": 0.5}, {})
    with (tmp_path / "r.jsonl").open("a") as stream:
        stream.write('{"run": {"netw')  # stopped while it wrote
    Records(tmp_path / "r.jsonl").add(replace(run, seed=1), {"test": 0.6}, {})
    with (tmp_path / "r.jsonl").open("a") as stream:
        former = {"run": {**json.loads(run.key()), "seed": 2, "protocol": 0}, "result": {}, "machine": {}}
        stream.write(json.dumps(former) + "\n")
    records = Records(tmp_path / "r.jsonl")
    assert records.results == {run.key(): {"test": 0.5}, replace(run, seed=1).key(): {"test": 0.6}}
    where = {"processor": "Z80", "system": "CP/M", "cores": 1, "torch": "2"}
    records.add(replace(run, seed=2), {"test": 0.7}, where)
    for now in (records, Records(tmp_path / "r.jsonl")):
        assert tables.machines(now).splitlines()[2:] == ["| 2 |  |  |", "| 1 | Z80, CP/M, 1 | torch 2 |"]


def test_a_repeated_study_has_the_committed_settings_and_no_run_yet(tmp_path):
    before = (PAPER / "results.jsonl").read_bytes()
    result = run_study("--repeat", "--tables", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "paper-repeat" / "README.md").read_text()
    assert tables.settings(FULL, committed().results) in text
    assert "0 of 0 runs" in text
    assert tables.microbatch(FULL, {}) in text
    assert [path.name for path in (tmp_path / "paper-repeat").iterdir()] == ["README.md"]
    assert (PAPER / "results.jsonl").read_bytes().startswith(before)
    result = run_study("--repeat", "--tables", "--output", str(PAPER), cwd=tmp_path)
    assert result.returncode == 2
    assert "a folder of its own" in result.stderr


@pytest.mark.parametrize("part", ["main", "ablation", "finetuning", "defaults"])
def test_a_repeated_study_does_all_runs_but_the_choice_of_settings(part):
    """Each that is due has a committed result, and with these the part is whole."""
    records = committed()
    found = records.choosing()
    for phase in phases(FULL, part, found):
        for run in phase.due(found):
            assert run.test == 10_000
            found[run.key()] = records.results[run.key()]
    assert len(found) > len(records.choosing())
    for phase in phases(FULL, part, records.results):
        assert {run.key() for run in phase.runs} <= found.keys()


def test_repeated_runs_stand_beside_the_committed_ones():
    arms = tuple(replace(arm, grid={}) for arm in FULL.main[:2])
    variants = {"as chosen": {}, "no ramp": {"ramp": False}}
    study = replace(
        FULL, main=arms, finetuning=(), seeds=2, few_seeds=1, ablations={"a": ((arms[0].name,), variants)}
    )
    first, second = (
        [
            {
                run.key(): {"test": 0.5, "test_recalibrated": 0.5, "diverged": False}
                for run in arm.finals({}, 2)
            }
            for arm in arms
        ]
        for _ in range(2)
    )
    theirs = first[0] | first[1]
    list(second[0].values())[1]["test"] = 0.52
    uncounted = {key: {"test": 0.5, "diverged": False} for key in first[0]}  # which an arm's row asks for
    assert tables.repeated(study, theirs, uncounted).splitlines()[4:] == [
        f"| {arms[0].name}: as chosen | 50.0 | 50.0 |"
    ]
    lines = tables.repeated(study, theirs, second[0]).splitlines()
    assert lines[0].startswith("1 of 2 runs")
    assert lines[4:] == [
        f"| {arms[0].name} | 50.0 ± 0.0 | 51.0 ± 12.7 |",
        f"| {arms[0].name}: as chosen | 50.0 | 50.0 |",
    ]
    tuning = {arms[0].base.key(): {}, replace(arms[0].base, test=0, seed=1000).key(): {"validation": 0.5}}
    records = Records(Path("nowhere"))
    records.results |= tuning
    assert list(records.choosing().values()) == [{"validation": 0.5}]


def validated(arm, level):
    """What tuning an arm leads to, whose runs are as good as a function says."""
    results = {}
    while due := arm.due(results):
        results |= {run.key(): {"validation": level(run)} for run in due}
    return results


def test_the_choice_is_the_best_on_validation_images():
    arm = Arm("a", SCRATCH, {"lr": (0.1, 0.2), "momentum": (0.1, 0.01)})
    results = validated(arm, lambda run: run.lr * run.momentum)
    assert len(results) == 4
    chosen = arm.chosen(results)
    assert (chosen.lr, chosen.momentum, chosen.seed, chosen.test) == (0.2, 0.1, 0, 10_000)
    assert all(run.test == 0 and run.seed > 4 for run in arm.tried(results))
    assert arm.is_tuned(results)
    twice = replace(arm, again=2)
    assert not twice.is_tuned(results)
    again = twice.due(results)
    assert [(run.lr, run.momentum) for run in again[::2]] == [(0.2, 0.1), (0.1, 0.1)]
    results |= {run.key(): {"validation": 0.01 if run.lr == 0.2 else 0.014} for run in again}
    assert twice.is_tuned(results)
    assert twice.chosen(results).lr == 0.2  # 0.02, 0.01, 0.01 against 0.01, 0.014, 0.014
    results |= {run.key(): {"validation": 0.009 if run.lr == 0.2 else 0.015} for run in again}
    assert twice.chosen(results).lr == 0.1


def test_no_choice_is_one_that_the_edge_of_a_grid_has_made():
    ranges = {"lr": (0.01, 0.02, 0.04, 0.08), "momentum": (0.03, 0.1, 0.3)}
    arm = Arm("a", SCRATCH, {"lr": (0.04, 0.08), "momentum": (0.1,)}, ranges)
    results = validated(arm, lambda run: -abs(run.lr - 0.02) - 0.001 * (run.momentum != 0.3))
    tried = [(run.lr, run.momentum) for run in arm.tried(results)]
    assert tried[:2] == [(0.04, 0.1), (0.08, 0.1)]
    assert set(tried[2:5]) == {(0.02, 0.1), (0.04, 0.03), (0.04, 0.3)}
    assert (arm.chosen(results).lr, arm.chosen(results).momentum) == (0.02, 0.3)
    assert {(0.01, 0.3), (0.04, 0.3), (0.02, 0.1)} < set(tried)
    assert not arm.is_tuned({key: results[key] for key in list(results)[:-1]})


def test_what_is_best_with_all_seeds_has_its_neighbours_tried_too():
    """0.02 leads by the first seed, 0.04 with all; then 0.08 is better still, and 0.16 is not."""
    arm = Arm("a", SCRATCH, {"lr": (0.02, 0.04)}, {"lr": (0.01, 0.02, 0.04, 0.08, 0.16)}, again=2)
    by_seed = {0.01: (1, 1), 0.02: (5, 2), 0.04: (4, 4), 0.08: (4.5, 4.5), 0.16: (3, 3)}
    results = validated(arm, lambda run: by_seed[run.lr][run.seed > 1000])
    assert [run.lr for run in arm.tried(results)] == [0.02, 0.04, 0.01, 0.08, 0.16]
    assert arm.chosen(results).lr == 0.08
    assert len(results) == 5 + 2 * 3  # two seeds more for each of the three that were among the best two


def test_further_seeds_go_to_two_learning_rates_at_least():
    """Momentum makes hardly a difference, and by the first seed the worse learning rate leads."""
    arm = Arm("a", SCRATCH, {"lr": (0.02, 0.04), "momentum": (0.1, 0.3)}, again=2)
    by_seed = {0.02: (5, 2), 0.04: (4, 4)}
    results = validated(arm, lambda run: by_seed[run.lr][run.seed > 1000] + run.momentum / 100)
    assert (arm.chosen(results).lr, arm.chosen(results).momentum) == (0.04, 0.3)
    assert len(results) == 4 + 2 * 3


def made_up_data(folder):
    """Four small files like Fashion-MNIST's, with labels that can be seen in the images."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 5_600), ("t10k", 300)):
        labels = generator.integers(0, 10, number, dtype=np.uint8)
        pixels = generator.integers(0, 60, (number, 28, 28), dtype=np.uint8)
        pixels[np.arange(number), 2 * labels, :] = 255
        for kind, array, head in (("images-idx3", pixels, 16), ("labels-idx1", labels, 8)):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + array.tobytes()))
    return folder


@pytest.mark.parametrize("norm", ["bn", "br", "pooled", "constant"])
def test_a_run_from_start_to_end_repeats(tmp_path, norm):
    folder = made_up_data(tmp_path)
    run = Run(
        network="plain6",
        norm=norm,
        microbatch=8,
        batch=16,
        steps=23,
        lr=0.05,
        momentum=0.1,
        test=250,
        labels=2,
    )
    first, second = (perform(run, folder) for _ in range(2))
    for result in (first, second):
        del result["seconds"]
    assert first == second
    assert [step for step, _ in first["curve"]] == [20, 23]
    assert first["onnx"]["same"] + first["onnx"]["ties"] >= first["onnx"]["images"] == 250
    if norm == "bn":
        assert first["test_by_batch"] != first["test_of_drawn"]


def test_a_run_that_diverges_is_a_result(tmp_path):
    run = Run(network="plain6", norm="br", microbatch=8, batch=16, steps=21, lr=1e20, momentum=0.1, test=250)
    result = perform(run, made_up_data(tmp_path))
    assert result["diverged"]
    assert result["curve"] == []
    assert result["test"] == result["test_recalibrated"] < 0.3
    assert "onnx" not in result
    assert tables.score([result, {**result, "diverged": False}]).endswith(" (1 of 2 diverged)")
    assert tables.steps_to([result, {**result, "curve": [(20, 0.9)]}], 0.5) is None


def test_what_no_table_asks_for_is_not_measured(tmp_path):
    """Variants are not recalibrated afterwards; what they are held against is, a final run of its arm."""
    chosen, varied = phases(QUICK, "ablation", {})
    arm = QUICK.arm(QUICK.ablations["ablation"][0][0])
    assert chosen.runs == arm.finals({}, QUICK.few_seeds)
    assert [run.ramp for run in varied.runs] == [False]
    assert (chosen.afterwards, varied.afterwards) == (True, False)
    run = replace(chosen.runs[0], steps=1, batch=16, test=20, seed=1)
    found, less = (perform(run, made_up_data(tmp_path), afterwards=asked) for asked in (True, False))
    assert set(found) - set(less) == {"test_recalibrated"}
    assert found["test"] == less["test"]
    phase = replace(chosen, runs=[run, run])
    for results, due in (({}, [run]), ({run.key(): less}, [run]), ({run.key(): found}, [])):
        assert phase.due(results) == due
    assert replace(phase, afterwards=False).due({run.key(): less}) == []


def test_a_run_that_has_diverged_is_not_held(tmp_path):
    run = Run(network="plain6", norm="bn", microbatch=8, batch=16, steps=4, lr=1e30, momentum=0.1, test=0)
    assert perform(replace(run, held=0.25), made_up_data(tmp_path))["diverged"]


def test_data_is_what_the_files_hold(tmp_path):
    data = load(made_up_data(tmp_path))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [600, 5_000, 300]
    images, labels = data.test.at(slice(20))
    assert images.shape == (20, 1, 28, 28)
    assert torch.equal(images[:, 0].mean(-1).argmax(1), 2 * labels)
    whole = torch.cat([data.train.pixels, data.validation.pixels])
    assert len(torch.unique(whole.flatten(1), dim=0)) == 5_600  # no image is in both
    large = Images(data.test.pixels, data.test.labels, size=64, channels=3).at(slice(2))[0]
    assert large.shape == (2, 3, 64, 64)


def run_study(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    return subprocess.run(
        [sys.executable, "-m", "paper", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_missing_data_is_one_line_with_the_command(tmp_path):
    result = run_study("--quick", "--data", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1
    assert "sudo apt-get install dataset-fashion-mnist" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert missing(made_up_data(tmp_path)) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGTERM])
def test_an_end_leaves_no_worker_behind_and_keeps_what_is_done(tmp_path, ended):
    """SIGTERM comes twice, as from coreutils' timeout, which sends it to the group too."""
    data = made_up_data(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    command = [sys.executable, "-m", "paper", "--quick", "--only", "main", "--data", str(data), "--jobs", "1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    results = tmp_path / "paper-quick" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not results.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(ended)
    if ended == signal.SIGTERM:
        time.sleep(0.2)  # by then it joins its workers, or is gone
        os.killpg(process.pid, ended)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (143 if ended == signal.SIGTERM else 1)
    assert "Traceback" not in said
    records = Records(results)
    assert len(records.results) >= 1
    (where,) = map(json.loads, records.machines)
    assert where["instructions"] == torch.backends.cpu.get_cpu_capability()
    for _ in range(50):  # the group is gone with its last process
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a worker goes on")


def committed():
    return Records(PAPER / "results.jsonl")


def test_the_committed_tables_are_those_of_the_committed_results():
    text = (PAPER / "README.md").read_text()
    assert tables.fill(text, tables.sections(FULL, committed(), PAPER / "bench.json")) == text


def numbers(text):
    """A picture's words, and its coordinates to half a pixel, whatever release of matplotlib drew it."""
    words = re.findall(r">([^<>]*[^<>\s][^<>]*)</text>", text)
    return words, [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_the_committed_pictures_are_those_of_the_committed_results(tmp_path):
    drawn = pictures.draw(FULL, committed().results, tmp_path)
    assert {path.name for path in drawn} == {path.name for path in PAPER.glob("*.svg")}
    for path in drawn:
        (words, places), (old_words, old_places) = (
            numbers(text) for text in (path.read_text(), (PAPER / path.name).read_text())
        )
        assert words == old_words, path.name
        assert np.allclose(places, old_places, atol=0.5), path.name


def test_the_wrapped_network_is_the_plain_one_in_evaluation_mode():
    model = build(replace(SCRATCH, norm="br"))
    x = torch.randn(4, 1, 28, 28)
    expected = model.eval()(x)
    wrapped = for_training(model, SCRATCH)
    assert sum(isinstance(module, Workers) for module in wrapped.modules()) == 14
    assert torch.equal(wrapped.eval()(x), expected)
    assert torch.equal(for_deployment(wrapped)(x), expected)
