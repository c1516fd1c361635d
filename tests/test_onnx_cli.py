"""``renormify fold``: any ONNX file in, a folded and proven one out, the input as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import batch_norm, batch_norm_parts, build, count
from typer.testing import CliRunner, Result

from renormify.cli import app
from renormify.onnx import folding

node = helper.make_node


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def small(shape: tuple[int | str, ...] = ("n", 3, 6, 6), *, relu: bool = False) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(0, 1, (4, 3, 3, 3)).astype(np.float32), **batch_norm_parts("bn", 4, rng)}
    nodes = [node("Conv", ["x", "w"], ["v"], name="conv")]
    nodes += [node("Relu", ["v"], ["r"])] if relu else []
    return build([*nodes, batch_norm("r" if relu else "v", "y", "bn")], shape, constants)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(small(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_a_file_is_folded_proven_and_left_as_it_was(file: Path) -> None:
    before, output = file.read_bytes(), file.parent / "folded.onnx"
    result = invoke("fold", file, "-o", output)
    assert "Folding 1 folded, 0 rewritten, 0 kept" in result.stdout
    assert "Parity ok" in result.stdout
    assert f"Wrote {output}" in result.stdout
    assert file.read_bytes() == before
    assert count(onnx.load(output)) == 0
    assert sorted(path.name for path in file.parent.iterdir()) == ["folded.onnx", "net.onnx"]


def test_json_holds_the_account_the_proof_and_the_sizes(file: Path) -> None:
    document = json.loads(invoke("fold", file, "-o", file.parent / "out.onnx", "--json").stdout)
    assert document["passed"] is True
    assert document["parity"]["passed"] is True
    assert [record["batch_size"] for record in document["parity"]["outputs"]] == [1, 2, 7]
    fold = document["export"]["fold"]
    assert fold["sites"][0]["into"] == "Conv conv"
    assert fold["bytes_before"] == file.stat().st_size
    assert fold["bytes_after"] == (file.parent / "out.onnx").stat().st_size


@pytest.mark.parametrize(
    ("leftover", "kind"),
    [("bn", "BatchNormalization"), ("affine", "Mul"), ("conv", "Conv"), ("auto", "Conv")],
)
def test_leftover_chooses_the_form(leftover: str, kind: str, tmp_path: Path) -> None:
    onnx.save(small(relu=True), tmp_path / "net.onnx")
    output = tmp_path / "out.onnx"
    result = invoke("fold", tmp_path / "net.onnx", "-o", output, "--leftover", leftover)
    assert "Relu does not commute with a shift" in result.stdout
    assert onnx.load(output).graph.node[2].op_type == kind


def test_weights_beside_the_file_are_read_and_never_written(file: Path) -> None:
    onnx.save(small(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = file.parent / "weights.bin"
    before = weights.read_bytes()
    invoke("fold", file, "-o", weights, "--force", code=2)
    invoke("fold", file, "-o", file, "--force", code=2)
    invoke("fold", file, "-o", file.parent / "out.onnx")
    assert weights.read_bytes() == before


def test_a_fixed_batch_is_compared_at_that_batch(tmp_path: Path) -> None:
    onnx.save(small((3, 3, 6, 6)), tmp_path / "net.onnx")
    result = invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "out.onnx", "--json")
    assert [record["batch_size"] for record in json.loads(result.stdout)["parity"]["outputs"]] == [3]


def test_an_open_shape_is_asked_for(tmp_path: Path) -> None:
    onnx.save(small(("n", 3, "h", "w")), tmp_path / "net.onnx")
    result = invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "out.onnx", code=2)
    assert "leaves the shape of input 'x' open (n, 3, h, w): give it, as --input-shape" in result.stderr
    invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "a.onnx", "--input-shape", "1,3,8,8")
    unproven = invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "b.onnx", "--no-verify", "--json")
    assert json.loads(unproven.stdout)["parity"] is None


def test_a_wrong_fold_is_found_and_nothing_is_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = folding.plan_backward

    def wrong(value, affine, graph):  # type: ignore[no-untyped-def]
        return plan(value, type(affine)(affine.scale * 1.01, affine.shift), graph)

    monkeypatch.setattr(folding, "plan_backward", wrong)
    result = invoke("fold", file, "-o", file.parent / "out.onnx", code=1)
    assert "is not proven to be the model" in result.stderr
    assert "the first layer that diverges is bn" in result.stderr
    assert [path.name for path in file.parent.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("faulty", range(5))
def test_the_site_that_makes_the_difference_is_named(
    faulty: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, nodes, constants = np.random.default_rng(0), [], {}
    for index in range(5):
        constants |= {f"w{index}": rng.normal(0, 0.5, (3, 3, 1, 1)).astype(np.float32)}
        constants |= batch_norm_parts(f"bn{index}", 3, rng)
        source = "x" if index == 0 else f"n{index - 1}"
        nodes.append(node("Conv", [source, f"w{index}"], [f"c{index}"], name=f"conv{index}"))
        nodes.append(batch_norm(f"c{index}", f"n{index}", f"bn{index}"))
    onnx.save(build(nodes, ("n", 3, 6, 6), constants, outputs=["n4"]), tmp_path / "net.onnx")
    plan = folding.plan_backward

    def wrong(value, affine, graph):  # type: ignore[no-untyped-def]
        by = 1.01 if value.producer().name == f"conv{faulty}" else 1.0
        return plan(value, type(affine)(affine.scale * by, affine.shift), graph)

    monkeypatch.setattr(folding, "plan_backward", wrong)
    result = invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "out.onnx", "--json", code=1)
    document = json.loads(result.stdout)
    assert document["parity"]["first_divergence"] == f"bn{faulty}"
    assert document["reason"].endswith(f"the first layer that diverges is bn{faulty}")


def test_a_file_that_differs_from_itself_is_no_fault_of_a_site(tmp_path: Path) -> None:
    model = small()
    model.graph.node[1].output[0] = "b"
    model.graph.node.extend(
        [node("RandomNormalLike", ["b"], ["noise"]), node("Add", ["b", "noise"], ["y"], name="sum")]
    )
    onnx.save(model, tmp_path / "net.onnx")
    result = invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "out.onnx", code=1)
    assert "does not compute the same twice" in result.stderr.replace("\n", " ")


def test_a_file_without_a_norm_is_said_to_have_none(tmp_path: Path) -> None:
    onnx.save(build([node("Relu", ["x"], ["y"])], ("n", 3), {}), tmp_path / "net.onnx")
    result = invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "out.onnx", code=1)
    assert "has no BatchNormalization and no affine chain to fold; nothing was written" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_integer_inputs_are_zeros(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {"table": rng.normal(0, 1, (9, 4)).astype(np.float32), "w": np.eye(4, dtype=np.float32)}
    constants |= batch_norm_parts("bn", 4, rng)
    nodes = [
        node("Gather", ["table", "x"], ["g"]),
        batch_norm("g", "n", "bn"),
        node("MatMul", ["n", "w"], ["y"]),
    ]
    model = build(nodes, ("n",), constants, dtype=TensorProto.INT64, output_dtype=TensorProto.FLOAT)
    onnx.save(model, tmp_path / "net.onnx")
    invoke("fold", tmp_path / "net.onnx", "-o", tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.onnx", "-o", "out.onnx"), "no such file: missing.onnx"),
        (("text.onnx", "-o", "out.onnx"), "text.onnx"),
        (("net.onnx", "-o", "net.onnx"), "is the input itself"),
        (("net.onnx", "-o", "nowhere/out.onnx"), "does not exist"),
        (("net.onnx", "-o", "out.onnx", "--leftover", "mul"), "--leftover"),
        (
            ("net.onnx", "-o", "out.onnx", "--input-shape", "1,3,6,6", "--input-shape", "1"),
            "2 shapes were given",
        ),
        (("net.onnx", "-o", "out.onnx", "--input-shape", "1,4,6,6"), "fails at batch size"),
    ],
)
def test_bad_usage_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(file.parent)
    Path("text.onnx").write_text("not a model\n")
    result = invoke("fold", *arguments, code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in file.parent.iterdir()) == ["net.onnx", "text.onnx"]
