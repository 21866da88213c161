"""Recipes of layers in a file: the round trip, what wrong files say, and that layers take them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sage_jax
from sage_jax.flax import attention_fn
from sage_jax.flax._batch import attend_folded

SAGE3 = sage_jax.recipes["sage3"]


def test_round_trip(tmp_path):
    recipes = {
        **{f"preset {name}": recipe for name, recipe in sage_jax.recipes.items()},
        "blocks.0": SAGE3.replace(published=True),
        "blocks.1": SAGE3.replace(backward="train8", delta="exact", name="trainable"),
        "blocks.2": sage_jax.recipes["sage2"].replace(smooth_v=False),
        "blocks.3": "exact",
    }
    sage_jax.save_recipes(tmp_path / "recipes.json", recipes, about={"tolerance": 0.1})
    assert sage_jax.load_recipes(tmp_path / "recipes.json") == recipes
    assert sage_jax.load_recipes(str(tmp_path / "recipes.json"))["blocks.1"].delta == "exact"


def test_names_of_presets_and_fields_left_out(tmp_path):
    path = tmp_path / "by_hand.json"
    path.write_text(
        '{"sage_jax_recipes": 1, "recipes": {"a": "sage3", "b": {"name": "mine", "pv": "bf16"},'
        ' "c": "sage3:published=true"}}'
    )
    assert sage_jax.load_recipes(path) == {
        "a": SAGE3,
        "b": sage_jax.Recipe("mine", pv="bf16"),
        "c": SAGE3.replace(published=True, name="sage3:published=true"),
    }
    sage_jax.save_recipes(path, {"a": "sage2"})
    assert sage_jax.load_recipes(path) == {"a": sage_jax.recipes["sage2"]}
    assert "about" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("recipes: sage3", "is not a JSON file"),
        ('{"sage_jax_recipes": 1, "recipes": {"a": "sage2", "a": "exact"}}', "'a' stands twice in one object"),
        ("[" * 100_000, "is not a JSON file"),
        ('"sage3"', "is not a file of recipes: it has no 'sage_jax_recipes'"),
        ({"recipes": {"a": "sage2"}}, "is not a file of recipes"),
        ({"sage_jax_recipes": 2, "recipes": {"a": "sage2"}}, "has version 2 of this format"),
        ({"sage_jax_recipes": True, "recipes": {"a": "sage2"}}, "has version True"),
        ({"sage_jax_recipes": 1}, "'recipes' should map the name of each layer"),
        ({"sage_jax_recipes": 1, "recipes": {}}, "'recipes' should map the name of each layer"),
        ("sage9", "'a': 'sage9' is no recipe; choose one of sage1"),
        ("sage3:pv=e5m2", "'a': Recipe 'sage3:pv=e5m2': pv='e5m2' is not supported"),
        (None, "'a': a recipe is a name or an object with a 'name', but this is None"),
        ({"pv": "bf16"}, "'a': a recipe is a name or an object with a 'name'"),
        ({"name": "x", "colour": "red"}, "'a': a recipe has no field 'colour'; the fields"),
        ({"name": 3}, "'a': name should be of type str, but is 3"),
        ({"name": "x", "q_block": True}, "'a': q_block should be of type int, but is True"),
        ({"name": "x", "smooth_k": 1}, "'a': smooth_k should be of type bool, but is 1"),
        ({"name": "x", "smooth_v": "no"}, "smooth_v should be of type bool or NoneType, but"),
        ({"name": "x", "pv": "fp8"}, "'a': Recipe 'x': pv='fp8' is not supported"),
        ({"name": "x", "qk": "nvfp4"}, "'a': Recipe 'x': both products have one FP4 format"),
    ],
)  # fmt: skip
def test_wrong_files_give_one_sentence(tmp_path, content, told):
    path = tmp_path / "recipes.json"
    whole = isinstance(content, str) and not content.startswith("sage") or (
        isinstance(content, dict) and content.keys() & {"sage_jax_recipes", "recipes"}
    )  # fmt: skip
    if not whole:
        content = {"sage_jax_recipes": 1, "recipes": {"a": content}}
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as info:
        sage_jax.load_recipes(path)
    said = str(info.value)
    assert said.startswith(str(path)) and told in said and "\n" not in said


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        sage_jax.load_recipes(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a JSON file"):
        sage_jax.load_recipes(tmp_path / "binary")


@pytest.mark.parametrize(
    ("recipes", "about", "error", "told"),
    [
        ({}, None, ValueError, "recipes is empty"),
        ({0: "sage2"}, None, TypeError, "but 0 is no string"),
        ({"a": None}, None, TypeError, "the recipe of 'a' is None, which means another one"),
        ({"a": "sage9"}, None, ValueError, "recipe='sage9' is unknown"),
        ({"a": 8}, None, TypeError, "but got int"),
        (["sage2"], None, TypeError, "should map names of layers to recipes, but got list"),
        ({"a": "sage2"}, float("nan"), ValueError, "not JSON compliant"),
        ({"a": "sage2"}, {"x": object()}, TypeError, "not JSON serializable"),
    ],
)
def test_what_cannot_be_saved_leaves_no_file(tmp_path, recipes, about, error, told):
    with pytest.raises(error, match=told):
        sage_jax.save_recipes(tmp_path / "recipes.json", recipes, about=about)
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------- layers


@pytest.fixture
def choice(tmp_path):
    path = tmp_path / "recipes.json"
    sage_jax.save_recipes(path, {"fp4": SAGE3, "8 bits": "sage2", "float32": "exact"})
    return sage_jax.load_recipes(path)


def test_layers_load_a_choice(choice):
    x = jax.random.normal(jax.random.key(0), (2, 40, 32))
    options = dict(num_kv_heads=1, is_causal=True, rope_theta=1e4)
    linen_options = dict(num_heads=2, **options)
    outs = {}
    for layer, recipe in choice.items():
        module = sage_jax.flax.nnx.SageAttention(2, 32, recipe=recipe, rngs=nnx.Rngs(0), **options)
        outs[layer] = module(x)
        parameters = {
            name: {kind: getattr(part, kind)[...] for kind in ("kernel", "bias")}
            for name in ("query", "key", "value", "out")
            for part in [getattr(module, name)]
        }
        linen = sage_jax.flax.linen.SageAttention(recipe=recipe, **linen_options)
        twin = linen.apply({"params": parameters}, x)
        np.testing.assert_allclose(twin, outs[layer], rtol=0, atol=1e-5)
    errors = [float(jnp.linalg.norm(outs[n] - outs["float32"])) for n in ("fp4", "8 bits")]
    assert errors[0] > 2 * errors[1] > 0


@pytest.mark.parametrize(
    "keywords",
    [
        dict(is_causal=True),
        dict(is_causal=True, causal_alignment="bottom_right", local_window_size=(9, 3)),
        dict(scale=0.3, masked=True),
        dict(scale=-0.3, biased=True),
    ],
    ids=lambda keywords: ",".join(keywords),
)
def test_exact_means_the_same_as_a_recipe_without_the_rounding(keywords):
    keywords = dict(keywords)
    q, k, v = (jax.random.normal(key, (3, 2, 24, n, 16)) for key, n in
               zip(jax.random.split(jax.random.key(1), 3), (4, 2, 2), strict=True))  # fmt: skip
    call = {}
    if keywords.pop("masked", False):
        call["mask"] = jax.random.bernoulli(jax.random.key(2), 0.6, (3, 1, 1, 24, 24))
    if keywords.pop("biased", False):
        call["bias"] = jax.random.normal(jax.random.key(3), (4, 24, 24))
    exact, eight = (attention_fn(recipe=recipe, **keywords) for recipe in ("exact", "sage2"))
    out, other = exact(q, k, v, **call), eight(q, k, v, **call)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert 1e-4 < jnp.linalg.norm(out - other) / jnp.linalg.norm(out) < 0.05


def test_exact_attention_is_that_of_jax_and_has_its_gradient():
    q, k, v = jax.random.normal(jax.random.key(4), (3, 2, 24, 4, 16), jnp.float32)
    ours = lambda *qkv: attention_fn(recipe="exact", is_causal=True)(*qkv)
    theirs = lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=True)
    np.testing.assert_allclose(ours(q, k, v), theirs(q, k, v), rtol=0, atol=2e-6)
    for mine, other in zip(
        *(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2))(q, k, v) for f in (ours, theirs)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-5)
    half = jnp.bfloat16
    assert ours(q.astype(half), k.astype(half), v.astype(half)).dtype == half


def test_exact_layers_honour_segments_lengths_and_traced_scales():
    x = jax.random.normal(jax.random.key(5), (2, 24, 32))
    layer = sage_jax.flax.nnx.SageAttention(2, 32, recipe="exact", is_causal=True, rngs=nnx.Rngs(0))
    segments = jnp.repeat(jnp.array([[0, 1]]), 12, axis=1).repeat(2, axis=0)
    packed = layer(x, query_segment_ids=segments, key_value_segment_ids=segments)
    np.testing.assert_allclose(packed[:, 12:], layer(x[:, 12:]), rtol=0, atol=1e-5)
    short = layer(x, key_value_seq_lengths=jnp.array([24, 7]), is_causal=False)
    np.testing.assert_allclose(
        short[1, 0], layer(x[1:, :7], is_causal=False)[0, 0], rtol=0, atol=1e-5
    )
    q = x.reshape(2, 24, 2, 16)
    scaled = jax.jit(lambda c: attend_folded(q, q, q, recipe="exact", scale=c))(0.5)
    np.testing.assert_allclose(scaled, attention_fn(recipe="exact", scale=0.5)(q, q, q), atol=1e-6)


def test_exact_refuses_to_run_elsewhere_than_asked_for():
    q = jnp.ones((1, 8, 1, 16))
    with pytest.raises(ValueError, match="recipe='exact' is float32 attention in plain JAX, but"):
        attention_fn(recipe="exact", implementation="cpu")(q, q, q)
    assert attention_fn(recipe="exact", implementation="reference")(q, q, q).shape == q.shape
    with pytest.raises(ValueError, match="recipe='exact' is unknown"):
        sage_jax.dot_product_attention(q, q, q, recipe="exact")
