"""The inputs of torch's own BatchNorm module tests, through our layers at r_max = 1 and d_max = 0.

There Batch Renorm is BatchNorm, so outputs, gradients and statistics must be BatchNorm's. The statistics are
compared with ``stat="var"``, which is BatchNorm's rule; the paper's averages sigma. Left out are the inputs
without running statistics, which r and d are relative to, and those with ``momentum=None``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInput, module_db

from renormify import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm, renormify

LAYERS = {nn.BatchNorm1d: BatchRenorm1d, nn.BatchNorm2d: BatchRenorm2d, nn.BatchNorm3d: BatchRenorm3d}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INFOS = {info.module_cls: info for info in module_db if info.module_cls in LAYERS}

every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@dataclass(frozen=True)
class Case:
    """One entry of torch's list: which class, and which of its inputs."""

    batch_norm: Any
    index: int
    label: str

    def __str__(self) -> str:
        return self.label

    def make(self, device: str, dtype: torch.dtype, training: bool) -> tuple[Any, Tensor]:
        """A fresh BatchNorm, and the input torch tests it with."""
        entry = _entries(self.batch_norm, device, dtype, training)[self.index]
        arguments = entry.constructor_input
        module = self.batch_norm(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
        return module.train(training), entry.forward_input.args[0]


def _entries(batch_norm: Any, device: str, dtype: torch.dtype, training: bool) -> list[ModuleInput]:
    info = INFOS[batch_norm]
    entries: list[ModuleInput] = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    )
    return entries


def _cases() -> list[Case]:
    cases = []
    for batch_norm in LAYERS:
        for index, entry in enumerate(_entries(batch_norm, "cpu", torch.float32, True)):
            arguments = entry.constructor_input
            module = batch_norm(*arguments.args, **arguments.kwargs)
            if module.track_running_stats and module.momentum is not None:
                cases.append(Case(batch_norm, index, f"{batch_norm.__name__}-{entry.desc or 'plain'}"))
    return cases


CASES = _cases()


def _made_anew(reference: Any) -> Any:
    """Our layer with a BatchNorm's arguments and state."""
    layer = LAYERS[type(reference)](
        reference.num_features,
        reference.eps,
        reference.momentum,
        reference.affine,
        bias=reference.bias is not None,
        r_max=1.0,
        d_max=0.0,
        stat="var",
        device=reference.running_mean.device,
        dtype=reference.running_mean.dtype,
    )
    layer.load_state_dict(reference.state_dict())
    return layer.train(reference.training)


def _synchronised(reference: Any) -> Any:
    layer = _made_anew(reference)
    layer.__class__ = SyncBatchRenorm
    layer.process_group = None
    return layer


def _converted(reference: Any) -> Any:
    return renormify(reference, r_max=1.0, d_max=0.0, momentum="keep", stat="var")


def _results(module: Any, x: Tensor) -> dict[str, Tensor]:
    """What two forwards and backwards give; torch's parameters are ones and zeros, which hides errors."""
    with torch.no_grad():
        for scale, parameter in enumerate(module.parameters(), 2):
            ramp = torch.arange(parameter.numel(), device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(ramp.cos() * scale)
    results = {}
    for step in range(2):
        leaf = (x.detach() * (1 + step)).requires_grad_()
        y = module(leaf)
        upstream = torch.arange(y.numel(), device=y.device, dtype=y.dtype).sin().view_as(y)
        names = ["input", *dict(module.named_parameters())]
        gradients = torch.autograd.grad(y, [leaf, *module.parameters()], upstream)
        results[f"output {step}"] = y.detach()
        results |= {f"gradient of {name} {step}": value for name, value in zip(names, gradients, strict=True)}
        results[f"running_mean {step}"] = module.running_mean.clone()
        results[f"running_var {step}"] = module.running_var.clone()
    return results


def test_the_list_of_torch_is_whole() -> None:
    assert set(INFOS) == set(LAYERS)
    # 8, 7 and 7 entries, less one with momentum=None and one without statistics in each.
    assert [sum(case.batch_norm is cls for case in CASES) for cls in LAYERS] == [6, 5, 5]


@pytest.mark.parametrize("make", [_made_anew, _converted, _synchronised], ids=["made", "converted", "sync"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_dtype
@every_device
def test_results_are_batch_norms(
    case: Case, make: Any, training: bool, dtype: torch.dtype, device: str, kernels: str
) -> None:
    reference, x = case.make(device, dtype, training)
    layer = make(reference)
    expected, actual = _results(reference, x), _results(layer, x)
    assert actual.keys() == expected.keys()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    # An empty batch is none: BatchNorm counts it, though nothing came of it.
    counted = int(reference.num_batches_tracked) if x.numel() else 0
    assert int(layer.num_batches_tracked) == counted
    if not training:
        for name in (name for name in expected if name.startswith(("output", "running"))):
            assert torch.equal(actual[name], expected[name]), f"{name} is not the same to the bit"


@pytest.mark.parametrize("batch_norm", LAYERS, ids=lambda cls: cls.__name__)
@every_device
def test_states_load_strictly_in_both_directions(batch_norm: Any, device: str) -> None:
    for case in (case for case in CASES if case.batch_norm is batch_norm):
        reference, x = case.make(device, torch.float64, True)
        layer = _made_anew(reference)
        layer(x)
        reference.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(reference.eval()(x), layer.eval()(x))
