"""Writes README.md's support tables from the package: its recipes, and what `supports` answers.

python tools/support_table.py           rewrites the block between the two markers of README.md
python tools/support_table.py --check   exits 1 if the block is out of date
"""

import pathlib
import sys

import jax
import jax.numpy as jnp

import sage_jax
from sage_jax import Recipe, _vjp, support

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
IMPLEMENTATIONS = ("reference", "cpu", "cuda")
B, T, N, H = 2, 128, 8, 64


def tables() -> str:
    """Both tables as Markdown."""
    return _markdown(*_recipes()) + "\n\n" + _markdown(*_features())


def spliced(text: str) -> str:
    """README text with the block between the markers made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def _recipes():
    rows = [_recipe_row(recipe) for recipe in sage_jax.recipes.values()]
    return ("recipe", "Q·Kᵀ", "P·V", "gradient", "used when none is named", "runs on"), rows


def _recipe_row(recipe: Recipe):
    query = "token" if recipe.q_block == 1 else f"{recipe.q_block} tokens"
    scores = recipe.qk if recipe.fp4 else f"{recipe.qk}, Q per {query}"
    where = [
        name
        for name in IMPLEMENTATIONS
        if _answer([(_operands(), {"recipe": recipe})], name) == "yes"
    ]
    product = recipe.pv + (", f16 accumulators" if recipe.f16_accumulate else "")
    gradient = f"{recipe.backward}, dO·Vᵀ in {recipe.dp}" if recipe.backward else "raises"
    explained = sage_jax.explain(*_operands(), platform="cpu")
    default = [
        phrase
        for phrase, chosen in (
            ("without gradients", explained.recipe),
            ("with gradients", explained.training_recipe),
        )
        if chosen == recipe
    ]
    return f"`{recipe.name}`", scores, product, gradient, ", ".join(default), ", ".join(where)


def _features():
    rows = [
        (feature, *(_answer(calls, name) for name in IMPLEMENTATIONS))
        for feature, calls in _cases().items()
    ]
    return ("feature", *(f'`implementation="{name}"`' for name in IMPLEMENTATIONS)), rows


def _answer(calls, implementation: str) -> str:
    """Whether every one of the calls is supported."""
    try:
        for arguments, keywords in calls:
            _check(implementation, *arguments, **keywords)
    except (ValueError, TypeError):
        return "no"
    return "yes"


def _check(implementation, *arguments, differentiate=False, **keywords):
    """Raises unless the call can be lowered. That needs no kernels, which `supports` would ask for:
    platform "cpu" alone does not.
    """
    planned = support.plan(*arguments, implementation=implementation, platform="cpu", **keywords)
    if differentiate:
        _vjp.check_differentiable(planned.settings.recipe)


def _cases() -> dict:
    """Feature -> the calls, as (positional arguments, keywords), that make it up."""
    lengths, ids = _array((B,), jnp.int32), _array((B, T), jnp.int32)
    mask, bias = _array((1, N, T, T), jnp.bool_), _array((1, N, T, T), jnp.float32)
    tiles = _array((B, N, -(-T // 64), -(-T // 64)), jnp.bool_)

    def call(*more, operands=None, **keywords):
        return (*(operands or _operands()), *more), keywords

    dtypes = ("bfloat16", "float16", "float32", "float64")
    return {
        **{dtype: [call(operands=_operands(dtype=dtype))] for dtype in dtypes},
        "head dimension 1 to 256": [call(operands=_operands(head_dim=h)) for h in range(1, 257)],
        "head dimension above 256": [call(operands=_operands(head_dim=257))],
        "grouped and multi-query heads": [call(operands=_operands(kv_heads=k)) for k in (1, 2)],
        "causal, both alignments": [
            call(is_causal=True, causal_alignment=a) for a in ("top_left", "bottom_right")
        ],
        "windows, also one-sided": [call(local_window_size=w) for w in (3, (3, 5), (3, None))],
        "lengths": [call(query_seq_lengths=lengths), call(key_value_seq_lengths=lengths)],
        "packed sequences": [call(query_segment_ids=ids, key_value_segment_ids=ids)],
        "boolean masks": [call(None, mask)],
        "block masks (SpargeAttention)": [call(block_mask=tiles, differentiate=True)],
        "additive bias and its gradient": [call(bias, differentiate=True)],
        "differentiable log-sum-exp": [call(return_residual=True, differentiate=True)],
    }


def _operands(*, dtype=jnp.bfloat16, head_dim=H, kv_heads=N):
    key = _array((B, T, kv_heads, head_dim), dtype)
    return _array((B, T, N, head_dim), dtype), key, key


def _array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _markdown(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        if spliced(text) != text:
            sys.exit(f"{README.name} is out of date: run python {sys.argv[0]}.")
    else:
        README.write_text(spliced(text))
