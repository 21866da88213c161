"""Prints the tables of docs/nvfp4.md that measure accuracy on synthetic data; JAX on the CPU does.

    python tools/fp4_accuracy.py [--tokens N] [--seeds N] [accuracy | seeds | gradients ...]

accuracy: each choice of the recipe, mean of seeds 0, 1, 2. seeds: what another seed changes. gradients: what the
backward pass takes from the forward one. Data are `sage_jax.accuracy.synthetic(kind, jax.random.key(seed))`, one
head of 128.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import sage_jax
from sage_jax import _vjp
from sage_jax._ffi import Settings, operation
from sage_jax.accuracy import error, exact, synthetic
from sage_jax.masking import OPEN, Masks

KINDS = ("normal", "outlier", "sharp")
HEAD_DIM = 128
SAGE3 = sage_jax.recipes["sage3"]
PUBLISHED = SAGE3.replace(published=True)
BARE = dict(smooth_q=False, smooth_k=False, smooth_v=False, four_or_six=False)
VARIANTS = {
    "no smoothing": SAGE3.replace(**BARE),
    "K smoothed": SAGE3.replace(**{**BARE, "smooth_k": True}),
    "published": PUBLISHED,
    "and four_or_six": SAGE3.replace(smooth_v=False),
    "and smooth_v, without four_or_six": SAGE3.replace(four_or_six=False),
    "sage3": SAGE3,
    "published, in MXFP4": sage_jax.Recipe("mxfp4", qk="mxfp4", pv="mxfp4", smooth_q=True, smooth_v=False),
    "published, in AMXFP4": sage_jax.Recipe("amxfp4", qk="amxfp4", pv="amxfp4", smooth_q=True, smooth_v=False),
    "sage2": sage_jax.recipes["sage2"],
}


def rel_l2(measured, truth) -> float:
    return error(measured, truth).rel_l2


def accuracy(tokens: int, seeds, variants=VARIANTS) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {variant: relative L2 error of O for each seed}}."""
    found = {kind: {name: [] for name in variants} for kind in KINDS}
    for kind in KINDS:
        for seed in seeds:
            q, k, v, _ = synthetic(kind, jax.random.key(seed), tokens=tokens, head_dim=HEAD_DIM)
            truth = exact(q, k, v)["o"]
            for name, recipe in variants.items():
                out = sage_jax.dot_product_attention(q, k, v, recipe=recipe)
                found[kind][name].append(rel_l2(out, truth))
    return {kind: {name: np.array(x) for name, x in errors.items()} for kind, errors in found.items()}


def gradients(tokens: int, seeds) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {whose LSE and O: mean relative L2 errors of dQ, dK, dV}} of sage3 with backward="train8"."""
    settings = Settings(
        recipe=SAGE3.replace(backward="train8"), scale=HEAD_DIM**-0.5, window_left=OPEN, window_right=OPEN,
        head_dim=HEAD_DIM, dtype=np.dtype("float32"),
    )  # fmt: skip
    found = {kind: [_gradient_errors(settings, kind, tokens, seed) for seed in seeds] for kind in KINDS}
    return {
        kind: {name: np.mean([one[name] for one in errors], axis=0) for name in errors[0]}
        for kind, errors in found.items()
    }


def _gradient_errors(settings, kind, tokens, seed):
    q, k, v, dout = synthetic(kind, jax.random.key(seed), tokens=tokens, head_dim=HEAD_DIM)
    truth = exact(q, k, v, dout)
    masks = Masks(jnp.array([[tokens, tokens, 0]], jnp.int32), None, None, None, None)
    (out4, lse4), (kept, _) = _vjp._attention_fwd(settings, q, k, v, masks)
    *kept, m, l, out = kept
    lse = sage_jax.dot_product_attention(q, k, v, recipe="train8", return_residual=True)[1]
    l4 = l * jnp.exp(lse4 - jnp.swapaxes(lse, 1, 2))  # with the same m, the rows' sums that FP4 scores have
    errors = {}
    for name, residuals in (
        ("LSE and O of INT8 scores", (m, l, out)),
        ("LSE of INT8 scores, O of FP4", (m, l, out4)),
        ("LSE and O of FP4", (m, l4, out4)),
    ):
        operands = *kept, *residuals, dout, jnp.zeros_like(m), *masks
        results = operation("attend_backward", _vjp._for_backward(settings))(*operands)[:3]
        errors[name] = [rel_l2(x, truth[tensor]) for x, tensor in zip(results, ("dq", "dk", "dv"), strict=True)]
    return errors


def print_table(rows: dict[str, list[str]]):
    print(f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print(flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("accuracy", "seeds", "gradients")
    parser.add_argument("tables", nargs="*", help="which (default: all)")
    parser.add_argument("--tokens", type=int, help="default: 2048, and 1024 for gradients")
    parser.add_argument("--seeds", type=int, help="how many (default: 3, 12 and 2)")
    options = parser.parse_args(argv)
    if any(n is not None and n < 1 for n in (options.tokens, options.seeds)):
        parser.error("--tokens and --seeds are at least 1")
    if unknown := set(options.tables) - set(tables):
        parser.error(f"there is no table {', '.join(sorted(unknown))}; the tables are {', '.join(tables)}")
    seeds = lambda default: range(options.seeds or default)  # noqa: E731
    wanted = options.tables or tables
    if "accuracy" in wanted:
        found = accuracy(options.tokens or 2048, seeds(3))
        print_table({name: [f"{found[kind][name].mean():.4f}" for kind in KINDS] for name in VARIANTS})
    if "seeds" in wanted:
        found = accuracy(options.tokens or 2048, seeds(12), {"sage3": SAGE3, "published": PUBLISHED})
        cells = {"seed 0": lambda x: f"{x[0]:.4f}", "mean": lambda x: f"{x.mean():.4f}",
                 "range": lambda x: f"{x.min():.4f} to {x.max():.4f}"}  # fmt: skip
        print_table({f"{name}, {label}": [cell(found[kind][name]) for kind in KINDS]
                     for name in ("sage3", "published") for label, cell in cells.items()})  # fmt: skip
    if "gradients" in wanted:
        found = gradients(options.tokens or 1024, seeds(2))
        print_table({name: [", ".join(f"{x:.4f}" for x in found[kind][name]) for kind in KINDS]
                     for name in found[KINDS[0]]})  # fmt: skip


if __name__ == "__main__":
    main()
