"""What each process of a distributed test does.

A scenario is a function of no arguments that runs in every process of an initialised group. Each compares
its share with one process that has the joined batch, which it computes for itself: all draw the same numbers.
Assertions stand behind the last exchange of a scenario, so that a failure leaves no other process waiting.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from renormify import BatchRenorm1d, SyncBatchRenorm, convert_sync, renormify, revert
from renormify.errors import RenormifyWarning

C = 5
SIZES = {"unequal": (5, 3, 4), "one of them empty": (4, 0, 3), "the first empty": (0, 4, 3)}
OPTIONS: dict[str, Any] = {"momentum": 0.3, "r_max": 1.5, "d_max": 0.7}

# --------------------------------------------------------------------------------------------------- starting


def run(names: list[str], processes: int) -> dict[str, list[str]]:
    """Runs scenarios in new processes, and gives what went wrong in each of them, by scenario."""
    with tempfile.TemporaryDirectory() as folder:
        context: Any = mp.spawn(_process, (names, processes, folder), nprocs=processes, join=False)
        try:
            while not context.join(timeout=120):
                pass
            ended = "was not run"
        except Exception as error:
            ended = f"was not run to its end: {error}"
        reports = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
    return {
        name: [report.get(name, ended) for report in reports if report.get(name, ended)] for name in names
    }


def _process(rank: int, names: list[str], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=40),
    )
    report: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        aborted = False
        try:
            getattr(sys.modules[__name__], name)()
            report[name] = ""
        except Exception as error:
            report[name] = f"process {rank} of {processes}: {traceback.format_exc()}"
            # Past the last exchange the others are not waiting, and the next scenario may begin.
            aborted = not isinstance(error, AssertionError)
        Path(folder, f"{rank}.json").write_text(json.dumps(report))
        if aborted:
            return
    dist.barrier()
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------- comparing


def _close(actual: Any, expected: Any, what: str = "") -> None:
    """Within 1e-12 of the scale of the value."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=1e-12, atol=1e-12 * scale, msg=lambda m: f"{what}: {m}"
    )


def _loss(y: Tensor, upstream: Tensor) -> Tensor:
    return (y * upstream).sum() + y.pow(3).sum() / 10


def _network(norm: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(C, C), norm, nn.Tanh(), nn.Linear(C, 3)).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(C) + 1)
        net[1].running_mean.copy_(torch.randn(C))
        net[1].running_var.copy_(torch.rand(C) + 0.3)
    return net


def _share(sizes: tuple[int, ...]) -> slice:
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def _sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes[: dist.get_world_size()]


def _batches(sizes: tuple[int, ...], steps: int = 3) -> list[Tensor]:
    # Each process's share is far from the others': its own statistics would be nothing like the joined ones.
    offset = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).unsqueeze(1) * 2.0
    return [torch.randn(sum(sizes), C, dtype=torch.float64) * (1 + step) + offset for step in range(steps)]


def _total(gradient: Tensor | None, group: Any = None) -> Tensor:
    assert gradient is not None
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


def _compare_with_one_process(
    single: nn.Module,
    ours: nn.Module,
    sizes: tuple[int, ...],
    run: Callable[[nn.Module, Tensor], Tensor] = lambda net, x: net(x),
) -> None:
    """Outputs and gradients of this share, summed gradients of parameters, statistics, over three steps."""
    sizes, checks = _sizes(sizes), []
    share = _share(sizes)
    for x in _batches(sizes):
        whole, part = x.clone().requires_grad_(), x[share].clone().requires_grad_()
        upstream = torch.randn(len(x), 3, dtype=torch.float64)
        expected, actual = run(single, whole), run(ours, part)
        single.zero_grad()
        ours.zero_grad()
        _loss(expected, upstream).backward()
        _loss(actual, upstream[share]).backward()
        assert whole.grad is not None
        assert part.grad is not None
        checks += [
            (actual, expected[share], "output"),
            (part.grad, whole.grad[share], "gradient of the input"),
        ]
        for (name, mine), other in zip(ours.named_parameters(), single.parameters(), strict=True):
            checks.append((_total(mine.grad), other.grad, f"gradient of {name}"))
        buffers = dict(ours.named_buffers())
        checks += [(buffers[name].clone(), other.clone(), name) for name, other in single.named_buffers()]
    for check in checks:
        _close(*check)


def _pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    single = _network(BatchRenorm1d(C, **OPTIONS | options))
    return single, convert_sync(copy.deepcopy(single))


# ------------------------------------------------------------------------------------------- SyncBatchRenorm


def sync_of_unequal_batches() -> None:
    _compare_with_one_process(*_pair(), SIZES["unequal"])


def sync_of_batches_one_of_them_empty() -> None:
    _compare_with_one_process(*_pair(), SIZES["one of them empty"])


def sync_of_batches_the_first_empty() -> None:
    _compare_with_one_process(*_pair(), SIZES["the first empty"])


def sync_averaging_the_variance() -> None:
    _compare_with_one_process(*_pair(stat="var"), SIZES["unequal"])


def sync_averaging_cumulatively() -> None:
    _compare_with_one_process(*_pair(momentum=None), SIZES["one of them empty"])


def sync_from_a_synchronised_batch_norm() -> None:
    norm = nn.SyncBatchNorm(C, momentum=0.3)
    model = _network(norm)
    ours = renormify(model, momentum="keep", r_max=1.5, d_max=0.7)
    assert type(ours[1]) is SyncBatchRenorm
    assert type(revert(ours)[1]) is nn.SyncBatchNorm
    single = _network(BatchRenorm1d(C, **OPTIONS))
    single.load_state_dict(model.state_dict())
    _compare_with_one_process(single, ours, SIZES["unequal"])


def sync_from_a_plain_batch_norm() -> None:
    model = renormify(_network(nn.BatchNorm1d(C)), **OPTIONS)
    _compare_with_one_process(model, convert_sync(copy.deepcopy(model)), SIZES["unequal"])


def _sync_checkpointed(use_reentrant: bool) -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    single, ours = _pair()
    plain = copy.deepcopy(single)
    _compare_with_one_process(plain, copy.deepcopy(ours), SIZES["unequal"])
    torch.manual_seed(1)
    _compare_with_one_process(single, ours, SIZES["unequal"], run)
    assert int(ours[1].num_batches_tracked) == 3


def sync_checkpointed_reentrant() -> None:
    _sync_checkpointed(True)


def sync_checkpointed_not_reentrant() -> None:
    _sync_checkpointed(False)


def _compare_masked(sizes: tuple[int, ...], masks: Callable[[Tensor], Tensor], **options: Any) -> None:
    single = _network(BatchRenorm1d(C, **OPTIONS | options))[1]
    ours = SyncBatchRenorm(C, **OPTIONS | options, dtype=torch.float64)
    ours.load_state_dict(single.state_dict())
    sizes, checks = _sizes(sizes), []
    share = _share(sizes)
    for step in range(3):
        x = torch.randn(sum(sizes), C, 7, dtype=torch.float64) * (1 + step)
        mask = masks(torch.rand(sum(sizes), 7))
        x.masked_fill_(~mask.unsqueeze(1), torch.nan)  # what stands in the padding must not matter
        upstream = torch.randn(x.shape, dtype=torch.float64)
        whole, part = x.clone().requires_grad_(), x[share].clone().requires_grad_()
        expected, actual = single(whole, mask), ours(part, mask[share])
        single.zero_grad()
        ours.zero_grad()
        (expected * upstream).sum().backward()
        (actual * upstream[share]).sum().backward()
        assert whole.grad is not None
        assert part.grad is not None
        checks += [
            (actual, expected[share], "output"),
            (part.grad, whole.grad[share], "gradient of the input"),
            (_total(ours.weight.grad), single.weight.grad, "gradient of the weight"),
            (_total(ours.bias.grad), single.bias.grad, "gradient of the bias"),
            (ours.running_mean.clone(), single.running_mean.clone(), "running_mean"),
            (ours.running_var.clone(), single.running_var.clone(), "running_var"),
            (ours.num_batches_tracked.clone(), single.num_batches_tracked.clone(), "num_batches_tracked"),
        ]
    for check in checks:
        _close(*check)
    assert int(ours.rejected_batches) == 0


def sync_with_a_mask() -> None:
    _compare_masked(SIZES["unequal"], lambda noise: noise < 0.6)


def sync_with_a_mask_and_an_empty_batch() -> None:
    _compare_masked(SIZES["one of them empty"], lambda noise: noise < 0.6, stat="var")


def sync_with_a_mask_that_leaves_one_process_nothing() -> None:
    def mask(noise: Tensor) -> Tensor:
        return (noise < 0.6) & (torch.arange(len(noise)) >= SIZES["unequal"][0]).unsqueeze(1)

    _compare_masked(SIZES["unequal"], mask)


def sync_of_images_in_float32_and_bfloat16() -> None:
    sizes = _sizes(SIZES["unequal"])
    share, results = _share(sizes), []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(sum(sizes), C, 4, 3).to(dtype)
        single, ours = BatchRenorm1d(C), SyncBatchRenorm(C)
        expected = single(x.flatten(2)).view_as(x)
        leaf = x[share].clone().requires_grad_()
        actual = ours(leaf)
        actual.float().square().sum().backward()
        results.append((actual, expected[share], ours.running_mean, single.running_mean, leaf.grad, dtype))
    for actual, expected, mean, reference, gradient, dtype in results:
        assert actual.dtype == gradient.dtype == dtype
        assert mean.dtype == torch.float32
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(mean, reference)


def sync_rejects_everywhere_what_is_not_finite_in_one_process() -> None:
    layer = SyncBatchRenorm(C)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, C)
    if dist.get_rank() == 1:
        x[2, 3] = torch.nan
    layer(x)
    warned = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.eval()
        warned = sum(issubclass(warning.category, RenormifyWarning) for warning in caught)
    assert warned == 1
    assert int(layer.rejected_batches) == 1
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def sync_of_empty_batches_everywhere() -> None:
    layer = SyncBatchRenorm(C)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, C, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, C)
    assert x.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros(C))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def sync_in_evaluation_exchanges_nothing() -> None:
    layer, counter = SyncBatchRenorm(C), _CountedExchanges()
    with counter:
        layer.eval()(torch.randn(4, C, requires_grad=True)).sum().backward()
    silent = counter.calls
    with counter:
        layer.train()(torch.randn(4, C, requires_grad=True)).sum().backward()
    assert silent == 0
    assert counter.calls == 2  # one in forward, one in backward


class _CountedExchanges:
    """Counts collectives of any name."""

    names = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "gather", "reduce", "barrier")

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> None:
        self.originals = {name: getattr(dist, name) for name in self.names}
        for name, original in self.originals.items():
            setattr(dist, name, self._counted(original))

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(*args, **kwargs)

        return counted


def torchs_own_layer_refuses_the_cpu() -> None:
    # Why there is a layer of our own here; when this fails, what is said of torch's is out of date.
    refused = ""
    try:
        nn.SyncBatchNorm(C)(torch.randn(4, C))
    except ValueError as error:
        refused = str(error)
    assert "expected input tensor to be on" in refused


def sync_in_a_subgroup() -> None:
    # The first two processes are one batch; any other normalises its own.
    pair, rest = dist.new_group([0, 1]), dist.new_group([2])
    rank = dist.get_rank()
    sizes = (4, 3, 5)
    x, share = _batches(sizes, 1)[0], _share(sizes)
    single = BatchRenorm1d(C, **OPTIONS).double()
    ours = convert_sync(copy.deepcopy(single), process_group=pair if rank < 2 else rest)
    mine = slice(0, 7) if rank < 2 else slice(7, 12)
    whole, part = x[mine].clone().requires_grad_(), x[share].clone().requires_grad_()
    expected, actual = single(whole), ours(part)
    expected.pow(3).sum().backward()
    actual.pow(3).sum().backward()
    weight = _total(ours.weight.grad, pair if rank < 2 else rest)
    inside = slice(share.start - mine.start, share.stop - mine.start)
    assert whole.grad is not None
    _close(actual, expected[inside], "output")
    _close(part.grad, whole.grad[inside], "gradient of the input")
    _close(weight, single.weight.grad, "gradient of the weight")
    _close(ours.running_mean, single.running_mean, "running_mean")
    _close(ours.running_var, single.running_var, "running_var")


# --------------------------------------------------------------------------------------------- DDP and FSDP2


def _ddp(broadcast_buffers: bool, forwards: int) -> None:
    sizes = _sizes(SIZES["unequal"])
    share, processes = _share(sizes), dist.get_world_size()
    single, ours = _pair()

    ddp = DistributedDataParallel(ours, forward_sync_buffers=broadcast_buffers)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in (single, ddp)]
    checks = []
    for x in _batches(sizes, 3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        upstream = torch.randn(len(x), 3, dtype=torch.float64)
        expected = [single(x * (1 + index)) for index in range(forwards)]
        actual = [ddp(x[share] * (1 + index)) for index in range(forwards)]
        # DistributedDataParallel takes the mean over the processes.
        (sum(_loss(y, upstream) for y in expected) / processes).backward()
        sum(_loss(y, upstream[share]) for y in actual).backward()
        checks += [(mine, other[share], "output") for mine, other in zip(actual, expected, strict=True)]
        for (name, mine), other in zip(ours.named_parameters(), single.parameters(), strict=True):
            checks.append((mine.grad.clone(), other.grad.clone(), f"gradient of {name}"))
        for optimizer in optimizers:
            optimizer.step()
        buffers = dict(ours.named_buffers())
        checks += [(buffers[name].clone(), other.clone(), name) for name, other in single.named_buffers()]
    for check in checks:
        _close(*check)
    assert int(ours[1].num_batches_tracked) == 3 * forwards


def ddp_broadcasting_buffers() -> None:
    _ddp(True, 1)


def ddp_not_broadcasting_buffers() -> None:
    _ddp(False, 1)


def ddp_broadcasting_buffers_two_forwards_per_backward() -> None:
    _ddp(True, 2)


def ddp_not_broadcasting_buffers_two_forwards_per_backward() -> None:
    _ddp(False, 2)


def ddp_of_a_plain_layer_starts_each_step_from_the_first_process() -> None:
    torch.manual_seed(0)
    layer = BatchRenorm1d(C, momentum=0.3).double()
    first, last = copy.deepcopy(layer), copy.deepcopy(layer)
    ddp, rank = DistributedDataParallel(layer, forward_sync_buffers=True), dist.get_rank()
    batches = torch.randn(4, dist.get_world_size(), 6, C, dtype=torch.float64)
    outputs = []
    for batch in batches:
        y = ddp(batch[rank])
        y.sum().backward()
        outputs.append(y)
    for batch, output in zip(batches, outputs, strict=True):
        last.load_state_dict(first.state_dict())
        _close(output, last(batch[rank]), "output")
        first(batch[0])
    _close(layer.running_mean, last.running_mean, "running_mean")
    _close(layer.running_var, last.running_var, "running_var")


def ddp_with_a_checkpointed_segment() -> None:
    class Segmented(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)  # type: ignore[no-any-return]

    sizes = _sizes(SIZES["unequal"])
    share, x = _share(sizes), _batches(sizes, 2)
    single, ours = _pair()
    ddp, checks = DistributedDataParallel(Segmented(ours)), []
    for batch in x:
        single.zero_grad()
        ddp.zero_grad()
        expected, actual = single(batch), ddp(batch[share])
        (expected.pow(3).sum() / dist.get_world_size()).backward()
        actual.pow(3).sum().backward()
        for (name, mine), other in zip(ours.named_parameters(), single.parameters(), strict=True):
            checks.append((mine.grad.clone(), other.grad.clone(), f"gradient of {name}"))
    for name, buffer in single.named_buffers():
        checks.append((dict(ours.named_buffers())[name], buffer, name))
    for check in checks:
        _close(*check)


def _sharded(net: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in net:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def _fsdp(segment: bool = False) -> None:
    sizes = _sizes(SIZES["unequal"])
    share, processes = _share(sizes), dist.get_world_size()
    single = _network(BatchRenorm1d(C, **OPTIONS))
    ours = convert_sync(copy.deepcopy(single))
    assert isinstance(ours, nn.Sequential)
    ours = _sharded(ours)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in (single, ours)]
    checks = []
    for x in _batches(sizes, 3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = single(x)
        actual = checkpoint(ours, x[share], use_reentrant=False) if segment else ours(x[share])
        (expected.pow(3).sum() / processes).backward()
        actual.pow(3).sum().backward()
        checks.append((actual, expected[share], "output"))
        for (name, mine), other in zip(ours.named_parameters(), single.parameters(), strict=True):
            checks.append((_whole(mine.grad).clone(), other.grad.clone(), f"gradient of {name}"))
        for optimizer in optimizers:
            optimizer.step()
        for (name, mine), other in zip(ours.named_parameters(), single.named_parameters(), strict=True):
            checks.append((_whole(mine).clone(), other[1].clone(), name))
        buffers = dict(ours.named_buffers())
        checks += [(buffers[name].clone(), other.clone(), name) for name, other in single.named_buffers()]
    for check in checks:
        _close(*check)
    assert (ours[1].r_max, ours[1].d_max) == (1.5, 0.7)


def fsdp() -> None:
    _fsdp()


def fsdp_with_a_checkpointed_segment() -> None:
    _fsdp(segment=True)


def fsdp_from_the_meta_device() -> None:
    with torch.device("meta"):
        ours = nn.Sequential(
            nn.Linear(C, C), SyncBatchRenorm(C, **OPTIONS), nn.Tanh(), nn.Linear(C, 3)
        ).double()
    ours = _sharded(ours)
    ours.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(0.5)
    ours[1].reset_running_stats()
    x = torch.randn(8, C, dtype=torch.float64)
    expected = BatchRenorm1d(C, **OPTIONS).double()
    joined = torch.cat([x] * dist.get_world_size()) @ torch.full((C, C), 0.5, dtype=torch.float64) + 0.5
    expected(joined)
    ours(x).sum().backward()
    _close(ours[1].running_mean, expected.running_mean, "running_mean")
    _close(ours[1].running_var, expected.running_var, "running_var")
    assert (ours[1].r_max, float(ours[1]._r_max)) == (1.5, 1.5)
    assert int(ours[1].rejected_batches) == 0


# ------------------------------------------------------------------------------------------ stop and resume


def _resumes(shard: bool, norm: Callable[..., Any]) -> None:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    sizes = _sizes(SIZES["unequal"])
    batches, share = _batches(sizes, 5), _share(sizes)

    def start(seed: int) -> tuple[Any, Any, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = _network(norm(C, **OPTIONS))
        model: Any = _sharded(net) if shard else DistributedDataParallel(net, forward_sync_buffers=False)
        return net, model, torch.optim.AdamW(model.parameters(), 0.05)

    def train(net: Any, model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            net[1].r_max, net[1].d_max = net[1].r_max + 0.1, net[1].d_max + 0.2  # from where it stands
            optimizer.zero_grad()
            model(batches[step][share]).pow(3).sum().backward()
            optimizer.step()

    net, model, optimizer = start(0)
    train(net, model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    user = {"r_max": net[1].r_max, "d_max": net[1].d_max}
    # A plain layer's statistics differ from process to process: each keeps its own.
    path = folder[0] if norm is SyncBatchRenorm else f"{folder[0]}/{dist.get_rank()}"
    writer = {"no_dist": True} if norm is not SyncBatchRenorm else {}
    warnings.filterwarnings("ignore", ".*assuming the intent is to (save|load) in a single process")
    dcp.save({"model": weights, "optimizer": moments, "user": user}, checkpoint_id=path, **writer)
    train(net, model, optimizer, range(3, 5))

    other, resumed, other_optimizer = start(1)
    weights, moments = get_state_dict(resumed, other_optimizer)
    state = {"model": weights, "optimizer": moments, "user": {"r_max": 0.0, "d_max": 0.0}}
    dcp.load(state, checkpoint_id=path, **writer)
    set_state_dict(
        resumed, other_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    other[1].r_max, other[1].d_max = state["user"]["r_max"], state["user"]["d_max"]
    train(other, resumed, other_optimizer, range(3, 5))
    ours = {name: _whole(value) for name, value in other.state_dict().items()}
    theirs = {name: _whole(value) for name, value in net.state_dict().items()}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])

    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert (other[1].r_max, other[1].d_max) == (net[1].r_max, net[1].d_max)
    assert net[1].r_max > 1.9
    assert int(net[1].num_batches_tracked) == 5


def sharded_run_resumes_bit_for_bit() -> None:
    _resumes(True, SyncBatchRenorm)


def replicated_run_resumes_bit_for_bit() -> None:
    _resumes(False, SyncBatchRenorm)


def replicated_run_of_plain_layers_resumes_bit_for_bit() -> None:
    _resumes(False, BatchRenorm1d)


# ------------------------------------------------------------------------------------------- found by a test


def sync_without_bias() -> None:
    _compare_with_one_process(*_pair(bias=False), SIZES["unequal"])


def sync_without_affine() -> None:
    _compare_with_one_process(*_pair(affine=False), SIZES["unequal"])


def sync_of_one_value_in_each_process_does_not_warn() -> None:
    layer = SyncBatchRenorm(C)
    layer(torch.randn(1, C))  # three values in all: warnings are errors here
