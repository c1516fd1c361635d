"""Calls of batch_norm are found however a forward names the function; what cannot be traced is reported."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from norms import C, assert_converts, image, lived_in
from torch import Tensor, nn

from renormify import convert
from renormify.sites import find_sites


class State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))


def normalised(x: Tensor, state: State) -> Tensor:
    return F.batch_norm(x, state.running_mean, state.running_var, training=state.training)


class ImportsModule(State):
    def forward(self, x: Tensor) -> Tensor:
        import torch.nn.functional as functional

        return functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class ImportsPackage(State):
    def forward(self, x: Tensor) -> Tensor:
        import torch.nn.functional

        return torch.nn.functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class ImportsFunction(State):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.functional import batch_norm as norm

        return norm(x, self.running_mean, self.running_var, training=self.training)


class Local(State):
    def forward(self, x: Tensor) -> Tensor:
        functional = F
        norm = functional.batch_norm
        return norm(x, self.running_mean, self.running_var, training=self.training)


NORMS = {"plain": normalised, "none": lambda x, state: x}


class Table(State):
    def forward(self, x: Tensor) -> Tensor:
        return NORMS["plain"](x, self)


class InAList(State):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [normalised]

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](x, self)


class Norms:
    @staticmethod
    def static(x: Tensor, state: State) -> Tensor:
        return normalised(x, state)

    def method(self, x: Tensor, state: State) -> Tensor:
        return self.static(x, state)

    def __call__(self, x: Tensor, state: State) -> Tensor:
        return self.method(x, state)


NORM = Norms()


class StaticMethod(State):
    def forward(self, x: Tensor) -> Tensor:
        return Norms.static(x, self)


class CallableGlobal(State):
    def forward(self, x: Tensor) -> Tensor:
        return NORM(x, self)


class CallableAttribute(State):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norms()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self)


class MethodOfAttribute(CallableAttribute):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm.method(x, self)


class Methods(State):
    @classmethod
    def of_class(cls, x: Tensor, state: State) -> Tensor:
        return normalised(x, state)

    def method(self, x: Tensor) -> Tensor:
        return normalised(x, self)

    @property
    def norm(self) -> functools.partial[Tensor]:
        return functools.partial(normalised, state=self)


class ClassMethod(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return self.of_class(x, self)


class ByTheClass(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return self.__class__.method(self, x)


class ByTheType(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return type(self).method(self, x)


class Property(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class InALambda(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda y: self.method(y))(x)


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    return wrapped


class Decorated(Methods):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return self.method(x)


def applied(module: Methods, x: Tensor) -> Tensor:
    return module.method(x)


class FirstArgument(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return applied(self, x)


class ByName(State):
    def forward(self, x: Tensor) -> Tensor:
        norm = getattr(F, "batch_norm")  # noqa: B009
        return norm(x, self.running_mean, self.running_var, training=self.training)  # type: ignore[no-any-return]


def _batch() -> object:
    return F.batch_norm


class Cached(State):
    def forward(self, x: Tensor) -> Tensor:
        norm = _cached()
        return norm(x, self.running_mean, self.running_var, training=self.training)  # type: ignore[no-any-return]


_cached = functools.lru_cache(_batch)


class OfAnotherModule(State):
    """A method of a submodule, which is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Methods()  # which has no forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head.method(x)


class MadeInTheForward(State):
    def forward(self, x: Tensor) -> Tensor:
        return Norms()(x, self)


DEEP = {"norms": {"batch": normalised}}


class TableInATable(State):
    def forward(self, x: Tensor) -> Tensor:
        return DEEP["norms"]["batch"](x, self)


FORMS: dict[str, type[State]] = {
    form.__name__: form
    for form in (
        ImportsModule, ImportsPackage, ImportsFunction, Local, Table, InAList, StaticMethod, CallableGlobal,
        CallableAttribute, MethodOfAttribute, ClassMethod, ByTheClass, ByTheType, Property, InALambda, ByName,
        Cached, OfAnotherModule, Decorated, FirstArgument, MadeInTheForward, TableInATable,
    )
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_call_is_found_and_converted(form: str) -> None:
    model = lived_in(nn.Sequential(nn.BatchNorm2d(C), FORMS[form]()))
    assert assert_converts(model, image()).report.converted == ("0", "1")


def test_import_relative_to_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package, helpers = ModuleType("norms_of_a_user"), ModuleType("norms_of_a_user.helpers")
    helpers.normalised = normalised  # type: ignore[attr-defined]
    package.helpers, package.__path__ = helpers, []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "norms_of_a_user", package)
    monkeypatch.setitem(sys.modules, "norms_of_a_user.helpers", helpers)
    source = "def forward(self, x):\n    from .helpers import normalised as norm\n    return norm(x, self)\n"
    namespace = {"__package__": "norms_of_a_user", "__name__": "norms_of_a_user"}
    exec(source, namespace)
    form = type("Relative", (State,), {"forward": namespace["forward"]})
    assert assert_converts(lived_in(form()), image()).report.converted == ("",)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
        return torch.native_batch_norm(x, None, None, mean, var, training, 0.1, 1e-5)[0]


class AutogradFunction(State):
    def forward(self, x: Tensor) -> Tensor:
        return Function.apply(x, self.running_mean, self.running_var, self.training)  # type: ignore[no-any-return]


class InEvaluationAlone(State):
    """In training it computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean() if self.training else normalised(x, self)


class ByTheBatchInTraining(State):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True) if self.training else normalised(x, self)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (AutogradFunction, "its forward calls batch_norm and cannot be traced"),
        (InEvaluationAlone, "it calls batch_norm in evaluation alone"),
        (ByTheBatchInTraining, "it calls batch_norm in evaluation alone"),
    ],
)
def test_what_cannot_be_converted_is_reported(form: type[State], reason: str, training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), form()).train(training)
    report = convert(model).report
    assert (report.converted, report.skipped) == (("0",), ("1",))
    assert report.sites[1].reason.startswith(reason)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("patched", [False, True])
def test_scripted_calls_are_reported(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if patched:  # as torch.testing does, and profilers may
        call = torch.jit.ScriptFunction.__call__
        monkeypatch.setattr(torch.jit.ScriptFunction, "__call__", lambda *a, **k: call(*a, **k))

    @torch.jit.script
    def scripted(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
        return F.batch_norm(x, mean, var, training=training)

    class CallsScripted(State):
        def forward(self, x: Tensor) -> Tensor:
            return scripted(x, self.running_mean, self.running_var, self.training)  # type: ignore[no-any-return]

    class Scripted(State):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)

    model = nn.Sequential(nn.BatchNorm2d(C), CallsScripted(), torch.jit.script(Scripted()))
    reasons = [site.reason for site in convert(model).report.sites]
    assert "cannot be traced" in reasons[1]
    assert reasons[2] == "it is scripted; convert what it came from"


def test_modules_that_name_no_batch_norm_are_no_sites() -> None:
    class Batch(State):
        """A submodule of that name."""

        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.GroupNorm(1, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.batch_norm(x) if x.sum() > 0 else x  # type: ignore[no-any-return]

    assert find_sites(nn.Sequential(Batch(), nn.ReLU())) == ()
