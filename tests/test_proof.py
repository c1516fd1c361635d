"""The step-0 proof, and every way in which two models may differ."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from renormify.errors import InputError
from renormify.proof import example_inputs, prove_unchanged, run

X = example_inputs([(2, 3, 8, 8)])


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def prove(first, second, args=X):
    return prove_unchanged(Lambda(first), Lambda(second), args)


def test_identical_models_are_proven():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    proof = prove_unchanged(model, model, X)
    assert proof.passed
    assert proof.identical
    assert proof.max_abs_difference == 0.0
    assert (proof.outputs, proof.values) == (1, 2 * 4 * 6 * 6)
    assert proof.deterministic
    assert proof.reason is None
    assert json.loads(json.dumps(proof.to_dict(), allow_nan=False))["identical"] is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        proof.identical = False


def test_one_bit_is_a_difference():
    proof = prove(lambda x: x, lambda x: torch.nextafter(x, x + 1))
    assert not proof.passed
    assert 0 < proof.max_abs_difference < 1e-5
    assert proof.deterministic
    assert "differs by up to" in proof.reason


def test_signed_zeros_differ_in_bits_only():
    proof = prove(lambda x: x * 0.0, lambda x: (x * 0.0).abs())
    assert not proof.passed
    assert proof.max_abs_difference == 0.0
    assert "bits" in proof.reason


def test_equal_nans_count_as_identical_and_are_reported():
    proof = prove(lambda x: x / 0.0 * 0.0, lambda x: x / 0.0 * 0.0)
    assert proof.passed
    assert proof.nan_values == X[0].numel()
    assert "NaN" in proof.reason


def test_nan_beside_a_number_is_infinitely_far():
    proof = prove(lambda x: x, lambda x: x * float("nan"))
    assert not proof.passed
    assert proof.max_abs_difference == float("inf")
    assert proof.to_dict()["max_abs_difference"] is None


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (lambda x: x, lambda x: x.double(), "dtype"),
        (lambda x: x, lambda x: x[:1], "shape"),
        (lambda x: x, lambda x: (x,), "structure"),
        (lambda x: (x, x), lambda x: (x,), "structure"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "structure"),
        (lambda x: (x, 1), lambda x: (x, 2), "is 2, not 1"),
        (lambda x: (x, 1), lambda x: (x, 1.0), "type"),
        (lambda x: (x, None), lambda x: (x, x), "structure|type"),
        (lambda x: (x.argmax(), x), lambda x: (x.argmin(), x), "output"),
        (lambda x: x > 0, lambda x: x < 0, "differs"),
        (lambda x: torch.full((2,), 2**62), lambda x: torch.full((2,), 2**62 + 1), "differs"),
        (lambda x: (x, np.arange(5000)), lambda x: (x, np.roll(np.arange(5000), 1)), "differs"),
        (lambda x: torch.complex(x, x), lambda x: torch.complex(x, -x), "differs"),
        (lambda x: x.to_sparse(), lambda x: (x + 1).to_sparse(), "differs"),
    ],
)
def test_differences_are_found_and_named(first, second, word):
    proof = prove(first, second)
    assert not proof.passed
    assert proof.max_abs_difference > 0
    assert re.search(word, proof.reason)
    assert prove(first, first).passed


def test_result_objects_are_compared_by_their_attributes():
    @dataclasses.dataclass
    class Result:
        logits: torch.Tensor
        label: str = "a"

    assert prove(lambda x: Result(x), lambda x: Result(x)).passed
    assert not prove(lambda x: Result(x), lambda x: Result(x + 1)).passed
    assert not prove(lambda x: Result(x), lambda x: Result(x, "b")).passed


def test_objects_that_contain_themselves_end():
    class Loop:
        def __init__(self, x):
            self.x, self.me = x, self

    proof = prove(Loop, Loop)
    assert not proof.passed
    assert "nested too deeply" in proof.reason


@pytest.mark.parametrize("value", [None, (), 3, torch.empty(0)])
def test_nothing_compared_is_no_proof(value):
    proof = prove(lambda x: value, lambda x: value)
    assert not proof.passed
    assert "nothing was compared" in proof.reason


def test_random_outputs_are_compared_on_the_same_draws():
    def noisy(x):
        return x + torch.rand_like(x)

    proof = prove(noisy, noisy)
    assert proof.passed
    assert not proof.deterministic
    assert "same random draws" in proof.reason
    changed = prove(noisy, lambda x: noisy(x) + 1)
    assert not changed.passed


def test_a_model_that_never_agrees_with_itself_is_told_apart_from_a_changed_one():
    count = iter(range(100))
    proof = prove(lambda x: x + next(count), lambda x: x + next(count))
    assert not proof.passed
    assert not proof.deterministic
    assert "not deterministic" in proof.reason


def test_training_flags_random_state_and_inputs_come_back():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    inputs = example_inputs([(2, 3, 8, 8)])
    before = torch.get_rng_state()
    assert prove_unchanged(
        nn.Sequential(nn.ReLU(inplace=True), model), nn.Sequential(nn.ReLU(), model), inputs
    ).passed
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(inputs[0], example_inputs([(2, 3, 8, 8)])[0])
    assert model[0].num_batches_tracked == 0


def test_training_flags_come_back_when_a_model_fails():
    model = nn.Sequential(nn.Dropout(), nn.Linear(5, 5))
    with pytest.raises(InputError, match=r"\(2, 3, 8, 8\).*RuntimeError"):
        prove_unchanged(model, model, X)
    assert all(module.training for module in model.modules())


def test_a_converted_model_that_fails_is_a_failed_proof():
    def broken(x):
        raise ValueError("no [brackets] here")

    proof = prove(lambda x: x, broken)
    assert not proof.passed
    assert "once converted" in proof.reason
    assert "no [brackets] here" in proof.reason


def test_keyword_arguments_reach_the_model():
    model = Lambda(lambda x, scale: x * scale)
    assert prove_unchanged(model, model, X[0], {"scale": torch.tensor(2.0)}).passed
    assert torch.equal(run(model, X, {"scale": torch.tensor(2.0)}), X[0] * 2)


def test_outputs_that_alias_a_buffer_are_compared_as_they_were():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return self.count

    assert not prove_unchanged(Counter(), Counter(), X).deterministic


def test_an_exported_program_can_be_judged():
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    args = example_inputs([(2, 4)])
    program = torch.export.export(model, args).module()
    assert prove_unchanged(program, program, args).passed


def test_example_inputs_are_seeded_and_finite():
    first, second = example_inputs([(2, 3), (4,)]), example_inputs([(2, 3), (4,)])
    assert [tuple(x.shape) for x in first] == [(2, 3), (4,)]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], example_inputs([(2, 3)], seed=1)[0])
    assert example_inputs([(2,)], dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize("shape", [(99999999999, 3, 8, 8), (10**23, 3, 8, 8)])
def test_an_input_beyond_all_memory_is_refused_in_one_line(shape):
    with pytest.raises(InputError, match=r"cannot make an input of shape \(9?1?[90]+, 3, 8, 8\)") as caught:
        example_inputs([shape])
    assert "\n" not in str(caught.value)
