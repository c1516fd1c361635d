"""The judge of the zoo's sweep: an honest converter passes, and each dishonest one fails for what it did."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from zoo.behaviour import examine_behaviour
from zoo.census import Calls, census
from zoo.ledger import Ledger, shortfall, totals, whole
from zoo.moments import State, batch_of, can_tell
from zoo.structure import examine_structure
from zoo.table import markdown
from zoo.verdicts import Subject, Verdict
from zoo.workers import record_of, sweep

import renormify
from renormify.errors import RenormifyWarning


class Net(nn.Module):
    """A branch that only training has, dropout, and two norm layers in the way of all outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.auxiliary = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
        self.drop = nn.Dropout(0.5)
        self.conv = nn.Conv2d(4, 5, 3)
        self.norm = nn.BatchNorm2d(5, eps=1e-3)
        self.unused = nn.BatchNorm1d(2)
        self.head = nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Any:
        features = self.stem(input)
        output = self.head(self.norm(self.conv(self.drop(features))).relu().mean((2, 3)))
        return (output, self.auxiliary(features)) if self.training else output


def calls(model: nn.Module) -> Any:
    yield "2", ((torch.randn(2, 3, 2, 2),), {})  # smaller than the kernels
    yield "8", ((torch.randn(2, 3, 8, 8),), {})


SUBJECT = Subject("toy:net", Net, calls)
NORMS = ("stem.1", "auxiliary.1", "norm", "unused")


def dishonest(change: Callable[[nn.Module], None], *, of_revert: bool = False) -> Any:
    """Converts and reverts as renormify does, but for what ``change`` does to one of the results."""

    def convert(model: nn.Module, **options: Any) -> Any:
        conversion = renormify.convert(model, **options)
        if not of_revert:
            change(conversion.model)
        return conversion

    def revert(model: nn.Module, **options: Any) -> nn.Module:
        reverted = renormify.revert(model, **options)
        if of_revert:
            change(reverted)
        return reverted

    return SimpleNamespace(convert=convert, revert=revert)


def claims(model: nn.Module, names: tuple[str, ...] = NORMS) -> Any:
    sites = tuple(SimpleNamespace(name=name, action="converted", reason="") for name in names)
    return SimpleNamespace(model=model, report=SimpleNamespace(sites=sites, converted=names))


PLAIN_COPY = SimpleNamespace(
    convert=lambda model, *, inplace=False, momentum=0.01: claims(model if inplace else copy.deepcopy(model)),
    revert=lambda model, *, inplace=False: model,
)


def test_an_honest_converter_passes():
    structure = examine_structure(SUBJECT, renormify)
    assert not structure.failures
    assert (structure.sites, structure.converted, structure.skipped) == (4, 4, {})
    verdict = examine_behaviour(SUBJECT, renormify)
    assert not verdict.failures
    assert not verdict.unfit
    assert not verdict.notes
    assert verdict.facts["input"] == "8"
    assert verdict.facts["random in training"]
    assert verdict.facts["used in training"] == 3
    assert whole(record_of("toy:net", verdict))


def test_a_plain_copy_fails_both_parts():
    structure = examine_structure(SUBJECT, PLAIN_COPY)
    assert structure.failures == [
        "layers: no r_max and d_max at auxiliary.1, norm, stem.1 and 1 more, said to be converted"
    ]
    verdict = examine_behaviour(SUBJECT, PLAIN_COPY)
    assert verdict.failures == [
        "statistics: 3 of 4 layers moved their statistics by BatchNorm's rule, with momentum 0.1: "
        "auxiliary.1, norm, stem.1"
    ]


def nudge(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] *= 1 + 2**-22


def reorder(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module._buffers["running_mean"] = module._buffers.pop("running_mean")


def rename(model: nn.Module) -> None:
    model.norm_ = model._modules.pop("norm")
    model.norm = model.norm_


def lose_versions(model: nn.Module) -> None:
    model.head._version = 7


def bake_dropout(model: nn.Module) -> None:
    model.drop.forward = lambda input: input


def shift_training(model: nn.Module) -> None:
    model.head.register_forward_hook(lambda module, _, output: output * 1.01 if module.training else None)


def shift_evaluation(model: nn.Module) -> None:
    model.norm.eps = 1.0


def average_the_variance(model: nn.Module) -> None:
    for name in NORMS:
        model.get_submodule(name).stat = "var"


def freeze(model: nn.Module) -> None:
    for name in NORMS:
        model.get_submodule(name).momentum = 0.0


def halve_momentum(model: nn.Module) -> None:
    for name in NORMS:
        model.get_submodule(name).momentum /= 2


def miscount(model: nn.Module) -> None:
    model.norm.register_forward_hook(
        lambda m, *_: m.num_batches_tracked.add_(1) and None if m.training else None
    )


def detach(model: nn.Module) -> None:
    model.norm.register_forward_hook(lambda module, _, output: output.detach() if module.training else None)


def explode(model: nn.Module) -> None:
    model.head.register_full_backward_pre_hook(lambda _, gradients: tuple(g / 0 for g in gradients))


def raise_in_training(model: nn.Module) -> None:
    def hook(module: nn.Module, _: Any) -> None:
        if module.training:
            raise ValueError("not so many\nas that")

    model.norm.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nudge, "convert: changed the values of conv.weight"),
        (reorder, "state dict: its keys come in another order"),
        (rename, "state dict: its keys differ at norm_.bias, norm_.num_batches_tracked, norm_.run"),
        (lose_versions, "state dict: another version at head"),
        (bake_dropout, "modes: the original's dropout is gone from training"),
        (shift_training, "modes: with r = 1, d = 0 training differs from the original's by 0.0"),
        (shift_evaluation, "evaluation: converted differs from the original, by 0."),
        (average_the_variance, "statistics: 3 of 4 layers moved their statistics by BatchNorm's rule"),
        (freeze, "statistics: 3 of 4 layers did not move their statistics: auxiliary.1, norm, stem.1"),
        (halve_momentum, "statistics: 3 of 4 layers moved their statistics neither by Batch Renorm's"),
        (miscount, "statistics: 1 of 4 layers miscounted their batches: norm"),
        (detach, "training: no gradient at conv.bias, conv.weight, norm.bias and 1 more"),
        (explode, "training: inf or NaN in outputs or gradients"),
        (raise_in_training, "converted, training: ValueError: not so many"),
    ],
)  # fmt: skip
def test_a_dishonest_converter_fails_for_what_it_did(change, message):
    failures = examine_behaviour(SUBJECT, dishonest(change)).failures
    assert any(failure.startswith(message) for failure in failures), failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nudge, "revert: changed the values of conv.weight"),
        (shift_evaluation, "evaluation: reverted differs from the original"),
        (lambda model: setattr(model, "drop", nn.Identity()), "revert: other classes at drop"),
    ],
)
def test_a_dishonest_revert_fails_for_what_it_did(change, message):
    failures = examine_behaviour(SUBJECT, dishonest(change, of_revert=True)).failures
    assert any(failure.startswith(message) for failure in failures), failures


def test_a_forgotten_layer_fails_whether_it_is_reported_or_not():
    def convert(model: nn.Module, **options: Any) -> Any:
        conversion = renormify.convert(model, filter_fn=lambda _, name: name != "norm", **options)
        sites = tuple(site for site in conversion.report.sites if site.name != "norm")
        return replace(conversion, report=replace(conversion.report, sites=sites))

    unreported = SimpleNamespace(convert=convert, revert=renormify.revert)
    for examine in (examine_structure, examine_behaviour):
        assert examine(SUBJECT, unreported).failures[0] == "sites: not reported: norm"
    claimed = SimpleNamespace(
        convert=lambda model, **options: claims(convert(model, **options).model), revert=renormify.revert
    )
    assert examine_structure(SUBJECT, claimed).failures == [
        "layers: no r_max and d_max at norm, said to be converted"
    ]
    assert examine_behaviour(SUBJECT, claimed).failures == [
        "statistics: 1 of 4 layers moved their statistics by BatchNorm's rule, with momentum 0.1: norm"
    ]


def test_a_layer_left_out_with_a_reason_passes_and_is_counted():
    def convert(model: nn.Module, **options: Any) -> Any:
        return renormify.convert(model, filter_fn=lambda _, name: name != "norm", **options)

    verdict = examine_behaviour(SUBJECT, SimpleNamespace(convert=convert, revert=renormify.revert))
    assert not verdict.failures
    assert (verdict.sites, verdict.converted, verdict.skipped) == (4, 3, {"left out by filter_fn": 1})
    assert not whole(record_of("toy:net", verdict))


def test_an_original_that_was_converted_with_its_copy_fails():
    def convert(model: nn.Module, *, inplace: bool = False, **options: Any) -> Any:
        return renormify.convert(model, inplace=True, **options)

    failures = examine_behaviour(SUBJECT, SimpleNamespace(convert=convert, revert=renormify.revert)).failures
    assert "copy: the original itself came back" in failures


class Other(Net):
    pass


def replace_weight(model: nn.Module) -> None:
    model.conv.weight = nn.Parameter(model.conv.weight * 1)


def leave_meta(model: nn.Module) -> None:
    model.conv.register_buffer("x", torch.zeros(1, device="cpu"), persistent=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_weight, "in place: other tensors at conv.weight"),
        (lambda model: model.drop.eval(), "modes: gone, or of another mode: drop"),
        (lambda model: setattr(model, "__class__", Other), "class: a Other came back"),
        (leave_meta, "memory: left the meta device: conv.x"),
        (rename, "state dict: its keys differ at norm_.bias"),
        (reorder, "state dict: its keys come in another order"),
    ],
)  # fmt: skip
def test_what_conversion_in_place_must_leave(change, message):
    failures = examine_structure(SUBJECT, dishonest(change)).failures
    assert any(failure.startswith(message) for failure in failures), failures


def test_a_model_that_is_kept_alive_fails():
    kept: list[nn.Module] = []
    failures = examine_structure(SUBJECT, dishonest(kept.append)).failures
    assert failures == ["memory: the model is kept alive after conversion"]
    kept.clear()
    gc.collect()


def test_a_converter_that_raises_fails_with_its_word():
    def convert(model: nn.Module, **options: Any) -> Any:
        raise NotImplementedError("not yet\nat all")

    for examine in (examine_structure, examine_behaviour):
        verdict = examine(SUBJECT, SimpleNamespace(convert=convert, revert=renormify.revert))
        assert verdict.failures == ["convert: NotImplementedError: not yet"]


def test_a_model_with_nothing_to_convert_is_booked_with_its_reasons():
    subject = replace(SUBJECT, build=lambda: nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3)))
    for examine in (examine_structure, examine_behaviour):
        verdict = examine(subject, renormify)
        assert not verdict.failures
        assert (verdict.sites, verdict.converted, list(verdict.skipped.values())) == (1, 0, [1])


def test_a_large_model_is_converted_in_place(monkeypatch):
    monkeypatch.setattr("zoo.behaviour.COPIED", 0)
    monkeypatch.setattr(copy, "deepcopy", None)
    assert not examine_behaviour(SUBJECT, renormify).failures


def test_an_original_that_cannot_be_copied_is_converted_in_place_and_said_so():
    class Uncopied(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("not this one")

    verdict = examine_behaviour(replace(SUBJECT, build=Uncopied), renormify)
    assert not verdict.failures
    assert verdict.notes == ["the original cannot be copied, so in place: not this one"]


def test_what_the_original_does_badly_is_not_held_against_the_converter():
    class Restless(Net):
        def forward(self, input: Tensor) -> Any:
            output = super().forward(input)
            return (output[0] / 0, output[1]) if self.training else output + next(self.noise)

        noise = iter(range(100))

    verdict = examine_behaviour(replace(SUBJECT, build=Restless), renormify)
    assert verdict.notes == [
        "the original is not finite in training",
        "the original differs from run to run in evaluation",
    ]
    assert verdict.failures == ["evaluation: after training, two runs differ"]
    taken = examine_behaviour(replace(SUBJECT, calls=lambda _: [("2", next(calls(_))[1])]), renormify)
    assert taken.unfit.startswith("the original takes no input tried: RuntimeError: ")


def test_a_site_used_twice_moves_twice():
    class Twice(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(super().forward(input))

    build = lambda: Twice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))  # noqa: E731
    verdict = examine_behaviour(Subject("toy:twice", build, calls), renormify)
    assert not verdict.failures
    assert verdict.facts["used in training"] == 1


def test_two_values_per_channel_obey_the_rule():
    build = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))  # noqa: E731
    subject = Subject("toy:two", build, lambda _: [("8", ((torch.randn(2, 3, 8, 8),), {}))])
    with pytest.warns(RenormifyWarning, match="trains on 2 values per channel"):
        assert not examine_behaviour(subject, renormify).failures


def test_a_batch_that_is_what_was_expected_tells_no_rule_from_another():
    values = torch.randn(4, 3, 5, 5)
    batch = batch_of(values)
    assert can_tell(State(batch.mean, batch.var * 2), [batch], 1e-5, 0.25, 0.1)
    assert not can_tell(State(batch.mean, batch.var), [replace(batch, count=10**9)], 1e-5, 0.25, 0.1)
    assert torch.allclose(batch.mean, values.double().mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(batch.unbiased, values.double().var((0, 2, 3)), rtol=1e-12)


def test_the_walk_finds_every_kind_once_and_no_instance_norm():
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({
        "list": nn.ModuleList([shared, nn.LazyBatchNorm1d(), nn.BatchNorm3d(2, track_running_stats=False)]),
        "again": shared,
        "frozen": FrozenBatchNorm2d(3),
        "instance": nn.InstanceNorm2d(3, track_running_stats=True),
        "sync": nn.SyncBatchNorm(3),
    })  # fmt: skip
    assert list(census(model)) == ["list.0", "list.1", "list.2", "frozen", "sync"]


def test_calls_with_statistics_of_no_layer_are_seen():
    norm, mean = nn.BatchNorm2d(3), torch.zeros(3)
    with Calls({"": norm}) as seen:
        norm(torch.randn(2, 3, 4, 4))
        nn.functional.batch_norm(torch.randn(2, 3), None, None, training=True)
        assert seen.strangers == 0
        nn.functional.batch_norm(torch.randn(2, 3), mean, mean + 1)
        torch.batch_norm(torch.randn(2, 3), None, None, mean, mean + 1, False, 0.0, 1e-5, False)
    assert seen.strangers == 2


def test_each_model_has_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the process they are forked from
    records = {
        r["model"]: r
        for r in sweep("meta", ["timm:resnet18", "timm:vit_tiny_patch16_224", "timm:x"], 2, 60, 8)
    }
    assert whole(records["timm:resnet18"])
    assert records["timm:resnet18"]["sites"] == 20
    assert records["timm:vit_tiny_patch16_224"]["outcome"] == "none"
    assert "Unknown model (x)" in records["timm:x"]["failures"][0]
    late = list(sweep("numbers", ["timm:resnet18"], 1, 0.0, 8))
    assert late == [{"model": "timm:resnet18", "outcome": "unfit", "unfit": "took more than 0 s"}]
    (large,) = sweep("numbers", ["timm:resnet18"], 1, 60, 0.1)
    assert large["unfit"] == "12 M parameters need 0.2 GiB, of 0.1"


def test_a_run_continues_where_it_was_and_not_with_the_results_of_another(tmp_path):
    file = tmp_path / "results" / "meta.jsonl"
    first = Ledger(file, "this")
    first.add(record_of("timm:a", Verdict(sites=2, converted=2)))
    first.add(record_of("timm:b", Verdict(sites=2, failures=["one", "two"])))
    Ledger(file, "that").add(record_of("timm:c", Verdict(sites=1)))
    file.write_text(file.read_text() + json.dumps({"model": "timm:d", "fingerprint": "this"})[:-5])
    assert list(Ledger(file, "this").records) == ["timm:a", "timm:b"]
    Ledger(file, "this").add(record_of("timm:b", Verdict(sites=2, converted=2)))
    assert Ledger(file, "this").records["timm:b"]["outcome"] == "pass"


def test_the_table_names_every_model_below_all_with_its_reason():
    records = [
        record_of("timm:good", Verdict(sites=3, converted=3)),
        record_of("timm:bare", Verdict()),
        record_of("timm:half", Verdict(sites=2, converted=1, skipped={"for a reason": 1}, notes=["slow"])),
        record_of("timm:half_too", Verdict(sites=2, converted=1, skipped={"for a reason": 1})),
        record_of("torchvision:bad", Verdict(sites=1, converted=1, failures=["evaluation: differs"])),
        record_of("torchvision:big", Verdict(sites=1, unfit="too large")),
    ]
    assert [shortfall(record) for record in records[2:]] == [
        ["1 skipped: for a reason"], ["1 skipped: for a reason"], ["evaluation: differs"], ["too large"]
    ]  # fmt: skip
    counted = totals(records)
    assert counted["timm"] == Counter(models=3, whole=1, **{"pass": 3}, sites=7, converted=5)
    page = markdown({"meta": records, "numbers": []}, 8)
    assert "| timm | 3 | 1 | 0 | 0 | 7 | 5 |" in page
    assert "| torchvision | 2 | 0 | 1 | 1 | 2 | 1 |" in page
    assert "- skipped: for a reason (2): timm:half 1/2, timm:half_too 1/2\n" in page
    assert "- evaluation: differs (1): torchvision:bad\n" in page
    assert "- slow (1): timm:half\n" in page
    assert "bare" not in page
    assert "2 models have not been examined yet" in page
    assert "With numbers" not in page
    assert "None is below 100 %." in markdown({"numbers": records[:1]}, 1)
