"""`sage_jax.accuracy`: exact attention in chunks, errors of recipes per head, and the report."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import cosine, relative_l2

import sage_jax
from sage_jax import accuracy

FORWARD_ONLY = ("sage1", "sage2", "sage2pp")


def inputs(batch=2, queries=40, keys=56, heads=4, kv_heads=2, head_dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, head_dim)] + 2 * [(batch, keys, kv_heads, head_dim)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in (*shapes, shapes[0])]


def masks(batch=2, queries=40, keys=56, heads=4):
    rng = np.random.default_rng(1)
    return {
        "mask": jnp.asarray(rng.random((batch, 1, queries, keys)) < 0.8),
        "query_seq_lengths": jnp.array([queries - 3, queries]),
        "key_value_seq_lengths": jnp.array([keys, keys - 5]),
        "local_window_size": (20, 30),
        "scale": 0.3,
    }


# ----------------------------------------------------------------------------------- the exact side


@pytest.mark.parametrize("chunk_scores", [2**24, 1000])
def test_exact_is_attention_of_jax_and_its_gradient(monkeypatch, chunk_scores):
    """In one piece, and in chunks of 8 queries."""
    monkeypatch.setattr(accuracy, "EXACT_SCORES", chunk_scores)
    q, k, v, dout = inputs()
    dout = dout.at[0, -3:].set(0)  # the queries past their length: jax.nn differs there
    keywords = masks()

    def attend(q, k, v):
        out, lse = jax.nn.dot_product_attention(q, k, v, **keywords, return_residual=True)
        return out, lse

    (out, lse), pull = jax.vjp(attend, q, k, v)
    ours = accuracy.exact(q, k, v, dout, **keywords)
    gradients = pull((dout, jnp.zeros_like(lse)))
    for name, expected in zip(("o", "dq", "dk", "dv"), (out, *gradients), strict=True):
        assert relative_l2(ours[name], expected) < 1e-5, name
    valid = np.isfinite(ours["lse"])
    np.testing.assert_allclose(ours["lse"][valid], np.asarray(lse)[valid], atol=1e-4)
    assert np.isneginf(ours["lse"]).sum() == 3 * 4


def test_exact_chunks_keep_the_diagonal_and_the_segments(monkeypatch):
    q, k, v, dout = inputs()
    rng = np.random.default_rng(2)
    keywords = {
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "query_segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (2, 40)))),
        "key_value_segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (2, 56)))),
        "bias": jnp.asarray(rng.standard_normal((1, 4, 40, 1)), jnp.float32),
    }
    whole = accuracy.exact(q, k, v, dout, **keywords)
    monkeypatch.setattr(accuracy, "EXACT_SCORES", 1000)
    for name, chunked in accuracy.exact(q, k, v, dout, **keywords).items():
        np.testing.assert_allclose(chunked, whole[name], atol=1e-5, err_msg=name)


def test_exact_without_a_batch_axis_and_of_lists():
    q, k, v, dout = inputs(batch=1)
    segments = {"query_segment_ids": np.arange(40) // 9, "key_value_segment_ids": np.arange(56) // 9}
    whole = accuracy.exact(q, k, v, dout, **{name: x[None] for name, x in segments.items()})
    rows = accuracy.exact(q[0], k[0], v[0], dout[0], **segments)
    lists = accuracy.exact(*(np.asarray(x).tolist() for x in (q, k, v, dout)), **{
        name: x[None].tolist() for name, x in segments.items()
    })  # fmt: skip
    assert set(whole) == set(rows) == {"o", "lse", "dq", "dk", "dv"}
    for name, expected in whole.items():
        np.testing.assert_array_equal(rows[name], expected[0], err_msg=name)
        np.testing.assert_array_equal(lists[name], expected, err_msg=name)


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([100], np.int8),
        jnp.array([100], jnp.int8),
        jnp.array([200], jnp.uint8),
        jnp.array([2**32 - 1], jnp.uint32),
        np.array([2**40]),
        np.array([-(2**40)]),
        np.array([2**63], np.uint64),
        [2**40],
    ],
    ids=lambda x: f"{getattr(x, 'dtype', 'list')}_{x[0]}",
)
def test_lengths_of_any_type_clip_and_never_wrap(lengths):
    q, k, v, dout = inputs(batch=1, queries=140, keys=200, heads=1, kv_heads=1)
    tokens = min(max(int(lengths[0]), 0), 200)
    expected = accuracy.exact(q, k[:, :tokens], v[:, :tokens], dout)
    actual = accuracy.exact(q, k, v, dout, key_value_seq_lengths=lengths)
    for name in ("o", "dq"):
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-5, err_msg=name)
    rows = accuracy.exact(q, k, v, query_seq_lengths=lengths)["o"]
    assert (rows[:, tokens:] == 0).all() and (rows[:, :tokens] != 0).all()


# --------------------------------------------------------------------------------------- the errors


def test_errors_are_those_of_the_call_itself():
    q, k, v, dout = inputs(dtype=jnp.bfloat16)
    keywords = masks()
    report = accuracy.compare(q, k, v, recipes=["sage2"], dout=dout, **keywords)
    out = sage_jax.dot_product_attention(q, k, v, recipe="sage2", **keywords)
    exact = accuracy.exact(q, k, v, **keywords)["o"]
    error = report.errors["sage2"]["o"]
    assert set(report.errors["sage2"]) == {"o", "lse"}
    assert 1e-3 < error.rel_l2 < 0.06
    assert error.rel_l2 == pytest.approx(relative_l2(out, exact), rel=1e-3)
    assert error.cos == pytest.approx(cosine(out, exact), abs=1e-6)
    assert error.heads_rel_l2.shape == (2, 4)
    assert error.heads_rel_l2[1, 2] == pytest.approx(
        relative_l2(out[1, :, 2], exact[1, :, 2]), rel=1e-3
    )


def test_gradients_of_recipes_that_have_them():
    q, k, v, dout = inputs()
    report = accuracy.compare(q, k, v, recipes=["sage1", "train8"], dout=dout, is_causal=True)
    assert set(report.errors["sage1"]) == {"o", "lse"}
    errors = report.errors["train8"]
    assert set(errors) == {"o", "lse", "dq", "dk", "dv"}
    assert errors["dq"].heads_cos.shape == (2, 4) and errors["dk"].heads_cos.shape == (2, 2)
    assert all(0 < errors[t].rel_l2 < 0.1 and errors[t].cos > 0.99 for t in ("o", "dq", "dk", "dv"))


def test_a_bad_recipe_is_seen():
    """Keys of one sign far from zero: without smoothing INT8 loses them, and the report says so."""
    q, k, v, _ = inputs()
    recipes = {"with": "sage2", "without": sage_jax.recipes["sage2"].replace(smooth_k=False)}
    report = accuracy.compare(q, k + 50.0, v, recipes=recipes, gradients=False)
    assert report.errors["without"]["o"].rel_l2 > 3 * report.errors["with"]["o"].rel_l2
    assert report.best() == "with"


def test_a_mean_of_the_values_is_taken_out():
    """Where values have one, what e4m3 costs is relative to their deviations from it."""
    q, k, v, _ = inputs()
    recipes = {"with": "sage2", "without": sage_jax.recipes["sage2"].replace(smooth_v=False)}
    report = accuracy.compare(q, k, v + 50.0, recipes=recipes, gradients=False)
    assert report.errors["without"]["o"].rel_l2 > 10 * report.errors["with"]["o"].rel_l2


def test_a_preset_without_a_kernel_is_left_out_unless_it_was_named(monkeypatch):
    runner = accuracy._runner

    def broken(recipe, backward, call):
        def run(*_):
            raise jax.errors.JaxRuntimeError("this GPU has no such kernel")

        return run if recipe.name != "sage1" else runner(recipe, backward, call)

    monkeypatch.setattr(accuracy, "_runner", broken)
    q, k, v, _ = inputs()
    report = accuracy.compare(q, k, v)
    assert list(report.errors) == ["sage1"]
    assert "not run: sage2pp: this GPU has no such kernel" in str(report)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such kernel"):
        accuracy.compare(q, k, v, recipes=["train8"])


def test_presets_that_an_implementation_lacks_are_left_out():
    """Such as FP4 where it has no kernels: the report says so in the words of `supports`."""
    q, k, v, _ = inputs()
    report = accuracy.compare(q, k, v, gradients=False, implementation="cpu")
    missing = sage_jax.supports(q, k, v, recipe="sage3", implementation="cpu")
    assert report.skipped.get("sage3") == missing and "sage2" in report.errors
    assert ("sage3" in report.errors) == (missing is None)


def test_unbatched_inputs_and_no_heads_kept():
    q, k, v, _ = (x[0] for x in inputs())
    report = accuracy.compare(q, k, v, recipes="sage2", gradients=False, per_head=False)
    assert report.errors["sage2"]["o"].heads_rel_l2 is None
    assert "worst head" not in str(report)


def test_rows_that_see_nothing_agree():
    q, k, v, dout = inputs()
    lengths = jnp.array([0, 30])
    report = accuracy.compare(q, k, v, recipes=["train8"], dout=dout, key_value_seq_lengths=lengths)
    for error in report.errors["train8"].values():
        assert math.isfinite(error.rel_l2) and (error.heads_rel_l2[0] == 0).all()
        assert (error.heads_cos[0] == 1).all()


@pytest.mark.parametrize("hide", ["lengths", "mask"])
def test_hidden_tokens_may_hold_anything(hide):
    q, k, v, dout = inputs(batch=1)
    q, dout = q.at[:, 30:].set(jnp.nan), dout.at[:, 30:].set(jnp.inf)
    k, v = k.at[:, 50:].set(-jnp.inf), v.at[:, 50:].set(jnp.nan)
    keywords = {"query_seq_lengths": [30], "key_value_seq_lengths": [50]}
    if hide == "mask":
        keywords = {"mask": (np.arange(40) < 30)[:, None] & (np.arange(56) < 50)}
    report = accuracy.compare(q, k, v, dout=dout, recipes=["train8", "sagebwd"], **keywords)
    for errors in report.errors.values():
        assert all(0 < error.rel_l2 < 0.1 for error in errors.values()), report


def test_lists_are_arrays_and_a_cotangent_takes_the_type_of_query():
    arrays = inputs(batch=1, queries=8, keys=8)
    q, k, v, dout = (np.asarray(x).tolist() for x in arrays)
    report = accuracy.compare(q, k, v, dout=dout, recipes=["train8"])
    assert report.to_dict() == accuracy.compare(
        *arrays[:3], dout=arrays[3], recipes=["train8"]
    ).to_dict()  # fmt: skip
    half = [x.astype(jnp.bfloat16) for x in arrays]
    expected = accuracy.compare(*half[:3], dout=half[3], recipes=["train8"]).to_dict()
    assert accuracy.compare(*half[:3], dout=dout, recipes=["train8"]).to_dict() == expected


def test_error_of_a_nan_and_of_an_infinity_in_the_wrong_place():
    x = np.ones((1, 4, 2, 3), np.float32)
    broken = x.copy()
    broken[0, 0, 1, 0] = np.nan
    error = accuracy.error(broken, x)
    assert math.isnan(error.rel_l2) and error.heads_rel_l2[0, 0] == 0
    lse = np.where(np.arange(4) == 2, -np.inf, 1.0)[None, :, None]
    assert accuracy.error(lse, lse).rel_l2 == 0
    assert not accuracy.error(np.ones_like(lse), lse).rel_l2 < 1e9


# --------------------------------------------------------------------------------------- the report


def errors(**rel_l2):
    return {t: accuracy.Error(x, 1 - x, np.array([[x, 2 * x]]), None) for t, x in rel_l2.items()}


REPORT = accuracy.Report(
    "made-up figures",
    {
        "fast": errors(o=0.05, lse=0.5),
        "fine": errors(o=0.02, dq=0.08),
        "even": errors(o=0.03, dq=0.04),
    },
    {"absent": "this GPU has no such kernel"},
)


def test_report_prints_a_table():
    lines = str(REPORT).splitlines()
    assert lines[0] == "made-up figures"
    fine = next(line for line in lines if line.startswith("fine"))
    assert fine.split() == ["fine", "0.0200", "(0.0400)", "–", "0.0800", "(0.1600)"]
    assert lines[-1] == "not run: absent: this GPU has no such kernel"
    widths = {len(line) for line in lines[3:8]}
    assert len(widths) == 1


def test_report_names_the_best():
    assert REPORT.best("o") == "fine"
    assert REPORT.best() == "even"  # the least of the largest errors of o and dq
    with pytest.raises(ValueError, match="'dz'; choose from o, lse, dq, dk, dv"):
        REPORT.best("dz")
    with pytest.raises(ValueError, match="no recipe of this comparison has a finite error of dk"):
        REPORT.best("dk")


def test_report_as_json():
    plain = json.loads(json.dumps(REPORT.to_dict()))
    assert plain["errors"]["fine"]["dq"] == {
        "rel_l2": 0.08,
        "cos": 0.92,
        "heads_rel_l2": [[0.08, 0.16]],
    }
    assert plain["skipped"] == REPORT.skipped


def test_report_plots(tmp_path):
    pytest.importorskip("matplotlib")
    figure = REPORT.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == list(REPORT.errors)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        REPORT.plot()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "keywords, sentence",
    [
        ({"recipes": []}, "recipes is empty"),
        ({"recipes": ["sage9"]}, "recipe='sage9' is unknown; choose one of"),
        ({"recipes": ["sage2", "sage2"]}, "share a name; pass a mapping"),
        ({"dout": jnp.zeros((1, 2, 3, 4))}, "dout has the shape"),
        ({"implementation": "cudnn"}, "implementation='cudnn'"),
        ({"mask": jnp.zeros((3, 1, 40, 56), bool)}, "mask has shape"),
    ],
)
def test_bad_input_is_one_sentence(keywords, sentence):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=sentence) as raised:
        accuracy.compare(q, k, v, **{"recipes": ["sage2"], **keywords})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "recipes, sentence",
    [
        ([None], "recipes holds None, but each of them should be a name or a sage_jax.Recipe"),
        ({"mine": None}, "recipes holds None"),
        (["sage2", 3], "recipe should be a name, a sage_jax.Recipe or None, but got int"),
        (3, "recipes should be names or Recipes, but got int; pass a list"),
    ],
)
def test_what_is_no_recipe_is_one_sentence(recipes, sentence):
    q, k, v, _ = inputs()
    with pytest.raises(TypeError, match=sentence) as raised:
        accuracy.compare(q, k, v, recipes=recipes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"dout": jnp.zeros((2, 40, 4))}, "dout has the shape"),
        ({"recipe": "sage2"}, "accuracy.exact got the keyword 'recipe', but takes masks and a scale"),
        ({"block_mask": jnp.ones((1, 1), bool)}, "got the keyword 'block_mask'"),
        ({"key": jnp.zeros((2, 56, 3, 16))}, "key and value must have the same shape"),
        ({"key_value_seq_lengths": [1]}, "key_value_seq_lengths should be an integer array of"),
    ],
)
def test_what_exact_refuses_is_one_sentence(change, sentence):
    q, k, v, _ = inputs()
    with pytest.raises((ValueError, TypeError), match=sentence) as raised:
        accuracy.exact(**{"query": q, "key": k, "value": v, **change})
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("kind", ["normal", "sharp", "sigma2.5", "outlier", "sink", "heavy"])
def test_synthetic_shapes_dtype_and_reproducibility(kind):
    def draw(seed):
        return accuracy.synthetic(
            kind, jax.random.key(seed), batch=2, tokens=70, heads=3, head_dim=32, dtype=jnp.bfloat16
        )

    first, again, other = draw(0), draw(0), draw(1)
    for x, y, z in zip(first, again, other, strict=True):
        assert x.shape == (2, 70, 3, 32) and x.dtype == jnp.bfloat16
        assert (x == y).all() and (x != z).any()


def test_synthetic_data_is_what_its_name_says():
    def draw(kind):
        parts = accuracy.synthetic(kind, jax.random.key(0), tokens=1024, head_dim=128)
        return [np.asarray(x[0, :, 0]) for x in parts]

    def probabilities(q, k):
        return np.asarray(jax.nn.softmax(q @ k.T / np.sqrt(128), axis=-1))

    q, k, v, _ = draw("sigma3")
    assert q.std() == pytest.approx(3, rel=0.02) and v.std() == pytest.approx(1, rel=0.02)
    q, k, v, _ = draw("sink")
    assert probabilities(q, k)[:, 0].mean() == pytest.approx(0.45, abs=0.15)
    q, k, v, _ = draw("outlier")
    offsets = np.abs(k.mean(0)) > 1
    assert 1 <= offsets.sum() <= 20 and np.abs(q.mean(0))[~offsets].max() < 1
    q, k, v, _ = draw("heavy")
    assert np.log(np.linalg.norm(q, axis=1)).std() == pytest.approx(0.7, rel=0.1)


def test_unknown_data():
    with pytest.raises(ValueError, match="kind 'spiky' was asked for; the kinds are normal"):
        accuracy.synthetic("spiky", jax.random.key(0), tokens=4, head_dim=4)
