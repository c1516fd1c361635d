"""The layers among what people train with: averaging, parametrizations, copies, autocast, compilation."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from renormify import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm, renormify
from renormify.errors import RenormifyWarning
from renormify.functional import batch_renorm

LAYERS = [BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)


def _network(**options: Any) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(4 * 4 * 4, 2),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 1.3)
    renormed = renormify(model, **{"momentum": 0.1, "r_max": 1.5, "d_max": 0.7, **options})
    assert isinstance(renormed, nn.Sequential)
    return renormed


def _images(rows: int = 5) -> Tensor:
    return torch.randn(rows, 3, 8, 8) * 2 + 1


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[Tensor]:
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
    ours = dict(actual.named_parameters()) | dict(actual.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# -------------------------------------------------------------------------------------- averaging of weights


def test_moving_average_of_weights_and_statistics() -> None:
    model, decay = _network(), 0.6
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    names = ["1.running_mean", "1.running_var", "4.weight"]
    expected = {name: model.state_dict()[name].double() for name in names}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(4):
        _train(model, optimizer, [_images()])
        averaged.update_parameters(model)
        for name in names:
            now = model.state_dict()[name].double()
            expected[name] = now if step == 0 else decay * expected[name] + (1 - decay) * now
    for name in names:
        torch.testing.assert_close(averaged.module.state_dict()[name].double(), expected[name])
    ours: Any = averaged.module
    assert (ours[1].r_max, float(ours[1]._r_max), ours[1].d_max) == (1.5, 1.5, 0.7)
    assert ours[1].rejected_batches.dtype == torch.int64
    x = _images()
    reference = copy.deepcopy(ours).eval()
    assert torch.equal(averaged.eval()(x), reference(x))


def test_average_without_buffers_takes_the_models() -> None:
    model = _network()
    averaged = AveragedModel(model)
    _train(model, torch.optim.SGD(model.parameters(), 0.01), [_images() for _ in range(3)])
    averaged.update_parameters(model)
    ours: Any = averaged.module
    assert torch.equal(ours[1].running_mean, model[1].running_mean)
    assert int(ours[1].num_batches_tracked) == 3


def test_update_bn_of_a_converted_model_does_not_run_it() -> None:
    model = _network()
    before = copy.deepcopy(model)
    update_bn([_images(), _images()], model)
    _assert_same_state(model, before)
    assert model[1].momentum == 0.1


def test_update_bn_beside_a_batch_norm_takes_no_statistics_away() -> None:
    # It runs the model in training, so ours move by their own rule; what it resets is BatchNorm's alone.
    model = nn.Sequential(nn.BatchNorm2d(3), renormify(nn.BatchNorm2d(3), momentum=0.1))
    twin = copy.deepcopy(model)
    batches = [_images(), _images()]
    update_bn(batches, model)
    twin[0].momentum = None
    for x in batches:
        twin(x)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert (model[1].momentum, int(model[1].num_batches_tracked)) == (0.1, 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_filters_by_batch_norms_class_do_not_see_the_layers(layer: Callable[..., nn.Module]) -> None:
    module = layer(4)
    assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert isinstance(module, nn.modules.batchnorm._NormBase)


# ----------------------------------------------------------------------------------------- parametrizations


class Exponential(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()


@pytest.mark.parametrize(
    "neighbour", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_neighbours(neighbour: Callable[[nn.Module], nn.Module]) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), BatchRenorm1d(4, momentum=0.1), nn.Linear(4, 2))
    neighbour(plain[0])
    x = torch.randn(6, 4)
    if neighbour is parametrizations.spectral_norm:
        plain[0].eval()  # its vectors move at each access in training
    weight, bias = plain[0].weight.detach().clone(), plain[0].bias.detach().clone()
    by_hand = copy.deepcopy(plain[1])
    output = plain[1](plain[0](x))
    output.square().sum().backward()
    assert torch.equal(output, by_hand(nn.functional.linear(x, weight, bias)))
    assert torch.equal(plain[1].running_var, by_hand.running_var)
    originals = list(plain[0].parametrizations.weight.parameters())
    assert all(original.grad is not None for original in originals)


@pytest.mark.parametrize("layer", [BatchRenorm1d, SyncBatchRenorm])
def test_parametrized_weight_trains_through_its_original(layer: Callable[..., Any], kernels: str) -> None:
    module, twin = layer(4, dtype=torch.float64), layer(4, dtype=torch.float64)
    scale = torch.rand(4, dtype=torch.float64) + 0.5
    for norm in (module, twin):
        with torch.no_grad():
            norm.weight.copy_(scale)
    parametrize.register_parametrization(module, "weight", Exponential())
    x, upstream = torch.randn(2, 6, 4, dtype=torch.float64)
    outputs = [norm(x) for norm in (module, twin)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        (output * upstream).sum().backward()
    original = module.parametrizations.weight.original
    torch.testing.assert_close(original.grad, twin.weight.grad * scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.bias.grad, twin.bias.grad, rtol=1e-12, atol=1e-12)
    expected = module.eval()(x)
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module(x), expected)
    assert set(module.state_dict()) == set(twin.state_dict())


# ---------------------------------------------------------------------------------- memory kept for backward


def _kept(module: nn.Module, *args: Tensor) -> list[Tensor]:
    """The distinct tensors that a forward keeps for backward, without the module's own."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*args)
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    return [tensor for key, tensor in kept.items() if key not in own]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize(
    ("layer", "batch_norm", "shape"),
    [
        (BatchRenorm1d, nn.BatchNorm1d, (32, 16)),
        (BatchRenorm2d, nn.BatchNorm2d, (4, 16, 9, 9)),
        (BatchRenorm3d, nn.BatchNorm3d, (2, 16, 3, 5, 5)),
        (SyncBatchRenorm, nn.BatchNorm2d, (4, 16, 9, 9)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_device
def test_memory_kept_is_batch_norms_and_vectors(
    layer: Any, batch_norm: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str, kernels: str
) -> None:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    ours, theirs = _kept(layer(16, device=device), x), _kept(batch_norm(16, device=device), x)
    assert [tensor for tensor in ours if tensor.numel() > 16] == [x]
    assert _bytes(ours) - _bytes(theirs) <= 4 * 16 * 4  # four vectors of float32
    masked = _kept(layer(16, device=device), x, torch.ones(shape[0], *shape[2:], device=device).bool())
    assert _bytes(masked) > _bytes(ours), "a mask costs; this shows that the measure sees it"


def test_activations_go_with_the_output() -> None:
    layer, x = BatchRenorm2d(16), torch.randn(4, 16, 9, 9, requires_grad=True)
    y = layer(x * 1)
    held = y.grad_fn.saved_tensors if hasattr(y.grad_fn, "saved_tensors") else ()
    assert any(tensor.shape == x.shape for tensor in held)
    assert all(buffer.grad_fn is None for buffer in layer.buffers())


# ----------------------------------------------------------------------------- accumulation, stopping, copies


def test_each_microbatch_updates_once() -> None:
    model, x = _network(), _images(12)
    by_hand = copy.deepcopy(model[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    for microbatch in x.chunk(3):
        (model(microbatch).square().sum() / 3).backward()
        by_hand(model[0](microbatch))
    optimizer.step()
    assert int(model[1].num_batches_tracked) == 3
    assert torch.equal(model[1].running_mean, by_hand.running_mean)
    assert torch.equal(model[1].running_var, by_hand.running_var)


def test_gradients_of_microbatches_add_up() -> None:
    model, x = _network().double(), _images(12).double()
    expected = []
    twin = copy.deepcopy(model)
    for microbatch in x.chunk(3):
        loss = twin(microbatch).square().sum()
        expected.append(torch.autograd.grad(loss, list(twin.parameters())))
    for microbatch in x.chunk(3):
        model(microbatch).square().sum().backward()
    for parameter, *parts in zip(model.parameters(), *expected, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_in_the_middle_of_training_continue_bit_for_bit(how: Callable[[Any], Any]) -> None:
    model = _network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    batches = [_images() for _ in range(6)]
    _train(model, optimizer, batches[:3])
    model[1].r_max, model[4].d_max = 2.5, 0.3
    twin, twin_optimizer = how((model, optimizer))
    assert torch.equal(
        torch.stack(_train(model, optimizer, batches[3:])),
        torch.stack(_train(twin, twin_optimizer, batches[3:])),
    )
    _assert_same_state(twin, model)
    assert (twin[1].r_max, twin[4].d_max) == (2.5, 0.3)
    assert twin[1].converted_from == model[1].converted_from


def test_a_copy_carries_the_rejected_batches_and_whether_it_warned() -> None:
    layer = BatchRenorm1d(4)
    layer(torch.full((5, 4), torch.nan))
    silent = pickle.loads(pickle.dumps(layer))
    with pytest.warns(RenormifyWarning, match="in 1 batch"):
        layer.eval()
    again = copy.deepcopy(layer).train()
    again.eval()
    with pytest.warns(RenormifyWarning, match="in 1 batch"):
        silent.eval()


# --------------------------------------------------------------------------------------- autocast and compile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_device
def test_a_network_trains_under_autocast(dtype: torch.dtype, device: str, kernels: str) -> None:
    model = _network().to(device)
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda _, args, y: seen.extend([args[0].dtype, y.dtype]))
    twin, reference = copy.deepcopy(model), []
    twin[1]._forward_hooks.clear()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(3):
        x = _images().to(device)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            output = model(x)
            loss = output.float().square().mean()
        loss.backward()
        with torch.no_grad():
            reference.append((output.float(), twin(x)))
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
                mine.copy_(other)
    assert set(seen) == {dtype}
    for actual, expected in reference:
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    for layer in (model[1], model[4]):
        assert layer.running_mean.dtype == layer.running_var.dtype == layer.weight.grad.dtype == torch.float32
        assert int(layer.rejected_batches) == 0


def test_a_compiled_network_with_all_that_moves() -> None:
    # Batch size, limits and NaN batches, at once, in one graph; then the warning, once, where the host looks.
    torch._dynamo.reset()
    model = _network()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    compiled(_images(5)).sum().backward()
    eager(_images(5)).sum()
    once = counter.frame_count
    model.load_state_dict(eager.state_dict())
    for step, rows in enumerate((6, 7, 9, 11)):
        for each in (model, eager):
            each.zero_grad()
            for layer in (each[1], each[4]):
                layer.r_max, layer.d_max = 1.0 + step, 0.5 * step
        x = _images(rows)
        if step == 2:
            x[0, 0, 0, 0] = torch.nan
        outputs = [forward(x) for forward in (compiled, eager)]
        if step != 2:
            for output in outputs:
                output.square().sum().backward()
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model[0].weight.grad, eager[0].weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model[4].running_var, eager[4].running_var)
    assert counter.frame_count == once
    assert [int(layer.rejected_batches) for layer in (model[1], model[4])] == [1, 1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()
        model.train()
        model.eval()
    messages = [str(w.message) for w in caught if issubclass(w.category, RenormifyWarning)]
    assert len(messages) == 2  # one for each layer
    assert all("inf or NaN in 1 batches" in message for message in messages)


def test_a_compiled_layer_takes_a_mask() -> None:
    torch._dynamo.reset()
    layer = BatchRenorm1d(4, momentum=0.2, dtype=torch.float64)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 6, 7):
        x, mask = torch.randn(rows, 4, 9, dtype=torch.float64), torch.rand(rows, 9) < 0.6
        results = []
        for forward in (compiled, eager):
            leaf = x.clone().requires_grad_()
            y = forward(leaf, mask)
            y.pow(3).sum().backward()
            results.append([y, leaf.grad])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_var, eager.running_var, rtol=1e-12, atol=1e-12)


def test_traced_by_fx_and_compiled_after() -> None:
    torch._dynamo.reset()
    model = _network()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    compiled = torch.compile(copy.deepcopy(traced), backend="aot_eager", fullgraph=True)
    x = _images()
    outputs = [each(x) for each in (model, traced, compiled)]
    assert torch.equal(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook", [functools.partial(lambda _, tensor: tensor, 1), torch.clone])
def test_hooks_on_saved_tensors_may_be_any_callable(hook: Any) -> None:
    layer, x = BatchRenorm1d(3), torch.randn(8, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor):
        layer(x).sum().backward()
    assert x.grad is not None


def test_make_fx_records_a_training_step() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_renorm(x, mean, var, training=True)

    x = torch.randn(8, 3)
    recorded = make_fx(step)(x, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(
        recorded(x, torch.zeros(3), torch.ones(3)), step(x, torch.zeros(3), torch.ones(3))
    )


def test_fake_tensors_train_and_evaluate() -> None:
    with FakeTensorMode():
        layer = BatchRenorm1d(3)
        layer(torch.randn(8, 3)).sum().backward()
        assert layer.eval()(torch.randn(8, 3)).shape == (8, 3)


def test_default_device_does_not_matter_to_a_large_input() -> None:
    x, mean, var = torch.randn(32, 64, 16, 16), torch.zeros(64), torch.ones(64)
    with torch.device("meta"):
        output = batch_renorm(x, mean, var, training=True)
    assert output.device.type == "cpu"


@pytest.mark.parametrize("momentum", [1.0, None])
@pytest.mark.parametrize("old", [1e6, 1.0, 1e-9])
def test_first_batch_replaces_the_statistics_to_the_last_digits(momentum: float | None, old: float) -> None:
    layer = BatchRenorm1d(3, momentum=momentum)
    layer.running_var.fill_(old)
    x = 1e-2 * torch.randn(16, 3)
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0, correction=0), rtol=1e-5, atol=0)
