"""Norm classes that derive from torch's: what is theirs stays theirs, and what normalises is Batch Renorm."""

from __future__ import annotations

import abc
import copy
import io
import pickle
import warnings
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from norms import (
    C,
    assert_batch_norm_at_the_limit,
    assert_converts,
    assert_moves_by_batch_renorm,
    assert_reverts_to,
    assert_same_output,
    assert_same_state,
    image,
    lived_in,
)
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.batchnorm import _BatchNorm

from renormify import BatchRenorm2d, SyncBatchRenorm, convert, convert_sync, renormify, revert
from renormify.layers import is_batch_renorm


class Gained(nn.BatchNorm2d):
    """Leaves the normalising to super()."""

    gain = 1.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain


class Calls(nn.BatchNorm2d):
    """Calls the function, with a slope of its own behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.slope = 0.1

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, factor, self.eps
        )
        return F.leaky_relu(x, self.slope)


class CountsByAssignment(nn.BatchNorm2d):
    """As the code of older releases of torch did, which many copied."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked = self.num_batches_tracked + 1
        return F.relu(
            F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                self.momentum, self.eps,
            )
        )  # fmt: skip


class CountsInPlace(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return F.relu(
            F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                self.momentum, self.eps,
            )
        )  # fmt: skip


class Unbound(nn.BatchNorm2d):
    """Names the class it means."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(nn.BatchNorm2d.forward(self, input))


class UnboundBase(nn.BatchNorm2d):
    """Names the private base."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(_BatchNorm.forward(self, input))


class SuperOfNamed(nn.BatchNorm2d):
    """The old way to write it."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super(SuperOfNamed, self).forward(input))  # noqa: UP008


class Cast(nn.BatchNorm2d):
    """Computes in another precision and gives back the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class Scaled(nn.BatchNorm2d):
    """An optional argument."""

    def forward(self, input: Tensor, scale: Tensor | float | None = None, *, shift: float = 0.0) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip
        return (x if scale is None else x * scale) + shift


class Tracked(nn.BatchNorm2d):
    """Methods, a property, a class attribute, a slot, an overridden train()."""

    __slots__ = ("note",)
    family = "ours"

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.switches = 0

    @property
    def spread(self) -> Tensor:
        return self.running_var.sqrt()

    @staticmethod
    def version() -> int:
        return 3

    def shifted(self) -> Tensor:
        return self.bias + 1

    def train(self, mode: bool = True) -> Tracked:
        super().train(mode)
        self.switches += 1
        return self

    def extra_repr(self) -> str:
        return "tracked"


class AnyDimensions(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3, 4, 5):
            raise ValueError("expected two to five dimensions")


class GrandChild(Calls):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Either(nn.BatchNorm2d):
    """Calls the function for something else, and leaves the normalising to super()."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


class Inert(nn.BatchNorm2d):
    """Nothing of its own."""


class Naming:
    def name(self) -> str:
        return type(self).__name__


class WithMixin(Naming, nn.BatchNorm2d):
    pass


class OwnArithmetic(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        mean = input.mean((0, 2, 3), keepdim=True) if self.training else self.running_mean.view(1, -1, 1, 1)
        return input - mean


class Looks(nn.BatchNorm2d):
    """Python that looks at the numbers."""

    def forward(self, input: Tensor) -> Tensor:
        if input.sum() > 0:
            return F.batch_norm(
                input, self.running_mean, self.running_var, None, None, self.training, self.momentum
            )
        return input


FORMS: dict[str, type[nn.Module]] = {
    form.__name__: form
    for form in (
        Gained, Calls, CountsByAssignment, CountsInPlace, Unbound, UnboundBase, SuperOfNamed, Scaled, Tracked,
        AnyDimensions, GrandChild, Either, Inert, WithMixin, BatchNormAct2d,
    )
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_class_of_someone_else_converts_and_comes_back(form: str) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(C, C, 1), FORMS[form](C)))
    conversion = assert_converts(model, image())
    assert conversion.report.converted == ("1",)
    assert conversion.report.sites[0].kind == form
    layer = conversion.model[1]
    assert is_batch_renorm(layer)
    assert isinstance(layer, FORMS[form])
    assert assert_moves_by_batch_renorm(conversion.model.train(), image()) == 1
    assert int(layer.num_batches_tracked) == 12


@pytest.mark.parametrize("form", FORMS)
def test_training_of_a_class_is_the_papers(form: str) -> None:
    # What the class does behind the norm it does to Batch Renorm's output too.
    model = lived_in(FORMS[form](C))
    x = image()
    plain = BatchRenorm2d(C, eps=model.eps)
    plain.load_state_dict(model.state_dict())
    z = plain(x)
    behind = {
        "Gained": lambda z: 1.5 * z,
        "Calls": lambda z: F.leaky_relu(z, 0.1),
        "GrandChild": lambda z: F.leaky_relu(z, 0.1) + 1,
        "Scaled": lambda z: z,
    }
    same = ("Either", "Tracked", "AnyDimensions", "Inert", "WithMixin")
    expected = z if form in same else behind.get(form, torch.relu)(z)
    torch.testing.assert_close(renormify(model)(x), expected)


def test_a_name_of_its_own() -> None:
    layer = renormify(nn.Sequential(BatchNormAct2d(C)))[0]
    assert type(layer).__name__ == "BatchRenormAct2d"
    assert isinstance(layer, BatchNormAct2d)
    assert not isinstance(layer, nn.BatchNorm2d)  # which converters of others would replace


def test_everything_of_a_class_stays() -> None:
    model = nn.Sequential(Tracked(C))
    model[0].note = "kept"
    converted = renormify(model, inplace=True)
    layer = converted[0]
    assert (layer.note, layer.family, layer.version()) == ("kept", "ours", 3)
    assert torch.equal(layer.spread, layer.running_var.sqrt())
    assert torch.equal(layer.shifted(), layer.bias + 1)
    switches = layer.switches
    converted.eval()
    assert (layer.switches, layer.training) == (switches + 1, False)
    assert "tracked" in repr(layer)


@pytest.mark.parametrize("training", [True, False])
def test_optional_arguments_keep_their_meaning(training: bool) -> None:
    model = lived_in(Scaled(C)).train(training).double()
    x = image().double()
    converted = convert(model, r_max=1.0, d_max=0.0, momentum="keep", stat="var").model
    for args, kwargs in [
        ((), {}),
        ((2.0,), {}),
        ((torch.full((C, 1, 1), 3.0).double(),), {}),
        ((), {"scale": 0.5, "shift": 1.0}),
        ((), {"shift": 2.0}),
        ((None,), {}),
        ((True,), {}),
        ((1,), {"shift": 1}),
    ]:
        torch.testing.assert_close(converted(x, *args, **kwargs), model(x, *args, **kwargs))
        torch.testing.assert_close(converted(input=x, **kwargs), model(input=x, **kwargs))
    assert_same_state_closely(converted, model)


def assert_same_state_closely(ours: nn.Module, theirs: nn.Module) -> None:
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key])


def test_attributes_changed_after_the_conversion_count() -> None:
    model = nn.Sequential(Calls(C))
    converted = renormify(model).train()
    x = image()
    converted(x)
    layer = converted[0]
    layer.slope = 0.7
    twin = BatchRenorm2d(C, eps=1e-3)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(converted(x), F.leaky_relu(twin(x), 0.7))
    layer.momentum, layer.eps, twin.momentum, twin.eps = 0.5, 1e-1, 0.5, 1e-1
    torch.testing.assert_close(converted(x), F.leaky_relu(twin(x), 0.7))
    assert_same_state(layer, twin)
    layer.r_max = twin.r_max = 1.01
    torch.testing.assert_close(converted(3 * x), F.leaky_relu(twin(3 * x), 0.7))
    # in evaluation the class's own forward runs
    torch.testing.assert_close(converted.eval()(x), F.leaky_relu(twin.eval()(x), 0.7))


def test_activation_and_drop_of_timm_may_be_exchanged_and_switched() -> None:
    model = BatchNormAct2d(C, drop_layer=nn.Dropout)
    converted = renormify(nn.Sequential(model))
    layer, x = converted[0], image()
    layer.act = nn.Sigmoid()
    layer.drop.p = 0.5
    dropped = (converted.train()(x) == 0.5).float().mean()  # the sigmoid of what dropout takes
    assert 0.3 < dropped < 0.7
    assert not (converted.eval()(x) == 0.5).any()
    layer.train()
    layer.drop.eval()
    assert not (converted(x) == 0.5).any()
    layer.drop.train()
    assert (converted(x) == 0.5).any()
    layer.drop = nn.Identity()
    assert not (converted(x) == 0.5).any()
    assert converted(x).min() > 0


@pytest.mark.parametrize(
    ("form", "reason"), [(OwnArithmetic, "does not call batch_norm"), (Looks, "cannot be traced")]
)
def test_class_that_cannot_be_taken_over_is_refused_by_name(form: type[nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), form(C))
    conversion = convert(model)
    [_, site] = conversion.report.sites
    assert (site.action, site.name, site.kind) == ("skipped", "1", form.__name__)
    assert f"{form.__name__} has a forward of its own" in site.reason
    assert reason in site.reason
    assert "register_rule" in site.reason
    assert type(conversion.model[1]) is form
    x = image()
    assert_same_output(conversion.model[1](x), model[1](x))


class Keeps(nn.BatchNorm2d):
    """Keeps what it computed, in attributes and in lists."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.calls = 0
        self.log: list[float] = []

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(1.0)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip


def test_forward_that_keeps_what_it_computes_goes_on_doing_so() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), Keeps(C))
    conversion = convert(model)
    assert conversion.report.converted == ("0", "1")
    converted = conversion.model
    converted.train()(image())
    converted(image())
    assert (converted[1].calls, converted[1].log) == (2, [1.0, 1.0])
    assert (model[1].calls, model[1].log) == (0, [])


# ------------------------------------------------------------------------------------------- other ways


def test_any_dimensions_stay_any() -> None:
    layer = renormify(nn.Sequential(AnyDimensions(C)))[0]
    for shape in ((4, C), (4, C, 5), (4, C, 2, 2), (4, C, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="two to five"):
        layer(torch.randn(4))


def _parametrized(norm: nn.Module) -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


@pytest.mark.parametrize("form", [nn.BatchNorm2d, Calls, Gained, BatchNormAct2d])
def test_parametrized_layer_converts_and_comes_back(form: type[nn.Module]) -> None:
    model = nn.Sequential(_parametrized(lived_in(form(C))))
    conversion = convert(model)
    converted = conversion.model
    assert conversion.report.converted == ("0",)
    assert nn.utils.parametrize.is_parametrized(converted[0], "weight")
    assert torch.equal(converted[0].weight, model[0].weight)
    x = image()
    assert torch.equal(converted.eval()(x), model.eval()(x))
    assert_batch_norm_at_the_limit(model.train(), x)
    assert_moves_by_batch_renorm(converted.train(), x)
    back = revert(converted)
    assert nn.utils.parametrize.is_parametrized(back[0], "weight")
    nn.utils.parametrize.remove_parametrizations(back[0], "weight")
    assert type(back[0]) is form
    nn.utils.parametrize.remove_parametrizations(converted[0], "weight")
    assert is_batch_renorm(converted[0])
    assert type(revert(converted)[0]) is form


def test_spectral_norm_is_kept() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 1)), nn.BatchNorm2d(C))
    assert_converts(model, image())


@pytest.mark.parametrize(
    ("lazy", "kind", "shape"),
    [
        (nn.LazyBatchNorm1d, nn.BatchNorm1d, (4, C)),
        (nn.LazyBatchNorm2d, nn.BatchNorm2d, (4, C, 2, 2)),
        (nn.LazyBatchNorm3d, nn.BatchNorm3d, (4, C, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_lazy_layer_converts_before_its_first_call(
    lazy: type[nn.Module], kind: type[nn.Module], shape: tuple[int, ...], inplace: bool
) -> None:
    model = nn.Sequential(lazy(eps=1e-3), nn.ReLU())
    conversion = convert(model, inplace=inplace, r_max=2.0)
    assert conversion.report.converted == ("0",)
    assert conversion.report.sites[0].channels is None
    back = revert(conversion.model)
    assert type(back[0]) is lazy
    assert type(back.train()(torch.randn(shape))) is Tensor
    assert type(back[0]) is kind
    x = image(*shape)
    conversion.model.train()(x)
    layer = conversion.model[0]
    assert type(layer).__name__ == kind.__name__.replace("Norm", "Renorm")
    assert (layer.r_max, layer.eps, layer.num_features) == (2.0, 1e-3, C)
    assert_moves_by_batch_renorm(conversion.model, x)
    assert type(revert(conversion.model)[0]) is kind


def test_lazy_layer_after_its_first_call() -> None:
    model = nn.Sequential(nn.LazyConv2d(C, 1), nn.LazyBatchNorm2d())
    model(image())
    assert_converts(model, image())


def test_synchronised_class_of_someone_else() -> None:
    class Own(nn.SyncBatchNorm):
        def forward(self, input: Tensor) -> Tensor:
            return torch.relu(super().forward(input))

    model = lived_in(nn.Sequential(Own(C))).eval()
    converted = renormify(model)
    x = image()
    assert torch.equal(converted(x), model(x))
    assert type(revert(converted)[0]) is Own


# ----------------------------------------------------------------------------------------------- frozen


class Detectron(nn.Module):
    """The FrozenBatchNorm2d of detectron2: two ways of the same affine."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


FrozenBatchNorm2d = type("FrozenBatchNorm2d", (Detectron,), {"__module__": __name__})


class TransformersFrozenBatchNorm2d(nn.Module):
    """As in the DETR models of transformers, with an eps that is no attribute."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


FROZEN: dict[str, Any] = {
    "torchvision": torchvision.ops.FrozenBatchNorm2d,
    "timm": timm.layers.FrozenBatchNormAct2d,
    "detectron2": FrozenBatchNorm2d,
    "transformers": TransformersFrozenBatchNorm2d,
}


def _frozen(name: str) -> nn.Sequential:
    return lived_in(nn.Sequential(nn.Conv2d(C, C, 1), FROZEN[name](C), nn.Conv2d(C, 2, 1)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_norm_is_skipped_unless_asked_for(name: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), _frozen(name))
    conversion = convert(model)
    assert conversion.report.skipped == ("1.1",)
    assert conversion.report.sites[1].reason.startswith("frozen: ")
    assert type(conversion.model[1][1]) is type(model[1][1])
    assert convert(model, include_frozen=True).report.converted == ("0", "1.1")


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thawed_norm_follows_its_batches(name: str, dtype: torch.dtype) -> None:
    model = _frozen(name).to(dtype)
    x = image().to(dtype)
    conversion = convert(model, include_frozen=True)
    converted = conversion.model
    assert_same_state(converted, model)
    with torch.no_grad():
        assert torch.equal(converted.eval()(x), model.eval()(x))
    assert torch.equal(converted(x), model(x))
    back = assert_reverts_to(model, converted)
    assert torch.equal(back(x), model(x))
    layer = converted[1]
    assert isinstance(layer, FROZEN[name])
    assert isinstance(layer.weight, nn.Parameter)
    assert {"1.weight", "1.bias"} <= {name for name, _ in converted.named_parameters()}

    twin = BatchRenorm2d(C, eps=getattr(model[1], "eps", 1e-5), dtype=dtype)
    twin.load_state_dict(layer.state_dict(), strict=False)
    twin.num_batches_tracked = None
    reference = nn.Sequential(model[0], twin, *([nn.ReLU()] if name == "timm" else []), model[2]).train()
    output, expected = converted.train()(x), reference(x)
    torch.testing.assert_close(output, expected)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    torch.testing.assert_close(layer.running_var, twin.running_var)
    assert_moves_by_batch_renorm(converted, x)
    assert getattr(layer, "num_batches_tracked", None) is None


@pytest.mark.parametrize("name", FROZEN)
def test_thawed_norm_reverts_with_what_it_has_learnt(name: str) -> None:
    converted = renormify(_frozen(name), include_frozen=True)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    for _ in range(3):
        converted.train()(image()).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    back = revert(converted)
    assert_same_state(back, converted)
    assert type(back[1]) is FROZEN[name]
    assert [name for name, _ in back.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = image()
    with torch.no_grad():
        assert torch.equal(back.eval()(x), converted.eval()(x))


@pytest.mark.parametrize("name", FROZEN)
def test_thawed_norm_is_copied_and_pickled(name: str) -> None:
    converted = renormify(_frozen(name), include_frozen=True).eval()
    x = image()
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), converted(x))
        assert type(twin[1]) is type(converted[1])
        assert type(revert(twin)[1]) is FROZEN[name]
        assert_moves_by_batch_renorm(twin.train(), x)


@pytest.mark.parametrize(("momentum", "alpha"), [("keep", 0.01), (0.3, 0.3)])
def test_thawed_norm_has_no_momentum_to_keep(momentum: Any, alpha: float) -> None:
    converted = renormify(_frozen("torchvision"), include_frozen=True, momentum=momentum)
    assert_moves_by_batch_renorm(converted.train(), image(), alpha=alpha)


# ------------------------------------------------------------------------------------ life after conversion

DERIVED = {**FORMS, "Frozen": torchvision.ops.FrozenBatchNorm2d}


@pytest.mark.parametrize("form", DERIVED)
def test_copies_and_files_hold_the_whole_layer(form: str) -> None:
    converted = renormify(lived_in(nn.Sequential(DERIVED[form](C))), include_frozen=True, r_max=2.0)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    x = image()
    before = [
        copy.deepcopy(converted),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(converted)),
    ]
    expected = converted.eval()(x), converted.train()(x)
    for twin in before:
        assert type(twin[0]) is type(converted[0])
        assert twin[0].r_max == 2.0
        assert torch.equal(twin.eval()(x), expected[0])
        assert torch.equal(twin.train()(x), expected[1])
        assert_same_state(twin, converted)
        assert type(revert(twin)[0]) is DERIVED[form]
        assert type(revert(copy.deepcopy(twin))[0]) is DERIVED[form]


@pytest.mark.parametrize("form", ["Calls", "Gained", "BatchNormAct2d", "Frozen"])
def test_moves_and_casts(form: str) -> None:
    converted = renormify(lived_in(nn.Sequential(DERIVED[form](C))), include_frozen=True, r_max=2.0)
    layer = converted[0]
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        converted.to(dtype)
        assert converted.train()(image().to(dtype)).dtype == dtype
        assert converted.eval()(image().to(dtype)).dtype == dtype
        assert layer.running_mean.dtype == (
            torch.float64 if dtype == torch.float64 else layer.running_mean.dtype
        )
        assert layer.running_mean.dtype.itemsize >= 4
        assert layer._r_max.dtype == torch.float32
        assert layer.r_max == 2.0
    real = converted.float().to("meta").to_empty(device="cpu")
    real.load_state_dict(lived_in(nn.Sequential(DERIVED[form](C))).state_dict())
    assert (real[0].r_max, float(real[0]._r_max)) == (2.0, 2.0)
    assert_moves_by_batch_renorm(real.train(), image())


@pytest.mark.parametrize("form", DERIVED)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(form: str, training: bool) -> None:
    torch._dynamo.reset()
    converted = renormify(lived_in(nn.Sequential(DERIVED[form](C))), include_frozen=True).train(training)
    eager = copy.deepcopy(converted)
    counter = CompileCounter()
    compiled = torch.compile(converted, backend=counter, fullgraph=True)
    for limit in (3.0, 1.01, 2.0):
        converted[0].r_max = eager[0].r_max = limit
        x = 2 * image()
        torch.testing.assert_close(compiled(x), eager(x))
    for a, b in zip(converted.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["Calls", "Scaled", "BatchNormAct2d"])
def test_compiles_after_a_file_and_after_a_change(form: str) -> None:
    torch._dynamo.reset()
    converted = pickle.loads(pickle.dumps(renormify(lived_in(nn.Sequential(FORMS[form](C)))))).train()
    eager = copy.deepcopy(converted)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    x = image()
    torch.testing.assert_close(compiled(x), eager(x))
    if form == "Calls":
        converted[0].slope = eager[0].slope = 0.9
        torch.testing.assert_close(compiled(x), eager(x))
    if form == "Scaled":
        layer = torch.compile(converted[0], backend="eager", fullgraph=True)
        torch.testing.assert_close(layer(x, shift=2.0), eager[0](x, shift=2.0))


@pytest.mark.parametrize("form", DERIVED)
@pytest.mark.parametrize("training", [True, False])
def test_exports_and_traces(form: str, training: bool) -> None:
    converted = renormify(lived_in(nn.Sequential(DERIVED[form](C))), include_frozen=True).train(training)
    eager, x = copy.deepcopy(converted), image()
    expected = eager(x)
    program = torch.export.export(copy.deepcopy(converted), (x,))
    torch.testing.assert_close(program.module()(x), expected)
    graph_module = torch.fx.symbolic_trace(copy.deepcopy(converted))
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["0"]
    torch.testing.assert_close(graph_module(x), expected)
    if not training:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that tracing is going away
            traced = torch.jit.trace(copy.deepcopy(converted), x)
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("form", DERIVED)
def test_converters_of_others_leave_it_whole(form: str) -> None:
    converted = renormify(lived_in(nn.Sequential(DERIVED[form](C))), include_frozen=True)
    layer = converted[0]
    assert nn.SyncBatchNorm.convert_sync_batchnorm(converted)[0] is layer
    assert timm.layers.convert_sync_batchnorm(converted)[0] is layer


@pytest.mark.parametrize("form", DERIVED)
def test_synchronised_across_processes(form: str) -> None:
    model = lived_in(nn.Sequential(DERIVED[form](C)))
    converted = renormify(model, include_frozen=True)
    alone, x = copy.deepcopy(converted), image()
    assert convert_sync(converted) is converted
    layer = converted[0]
    assert isinstance(layer, DERIVED[form])
    assert layer.process_group is None
    assert torch.equal(converted.eval()(x), model.eval()(x))
    torch.testing.assert_close(converted.train()(x), alone.train()(x))
    assert_same_state(converted, alone)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert type(copied[0]) is type(layer)
    assert type(convert_sync(copied)[0]) is type(layer)
    back = revert(copied)
    assert type(back[0]) is DERIVED[form]
    assert vars(back[0]).keys() == vars(model[0]).keys()


def test_averaged_model() -> None:
    converted = renormify(lived_in(nn.Sequential(BatchNormAct2d(C), Calls(C))))
    averaged = torch.optim.swa_utils.AveragedModel(converted, use_buffers=True)
    for _ in range(3):
        converted.train()(image())
        averaged.update_parameters(converted)
    assert type(averaged.module[0]) is type(converted[0])
    x = image()
    assert averaged.eval()(x).shape == x.shape
    assert not torch.equal(averaged.module[0].running_mean, converted[0].running_mean)
    assert is_batch_renorm(averaged.module[1])


def test_synchronised_plain_layer_is_not_of_a_new_class() -> None:
    assert type(convert_sync(renormify(nn.Sequential(nn.BatchNorm2d(C))))[0]) is SyncBatchRenorm


# --------------------------------------------------------------------------- classes that mind their children


class Abstract(nn.BatchNorm2d, abc.ABC):
    pass


class AbstractCalls(Calls, abc.ABC):
    pass


class Announcing(nn.BatchNorm2d):
    """Wants to know of classes derived from it, and wants a word from each."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, word: str) -> None:
        Announcing.known.append(cls)

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip


class Announced(Announcing, word="mine"):
    pass


@pytest.mark.parametrize("form", [Abstract, AbstractCalls, Announced])
def test_class_of_another_metaclass_or_that_counts_its_children(form: type[nn.Module]) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(C, C, 1), form(C)))
    conversion = assert_converts(model, image())
    assert isinstance(conversion.model[1], form)
    assert_same_state(pickle.loads(pickle.dumps(conversion.model)), conversion.model)
    assert Announcing.known == [Announced]


class Final(type):
    """Of which nothing may be derived."""

    def __new__(mcs, name: str, bases: tuple[type, ...], own: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError(f"{bases[0].__name__} is final")
        return super().__new__(mcs, name, bases, own)


class Childless(nn.BatchNorm2d, metaclass=Final):
    pass


class Normalises(nn.BatchNorm2d):
    """Has a method whose name a layer of ours needs."""

    def renormalise(self, input: Tensor) -> Tensor:
        return input / 2

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.renormalise(input))


class Named(nn.BatchNorm2d):
    """Has an attribute of such a name."""

    def __init__(self, channels: int, name: str) -> None:
        super().__init__(channels)
        setattr(self, name, 3)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Childless(C), "no class can be derived from Childless"),
        (Normalises(C), "has an attribute renormalise of its own; rename that"),
        *(
            (Named(C, name), f"has an attribute {name} of its own; rename that")
            for name in (
                "original",
                "base",
                "limits",
                "renormalise",
                "calls_itself",
                "_limits",
                "stat",
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_in_the_way_of_a_layer_is_named(layer: nn.Module, reason: str) -> None:
    model = lived_in(nn.Sequential(layer, nn.BatchNorm2d(C)))
    x = image()
    expected = copy.deepcopy(model)(x)
    site, _ = convert(model, filter_fn=lambda module, name: True).report.sites
    assert (site.action, site.name) == ("skipped", "0")
    assert site.reason.startswith(reason)
    assert torch.equal(model(x), expected)
