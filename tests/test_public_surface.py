"""What a user may import, what that costs, and that the architecture holds."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import renormify
from renormify import errors

ROOT = Path(__file__).parent.parent


def _modules() -> list[str]:
    found = pkgutil.walk_packages(renormify.__path__, "renormify.")
    return ["renormify", *(module.name for module in found if not module.name.endswith("__main__"))]


def _loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the code."""
    program = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_public_names_are_sorted_and_resolve() -> None:
    assert list(renormify.__all__) == sorted(renormify.__all__)
    assert len(set(renormify.__all__)) == len(renormify.__all__)
    for name in renormify.__all__:
        assert getattr(renormify, name) is not None
    assert set(renormify.__all__) <= set(dir(renormify))


def test_star_import_brings_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from renormify import *", namespace)
    assert set(renormify.__all__) <= set(namespace)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'renormify' has no attribute 'renormalise'"):
        _ = renormify.renormalise  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from renormify import renormalise")


@pytest.mark.parametrize(
    "name",
    [
        "BatchRenorm1d",
        "BatchRenorm2d",
        "BatchRenorm3d",
        "ConstantSchedule",
        "Monitor",
        "PaperSchedule",
        "RenormScheduler",
        "convert",
        "diagnose",
        "freeze_stats",
        "recalibrate",
        "renormify",
        "revert",
        "unfreeze_stats",
    ],
)
def test_names_of_the_contract_are_public(name: str) -> None:
    assert name in renormify.__all__
    assert callable(getattr(renormify, name))


def test_function_does_not_hide_its_module() -> None:
    assert inspect.isfunction(renormify.renormify)
    assert inspect.ismodule(importlib.import_module("renormify.rewriting"))
    for submodule in ("errors", "functional", "onnx"):
        assert inspect.ismodule(getattr(renormify, submodule))


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import renormify")
    assert "renormify" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "typer",
        "rich",
        "safetensors",
    }


def test_importing_renormify_costs_torch_and_nothing_more() -> None:
    loaded = _loaded_by(
        "from renormify import renormify, convert, revert, BatchRenorm2d\n"
        "import torch\n"
        "renormify(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))"
    )
    assert "torch" in loaded
    assert not loaded & {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "typer", "rich", "safetensors"}


def test_architecture_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    assert lint.exists(), "import-linter is missing; `make test` installs it"
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept is not None, done.stdout
    assert int(kept.group(1)) >= 3


def test_every_exception_is_exported_and_drawn_in_the_tree() -> None:
    assert list(errors.__all__) == sorted(errors.__all__)
    defined = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }
    assert {*defined, "one_line", "printable"} == set(errors.__all__)
    assert errors.__doc__ is not None
    lines = errors.__doc__.splitlines()
    for name, value in defined.items():
        [line] = [line for line in lines if re.match(rf"\s*[|+ -]*{name}\b", line)]
        if issubclass(value, Warning):
            assert issubclass(value, UserWarning)
            continue
        assert issubclass(value, errors.RenormifyError)
        depth = len(value.__mro__[: value.__mro__.index(errors.RenormifyError)])
        tree = [c for c in value.__mro__ if c.__name__ in errors.__all__]
        assert depth >= len(tree) - 1
        assert line.index(name) == 4 * len(tree), f"{name} is drawn at another depth than it has"
        assert value.exit_code in (1, 2)


def test_exit_codes() -> None:
    one = {name for name in errors.__all__ if getattr(getattr(errors, name), "exit_code", None) == 1}
    assert one == {"NothingToConvertError", "ProofError"}


def test_input_errors_are_value_errors_and_missing_extras_import_errors() -> None:
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)
    message = str(errors.MissingExtraError("jinja2", "report", "to write HTML"))
    assert message == "jinja2 is needed to write HTML: pip install 'renormify[report]'"


@pytest.mark.parametrize("name", _modules())
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    missing = []
    for attribute, value in vars(module).items():
        own = getattr(value, "__module__", None) == name
        if attribute.startswith("_") or not own or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__:
            missing.append(attribute)
        if inspect.isclass(value):
            members = ((k, v) for k, v in vars(value).items() if not k.startswith("_"))
            missing += [
                f"{attribute}.{k}"
                for k, v in members
                if (inspect.isfunction(v) or isinstance(v, property))
                and not inspect.getdoc(getattr(value, k))
            ]
    assert not missing, f"{name}: {missing}"


def test_examples_in_the_layers_docstrings_run() -> None:
    import torch

    for name in ("BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"):
        namespace: dict[str, object] = {"torch": torch, name: getattr(renormify, name)}
        doc = getattr(renormify, name).__doc__
        for line in re.findall(r">>> (.*)", doc):
            exec(line, namespace)
        assert isinstance(namespace["output"], torch.Tensor)
