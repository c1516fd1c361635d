"""What a conversion is held to: evaluation bit for bit, the paper's step, BatchNorm at its limit, and back.

At ``r_max=1, d_max=0`` Batch Renorm is BatchNorm, so torch's own training of the original is the oracle of a
whole model's: outputs, gradients, statistics and what it draws at random. With the limits open the statistics
are those of :mod:`oracle`, which is written from the paper.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from renormify import Conversion, convert, revert
from renormify.layers import is_batch_renorm

C = 3


def lived_in(model: nn.Module) -> nn.Module:
    """Statistics and affine as after training; the defaults hide errors."""
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(getattr(module, "running_mean", None), Tensor):
                continue
            if nn.parameter.is_lazy(module.running_mean):
                continue
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3)
            for name, (mean, std) in {"weight": (1, 0.3), "bias": (0, 0.3)}.items():
                if isinstance(getattr(module, name, None), Tensor):
                    getattr(module, name).normal_(mean, std)
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked.fill_(11)
    return model


def image(*shape: int) -> Tensor:
    """A batch whose channels lie apart from the statistics of :func:`lived_in`."""
    return torch.randn(shape or (4, C, 8, 8)) * 1.5 + 0.5


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, whatever it is made of."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key


def assert_same_output(ours: Any, theirs: Any) -> None:
    """Bit for bit, where a NaN is itself."""
    a, b = tensors(ours), tensors(theirs)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def in_double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def _steps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int) -> list[Tensor]:
    """Outputs and gradients of some training steps, each on another batch, always drawn alike."""
    seen = []
    for step in range(steps):
        factor = 1 + step / 4
        moved = tree_map_only(Tensor, lambda t, f=factor: t * f if t.is_floating_point() else t, args)
        torch.manual_seed(step)
        outputs = [t for t in tensors(model(*moved, **kwargs)) if t.is_floating_point()]
        # Not the mean square: after a norm that is a constant.
        loss = sum((t.sin() * torch.linspace(1, 2, max(1, t.numel()), dtype=t.dtype).view(t.shape)).sum()
                   for t in outputs)  # fmt: skip
        model.zero_grad()
        if any(t.requires_grad for t in outputs):
            loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen += [t.detach() for t in outputs] + gradients
    return seen


def assert_batch_norm_at_the_limit(
    model: nn.Module, *args: Any, steps: int = 2, call: dict[str, Any] | None = None, **options: Any
) -> None:
    """Trains as the original does, to the rounding of float64, and in evaluation after that likewise.

    ``model`` is as it should be trained: its training flags are taken as they are.
    """
    original, args = in_double(model), in_double(args)
    options = {"momentum": "keep", "stat": "var", **options}
    converted = convert(original, r_max=1.0, d_max=0.0, **options).model
    flags = {name: module.training for name, module in converted.named_modules()}
    assert all(flags[name] == module.training for name, module in original.named_modules())
    ours = _steps(converted, args, call or {}, steps)
    theirs = _steps(original, args, call or {}, steps)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        # A weight before a norm has a gradient of nothing but rounding: the scale is that of the sums.
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    state = original.state_dict()
    assert list(converted.state_dict()) == list(state)
    for key, value in converted.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-9, msg=key)


def assert_moves_by_batch_renorm(
    model: nn.Module, *args: Any, alpha: float = 0.01, call: dict[str, Any] | None = None
) -> int:
    """Each layer that a training step uses takes the paper's step of mu and sigma; how many there were."""
    inputs: dict[nn.Module, list[Tensor]] = {}
    before = {}
    hooks = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(layer, []).append(args[0].detach().double().clone())

    for layer in model.modules():
        if is_batch_renorm(layer):
            before[layer] = (layer.running_mean.double().clone(), layer.running_var.double().clone())
            hooks.append(layer.register_forward_pre_hook(keep))
    assert before
    sum(t.sum() for t in tensors(model(*args, **(call or {}))) if t.is_floating_point()).backward()
    for hook in hooks:
        hook.remove()
    for layer, batches in inputs.items():
        if not layer.training:
            continue
        mean, var = before[layer]
        oracle = Oracle(mean.numpy(), (var + layer.eps).sqrt().numpy(), alpha, layer.eps)
        for batch in batches:
            oracle.train(batch.numpy(), np.zeros(batch.shape))
        moved = (layer.running_var.double() + layer.eps).sqrt()
        torch.testing.assert_close(moved, torch.from_numpy(oracle.sigma), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            layer.running_mean.double(), torch.from_numpy(oracle.mu), rtol=1e-5, atol=1e-6
        )
        assert not torch.equal(layer.running_var.double(), var) or max(map(len, batches)) < 2
    return sum(layer.training for layer in inputs)


def assert_reverts_to(model: nn.Module, converted: nn.Module, inplace: bool = False) -> nn.Module:
    """Classes, attributes, parameters, buffers, their order and their bits."""
    back = revert(converted, inplace=inplace)
    assert_same_state(back, model)
    for (path, ours), (name, original) in zip(back.named_modules(), model.named_modules(), strict=True):
        assert path == name
        assert type(ours).__name__ == type(original).__name__, path
        if not nn.utils.parametrize.is_parametrized(original):
            assert type(ours) is type(original), path
        assert set(vars(ours)) == set(vars(original)), path
        assert list(ours._parameters) == list(original._parameters), path
        assert list(ours._buffers) == list(original._buffers), path
        assert ours._non_persistent_buffers_set == original._non_persistent_buffers_set
        assert getattr(ours, "momentum", None) == getattr(original, "momentum", None)
        assert ours.training == original.training
    return back


def assert_converts(
    model: nn.Module, *args: Any, call: dict[str, Any] | None = None, **options: Any
) -> Conversion:
    """The whole of it for a model, of which the conversion is returned."""
    call = call or {}
    flags = [module.training for module in model.modules()]
    conversion = convert(model, **options)
    converted = conversion.model
    assert type(converted).__name__.replace("Renorm", "Norm") == type(model).__name__
    assert_same_state(converted, model)
    assert_reverts_to(model, converted)
    with torch.no_grad():
        expected = model.eval()(*args, **call)
        assert_same_output(converted.eval()(*args, **call), expected)
        assert_same_output(revert(converted).eval()(*args, **call), expected)
    for module, flag in zip(model.modules(), flags, strict=True):
        module.training = flag
    for module, flag in zip(converted.modules(), flags, strict=True):
        module.training = flag
    assert_batch_norm_at_the_limit(model, *args, call=call, **options)
    return conversion
