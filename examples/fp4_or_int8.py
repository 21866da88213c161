"""Finds out which layers of a model bear FP4 attention, and which need 8 bits or exact attention.

Takes the model that train_gpt.py leaves behind, or anyone's q, k, v. Compares recipes with exact
float32 attention layer by layer, and writes the cheapest that is accurate enough for each layer to
recipes.json, for sage_jax.load_recipes. Of the model it also measures what that costs in
perplexity, on held-out text.

    python examples/train_gpt.py && python examples/fp4_or_int8.py
    python examples/fp4_or_int8.py --qkv mine.npz --causal --tolerance 0.05
"""

import argparse
import functools
import itertools
import pathlib
import sys
import time

import jax
from flax import nnx

import sage_jax
from gpt import checkpoint, choice, tensors, text
from gpt.options import Parser, count, positive, seed
from sage_jax.recipe import EXACT, Recipe, resolve

_TOLERANCE = 0.1
_RECIPES = "sage3,sage3:published=true,sage2,sage1"
_MODEL = pathlib.Path("demo_output") / "model.npz"
_BATCH = 4  # sequences at once, and those that q, k and v are taken from


def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(arguments)
    losses: dict[str, choice.Loss] = {}
    try:
        recipes = _recipes(options.recipes)
        if options.qkv:
            model, layers = None, tensors.of_file(options.qkv)
        else:
            model, held_out = _model(options)
            layers = tensors.of_model(model, next(held_out)[:, :-1])
        options.output.mkdir(parents=True, exist_ok=True)
        causal = model is not None or options.causal
        measured = {
            name: choice.Layer.measured(name, layer, recipes, options.tolerance, causal)
            for name, layer in layers.items()
        }
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    print("relative L2 error of the output and cosine, next to exact attention")
    print(f"\n{choice.table(measured)}\n")
    chosen = {name: recipes.get(layer.choice, EXACT) for name, layer in measured.items()}
    if model is not None:
        losses = _losses(model, recipes, list(chosen.values()), held_out, options.sequences)
        print(f"{choice.loss_table(losses)}\n")

    about = {
        "source": str(options.qkv or options.model),
        "tolerance": options.tolerance,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "sage_jax": sage_jax.__version__},
        **choice.facts(measured, losses),
    }
    written, picture = options.output / "recipes.json", options.output / "fp4_or_int8.png"
    sage_jax.save_recipes(written, chosen, about=about)
    choice.plot(picture, measured, losses, options.tolerance)
    seconds = time.perf_counter() - started
    print(f"{written} (read it with sage_jax.load_recipes), {picture} ({seconds:.0f} s in all)")
    return 0


def _model(options: argparse.Namespace):
    """The model, and endless batches of held-out text, int32 [_BATCH, context + 1].

    Raises:
      ValueError: there is no such model, or no text for it.
    """
    if not options.model.exists():
        raise ValueError(
            f"there is no {options.model}; `python examples/train_gpt.py` trains a model and "
            f"writes {_MODEL}, or give your own tensors by --qkv"
        )
    loaded = checkpoint.load(options.model)
    shape = loaded.model.shape
    corpus = text.load(options.text or loaded.text, shape.context)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(loaded.model)))
    print(
        f"{size / 1e6:.1f}M parameters, {shape.layers} layers, {shape.heads} heads of "
        f"{shape.head_dim}, context {shape.context}, on {jax.devices()[0].device_kind}; "
        f"held-out text of {corpus.folder}"
    )
    batches = text.batches(
        corpus.held_out, batch=_BATCH, context=shape.context, seed=options.seed
    )  # fmt: skip
    return loaded.model, batches


def _losses(model, recipes, chosen, held_out, sequences) -> dict[str, choice.Loss]:
    """Name -> loss of exact attention, of each recipe in every layer, and of the choice."""
    batches = list(itertools.islice(held_out, -(-sequences // _BATCH)))
    depth = len(model.blocks)
    ways = {EXACT: [EXACT] * depth}
    ways |= {f"all {label}": [recipe] * depth for label, recipe in recipes.items()}
    ways["the choice"] = chosen
    measure = functools.cache(lambda *way: choice.loss(model, list(way), batches))
    return {label: measure(*way) for label, way in ways.items()}


def _recipes(words: str) -> dict[str, Recipe]:
    """Recipes by what the user calls them.

    Raises:
      ValueError: no such recipe or field, or one is named twice.
    """
    recipes = {}
    for word in words.split(","):
        if word in recipes:
            raise ValueError(f"--recipes names {word} twice")
        recipes[word] = resolve(word)
    return recipes


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.split("\n\n    ")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=pathlib.Path, default=_MODEL, metavar="FILE",
        help="model.npz of train_gpt.py; default: %(default)s")  # fmt: skip
    source.add_argument("--qkv", type=pathlib.Path, metavar="FILE",
        help="an .npz file of q [batch, tokens, heads, channels], k and v, or of q0, k0, v0, q1 "
        "and so on for several layers")  # fmt: skip
    add(
        "--causal",
        action="store_true",
        help="tensors of --qkv attend causally; a model always does",
    )
    add("--recipes", default=_RECIPES, metavar="A,B",
        help="recipes from the cheapest to the dearest, with changes as in sage3:published=true; "
        "default: %(default)s")  # fmt: skip
    add("--tolerance", type=positive, default=_TOLERANCE, metavar="X",
        help="relative L2 error that a layer's output may have; default: %(default)s")  # fmt: skip
    add("--sequences", type=count, default=64, metavar="N",
        help="held-out sequences to take the perplexity over; default: %(default)s")  # fmt: skip
    add("--text", type=pathlib.Path, metavar="DIR",
        help="folder of *.py files; default: what the model was trained on")  # fmt: skip
    add("--seed", type=seed, default=0, metavar="N", help="of the choice of held-out sequences")
    add("--output", type=pathlib.Path, default=pathlib.Path("demo_output"), metavar="DIR",
        help="where recipes.json and fp4_or_int8.png go; default: %(default)s")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
