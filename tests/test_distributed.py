"""Batch Renorm in several processes, on gloo and the CPU; what each does is in ``distributed_workers``."""

from __future__ import annotations

import inspect

import distributed_workers
import pytest
import torch

from renormify import BatchRenorm2d, SyncBatchRenorm

# Starting processes takes longer than what they do: all scenarios of one number of processes share them.
SYNC = [
    "sync_without_bias",
    "sync_without_affine",
    "sync_of_one_value_in_each_process_does_not_warn",
    "sync_of_unequal_batches",
    "sync_of_batches_one_of_them_empty",
    "sync_of_batches_the_first_empty",
    "sync_averaging_the_variance",
    "sync_averaging_cumulatively",
    "sync_from_a_synchronised_batch_norm",
    "sync_from_a_plain_batch_norm",
    "sync_checkpointed_reentrant",
    "sync_checkpointed_not_reentrant",
    "sync_with_a_mask",
    "sync_with_a_mask_and_an_empty_batch",
    "sync_with_a_mask_that_leaves_one_process_nothing",
    "sync_of_images_in_float32_and_bfloat16",
    "sync_rejects_everywhere_what_is_not_finite_in_one_process",
    "sync_of_empty_batches_everywhere",
    "sync_in_evaluation_exchanges_nothing",
    "fsdp",
]
SCENARIOS = {
    2: [
        *SYNC,
        "ddp_broadcasting_buffers",
        "ddp_not_broadcasting_buffers",
        "ddp_broadcasting_buffers_two_forwards_per_backward",
        "ddp_not_broadcasting_buffers_two_forwards_per_backward",
        "ddp_of_a_plain_layer_starts_each_step_from_the_first_process",
        "ddp_with_a_checkpointed_segment",
        "fsdp_with_a_checkpointed_segment",
        "fsdp_from_the_meta_device",
        "sharded_run_resumes_bit_for_bit",
        "replicated_run_resumes_bit_for_bit",
        "replicated_run_of_plain_layers_resumes_bit_for_bit",
    ],
    3: [*SYNC, "sync_in_a_subgroup", "torchs_own_layer_refuses_the_cpu", "ddp_broadcasting_buffers"],
}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[str]]]:
    return {processes: distributed_workers.run(names, processes) for processes, names in SCENARIOS.items()}


@pytest.mark.parametrize(
    ("processes", "name"), [(processes, name) for processes, names in SCENARIOS.items() for name in names]
)
def test_in_processes(processes: int, name: str, outcomes: dict[int, dict[str, list[str]]]) -> None:
    assert not outcomes[processes][name], "\n".join(outcomes[processes][name])


def test_every_scenario_is_run() -> None:
    scenarios = {
        name
        for name, function in inspect.getmembers(distributed_workers, inspect.isfunction)
        if function.__module__ == "distributed_workers" and not name.startswith("_") and name != "run"
    }
    assert scenarios == {name for names in SCENARIOS.values() for name in names}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_without_a_group_the_layer_joins_nothing(masked: bool, kernels: str) -> None:
    assert not torch.distributed.is_initialized()
    alone, ours = BatchRenorm2d(3, momentum=0.2), SyncBatchRenorm(3, momentum=0.2)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 2)
        mask = torch.rand(4, 5, 2) < 0.7 if masked else None
        results = []
        for layer in (alone, ours):
            leaf = x.clone().requires_grad_()
            y = layer(leaf, mask)
            gradients = torch.autograd.grad(y.pow(3).sum(), [leaf, *layer.parameters()])
            results.append([y, *gradients, *layer.buffers()])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
    assert torch.equal(ours.eval()(x), alone.eval()(x))
