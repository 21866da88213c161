"""The example that chooses a recipe for each layer, tiny: what it reads, writes, and refuses."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sage_jax

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
SAGE3, SAGE2 = sage_jax.recipes["sage3"], sage_jax.recipes["sage2"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import fp4_or_int8

    return fp4_or_int8


@pytest.fixture
def saved(example, tmp_path):
    """A model of two layers with random parameters, and where it was saved."""
    from gpt import checkpoint
    from gpt.model import GPT, Shape

    for number in range(40):
        (tmp_path / f"module_{number}.py").write_text(f"def f{number}():\n    pass\n" * 20)
    model = GPT(Shape(layers=2, heads=2, head_dim=16, context=40), rngs=nnx.Rngs(3))
    path = tmp_path / "model.npz"
    checkpoint.save(path, model.shape, nnx.state(model), tmp_path)
    return model, path


def qkv(seed: int, kv_heads: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, 70, heads, 16)) for heads in (2, kv_heads, kv_heads)]


def error_line(example, capsys, *arguments: str) -> str:
    """What it says on wrong options: exactly one line, and nothing on standard output."""
    with pytest.raises(SystemExit) as exit_info:
        example.main(list(arguments))
    said = capsys.readouterr()
    assert exit_info.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.endswith("(--help explains every option)\n")
    return said.err


def row(said: str, name: str) -> list[str]:
    return next(line for line in said.splitlines() if line.startswith(f"{name} ")).split()


def test_a_model_comes_back_as_it_was_saved(saved):
    from gpt import checkpoint

    model, path = saved
    loaded = checkpoint.load(path)
    assert loaded.model.shape == model.shape and loaded.text == path.parent
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded.model), nnx.state(model))


def test_a_model_gets_a_choice_that_layers_load(example, saved, capsys, tmp_path):
    arguments = ["--model", str(saved[1]), "--sequences", "8", "--output", str(tmp_path / "out")]
    arguments += ["--recipes", "sage3,sage2"]
    assert example.main([*arguments, "--tolerance", "0.5"]) == 0
    said = capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "recipes.json").read_text())["about"]
    for name, errors in about["errors"].items():
        assert 0 < errors["sage2"]["relative_l2"] < errors["sage3"]["relative_l2"] < 0.5
        assert f"{errors['sage3']['relative_l2']:.4f}" in row(said, name)
        assert row(said, name)[-1] == "sage3"
    assert set(about["errors"]) == {"layer0", "layer1"}
    losses = about["losses"]
    assert list(losses) == ["exact", "all sage3", "all sage2", "the choice"]
    assert losses["the choice"] == losses["all sage3"]
    for name, loss in losses.items():
        assert f"{loss['perplexity']:.4f}" in row(said, name)
        assert loss["perplexity"] == pytest.approx(np.exp(loss["nats_per_byte"]))
        assert abs(loss["above_exact"]) < 0.05 and (loss["above_exact"] == 0) == (name == "exact")
    picture = (tmp_path / "out" / "fp4_or_int8.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    chosen = sage_jax.load_recipes(tmp_path / "out" / "recipes.json")
    assert chosen == {"layer0": SAGE3, "layer1": SAGE3}
    layer = sage_jax.flax.nnx.SageAttention(2, 32, recipe=chosen["layer0"], rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, 8, 32))).shape == (1, 8, 32)


def test_tensors_of_a_file_get_the_cheapest_recipe_within_the_tolerance(example, capsys, tmp_path):
    (q0, k0, v0), (q7, k7, v7) = qkv(0), qkv(1, kv_heads=1)
    zeros = np.zeros_like(v7)  # of zero values every recipe makes zeros: no error
    np.savez(tmp_path / "some.npz", q7=q7, k7=k7, v7=zeros, q0=q0, k0=k0, v0=v0)
    common = ["--qkv", str(tmp_path / "some.npz"), "--output", str(tmp_path), "--causal"]
    common += ["--recipes", "sage3,sage3:published=true,sage2"]
    for tolerance, recipe in (("1", SAGE3), ("0.07", SAGE2), ("1e-5", "exact")):
        assert example.main([*common, "--tolerance", tolerance]) == 0
        said = capsys.readouterr().out
        assert "perplexity" not in said
        chosen = sage_jax.load_recipes(tmp_path / "recipes.json")
        assert chosen == {"layer0": recipe, "layer7": SAGE3}
        assert row(said, "layer0")[-1] == (recipe if recipe == "exact" else recipe.name)
    errors = json.loads((tmp_path / "recipes.json").read_text())["about"]["errors"]["layer0"]
    report = sage_jax.accuracy.compare(
        *(jnp.asarray(x, jnp.float32) for x in (q0, k0, v0)),
        recipes=[SAGE2], gradients=False, is_causal=True,
    )  # fmt: skip
    assert errors["sage2"]["relative_l2"] == pytest.approx(report.errors["sage2"]["o"].rel_l2)
    assert errors["sage3:published=true"] != errors["sage3"]


def test_the_tensors_of_a_model_are_those_its_layers_attend_with(saved):
    from gpt import tensors

    model, _ = saved
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40)).astype(np.int32)
    layers = tensors.of_model(model, tokens)
    assert [x.query.shape for x in layers.values()] == [(2, 40, 2, 16)] * 2
    x = model.blocks[0].attention_norm(model.embed(tokens))
    value = model.blocks[0].attention.value(x).reshape(2, 40, 2, 16)
    np.testing.assert_allclose(layers["layer0"].value, value, rtol=0, atol=1e-5)


def test_differences_of_losses_are_paired(example):
    from gpt import choice

    exact, other = choice.Loss(np.array([1.0, 5.0])), choice.Loss(np.array([1.1, 5.3]))
    assert other.above(exact) == pytest.approx((0.2, 0.1))
    assert np.isnan(choice.Loss(np.array([1.0])).above(choice.Loss(np.array([1.0])))[1])


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({}, "holds no array; give q, k and v"),
        (dict(q=0, k=1), "has no v; a layer needs q, k and v"),
        (dict(q1=0, k1=1, v2=2), "has no v1; a layer needs"),
        (dict(q=0, k=1, v=2, q0=0), "holds q, k, v, q0; give q, k and v of one layer"),
        (dict(q=0, k=1, v=2, mask=0), "holds an array named 'mask'"),
        (dict(q=0, k=1, v=np.ones((70, 2, 16))), "v has the shape [70, 2, 16], but should have"),
        (dict(q=0, k=1, v=np.ones((1, 0, 2, 16))), "v has the shape [1, 0, 2, 16]"),
        (dict(q=0, k=1, v=np.ones((1, 70, 2, 16), int)), "v has the type int64, but should be"),
        (dict(q=0, k=1, v=np.full((1, 70, 2, 16), np.nan)), "v holds NaN or infinity"),
        (dict(q=0, k=1, v=np.ones((1, 69, 2, 16))), "layer0: "),
        (dict(q=0, k=1, v=np.full((1,), None)), "is not an .npz file of numbers"),
    ],
)  # fmt: skip
def test_wrong_arrays_give_one_line(example, capsys, tmp_path, arrays, told):
    good = qkv(0)
    arrays = {name: good[x] if isinstance(x, int) else x for name, x in arrays.items()}
    np.savez(tmp_path / "some.npz", **arrays)
    arguments = ["--qkv", str(tmp_path / "some.npz"), "--output", str(tmp_path)]
    assert told in error_line(example, capsys, *arguments)


def test_files_of_other_kinds_give_one_line(example, saved, capsys, tmp_path):
    (tmp_path / "text").write_text("q, k, v")
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "some.npz", **dict(zip("qkv", qkv(0), strict=True)))
    for name in ("text", "one.npy"):
        path = str(tmp_path / name)
        assert "is not an .npz file" in error_line(example, capsys, "--qkv", path)
        assert "is not a model of" in error_line(example, capsys, "--model", path)
    some, none = str(tmp_path / "some.npz"), str(tmp_path / "none.npz")
    assert "is not a model of" in error_line(example, capsys, "--model", some)
    assert "none.npz" in error_line(example, capsys, "--qkv", none)
    line = error_line(example, capsys, "--model", none)
    assert "there is no" in line and "`python examples/train_gpt.py` trains a model" in line
    with np.load(saved[1]) as file:
        arrays = dict(file)
    arrays.pop("norm.scale")
    np.savez(tmp_path / "less.npz", **arrays)
    line = error_line(example, capsys, "--model", str(tmp_path / "less.npz"))
    assert "holds other parameters than the model that it describes" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipes", "sage9"], "recipe='sage9' is unknown"),
        (["--recipes", "sage3:colour=red"], "a recipe has no field 'colour'"),
        (["--recipes", "sage3:published"], "'published' should be field=value"),
        (["--recipes", "sage2,sage2"], "--recipes names sage2 twice"),
        (["--tolerance", "0"], "'0' is not a positive number"),
        (["--sequences", "0"], "'0' is not a whole number from 1 up"),
        (["--qkv", "mine.npz", "--model", "model.npz"], "not allowed with"),
    ],
)
def test_wrong_options_give_one_line(example, capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert told in error_line(example, capsys, *arguments)


def test_help_explains_every_option(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--help"])
    said = capsys.readouterr().out
    for action in example._parser()._actions:
        assert action.option_strings[-1] in said and action.help
