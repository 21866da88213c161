"""Recipes: presets, immutability, clear errors."""

import dataclasses

import pytest

from sage_jax.recipe import PRESETS, Recipe, padded_head_dim, resolve


def test_presets_are_hashable_printable_and_found_by_name():
    assert set(PRESETS) >= {"sage1", "sage2", "sage2pp", "sage3", "sagebwd", "train8"}
    for name, recipe in PRESETS.items():
        assert resolve(name) is recipe and hash(recipe) == hash(recipe.replace(name=name))
        assert name in repr(recipe)
    assert resolve(None) is None and resolve(PRESETS["sage2"]) is PRESETS["sage2"]


def test_recipes_are_frozen_and_replace_names_the_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["sage2"].pv = "bf16"
    changed = PRESETS["sage2"].replace(backward="train8")
    assert changed.backward == "train8" and changed.name == "sage2[backward=train8]"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pv="fp8"), "pv='fp8' is not supported; choose one of"),
        (dict(q_block=32), "q_block=32"),
        (dict(smooth_k="yes"), "smooth_k='yes' is not supported; choose one of True, False"),
        (dict(backward="sagebwd"), "backward='sagebwd' needs q_block"),
        (dict(pv="bf16", pv_accumulator="f16"), "goes with pv='e4m3' only"),
        (dict(pv="bf16", smooth_v=True), "smooth_v=True goes with pv='e4m3' or backward='train8', but pv='bf16'"),
        (dict(colour="red"), "no field 'colour'"),
        (dict(qk="nvfp4"), "both products have one FP4 format or neither, but qk='nvfp4' and pv='e4m3'"),
        (dict(smooth_q=True), "smooth_q=True is for FP4 recipes"),
        (dict(published=True), "published=True is for FP4 recipes"),
        (dict(four_or_six=True), "goes with qk='nvfp4' only, but qk='int8'"),
    ],
)
def test_impossible_recipes_say_what_is_possible(changes, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        PRESETS["sage2"].replace(**changes)


def test_values_are_smoothed_where_they_become_8_bits():
    for recipe in PRESETS.values():
        assert recipe.smooth_v is (recipe.pv in ("e4m3", "nvfp4") or recipe.backward == "train8")
    assert PRESETS["train8"].replace(pv="bf16").smooth_v is True
    sage2 = PRESETS["sage2"]
    bf16 = sage2.replace(pv="bf16")
    assert bf16.smooth_v is False and bf16.name == "sage2[pv=bf16]"
    assert bf16.replace(pv="e4m3").smooth_v is True
    assert bf16.replace(backward="train8").smooth_v is True
    assert sage2.replace(smooth_v=False).replace(backward="train8").smooth_v is False


def test_published_sage3_is_the_paper_s():
    ours = PRESETS["sage3"]
    published = ours.replace(published=True)
    assert published.name == "sage3[published=True]" and published.published
    assert (ours.smooth_v, ours.four_or_six) == (True, True)
    assert (published.smooth_v, published.four_or_six, published.smooth_q) == (False, False, True)
    for field in ("smooth_v", "four_or_six", "smooth_q", "smooth_k"):
        contradiction = {field: not getattr(published, field)}
        with pytest.raises(ValueError, match=f"published=True goes with {field}="):
            ours.replace(published=True, **contradiction)
    with pytest.raises(ValueError, match="published=True goes with qk='nvfp4'"):
        ours.replace(published=True, qk="mxfp4", pv="mxfp4")
    assert ours.replace(smooth_q=False).replace(published=True).smooth_q


def test_fp4_recipes_are_differentiated_in_8_bits():
    recipe = PRESETS["sage3"].replace(backward="train8", delta="exact", name="mine")
    assert recipe.eight_bit == PRESETS["train8"].replace(delta="exact", name="mine")
    assert PRESETS["sage2"].eight_bit is PRESETS["sage2"]


def test_names_with_changes():
    recipe = resolve("train8:pv=bf16:q_block=64:smooth_k=False:delta=exact")
    wanted = dict(pv="bf16", q_block=64, smooth_k=False, delta="exact", name=recipe.name)
    assert recipe == PRESETS["train8"].replace(**wanted)
    assert recipe.name == "train8:pv=bf16:q_block=64:smooth_k=False:delta=exact"
    assert resolve("sage3:published=true").published
    assert resolve("train8:name=mine:delta=exact").name == "mine"
    assert resolve("train8:backward=none").backward is None
    assert resolve("train8:name=none").name == "none" and resolve("train8:name=64").name == "64"
    assert resolve("sage2:smooth_v=none") == PRESETS["sage2"].replace(name="sage2:smooth_v=none")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train8:", "'' should be field=value, as in 'train8:delta=exact'"),
        ("train8:delta", "'delta' should be field=value"),
        ("train8:name=", "'name=' should be field=value"),
        ("train8:delta=exact:delta=output", "delta is changed twice; write each change once"),
        ("train8:pv=bf16,delta=exact", "'pv=bf16,delta=exact' holds a comma; changes are separated by ':'"),
        ("train8:colour=red", "a recipe has no field 'colour'; the fields are name, q_block, pv,"),
        ("train8:delta=true", "delta='true' is not supported; choose one of 'output', 'exact'"),
        ("train8:dp=none", "dp='none' is not supported; choose one of 'int8', 'bf16'"),
        ("train8:smooth_k=0", "smooth_k should be true or false, but is '0'"),
        ("train8:smooth_v=1", "smooth_v should be true or false or none, but is '1'"),
        ("train8:q_block=true", "q_block should be a number, but is 'true'"),
        ("train8:q_block=-64", "q_block should be a number, but is '-64'"),
        ("train8:q_block=32", "q_block=32 is not supported; choose one of 1, 64, 128"),
    ],
)
def test_changes_that_are_refused(text, told):
    with pytest.raises(ValueError) as error:
        resolve(text)
    assert repr(text) in str(error.value) and told in str(error.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(name=3), "name=3 should be a string"),
        (dict(name=""), "name='' should be a string that is not empty"),
        (dict(name="x", q_block=64.0), "q_block=64.0 is not supported"),
        (dict(name="x", smooth_k=1), "smooth_k=1 is not supported"),
    ],
)
def test_fields_have_the_types_that_they_say(fields, told):
    with pytest.raises(ValueError, match=told):
        Recipe(**fields)


def test_the_8_bit_recipe_of_an_fp4_one_smooths_values_unless_told_not_to():
    assert not resolve("sage3:backward=train8:smooth_v=false").eight_bit.smooth_v
    assert resolve("sage3:backward=train8").eight_bit.smooth_v
    assert resolve("sage3:published=true:backward=train8").eight_bit.smooth_v


def test_unknown_names_and_types():
    with pytest.raises(ValueError, match="'sage9' is unknown; choose one of sage1"):
        resolve("sage9")
    with pytest.raises(TypeError, match="but got int"):
        resolve(3)


def test_half_precision_accumulators_cannot_overflow():
    recipe = PRESETS["sage2pp"]
    assert recipe.f16_accumulate and 64 * 256 * recipe.v_range <= 65504
    # (4·32 + 128) probabilities, in codes that may be rounded up by 1/16: `kMostProbability` of the kernel of sm_90.
    assert (4 * 32 + 128) * 64 * 17 / 16 * Recipe("x").v_range <= 65504


def test_padded_head_dims():
    assert [padded_head_dim(h) for h in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]
    with pytest.raises(ValueError, match="between 1 and 256"):
        padded_head_dim(257)
