"""Time of block-sparse attention over the share of blocks that it keeps.

    python benchmarks/sparse.py                      # on a GPU: 32768 tokens, heads of 128 and 64
    python benchmarks/sparse.py --shares 0.5 0.1     # of the blocks

Each line of the grid has our dense attention, a peer, and the same attention with the blocks that `sage_jax.sparge` chooses by the
share asked for. Choosing them is part of every sparse figure, and a row of its own ("select"). Values are normal, so the
chosen blocks lie scattered, which is the worst for time; a share says nothing of accuracy, which depends on the data. "tflops"
counts the operations of dense attention, done or not. It writes `<gpu>-sparse.json`; "density" is the share of all tiles of
64 × 64 that stay (of a causal mask's too: half of those are never seen).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a plain checkout too

import attention  # noqa: E402
import commandline  # noqa: E402
import contenders  # noqa: E402
import measuring  # noqa: E402
import resultfile  # noqa: E402
from lengths import PASSES  # noqa: E402

import sage_jax  # noqa: E402
from sage_jax import sparge  # noqa: E402
from sage_jax.recipe import MAX_HEAD_DIM  # noqa: E402

PRESET_VALUES = {
    "gpu": {
        "implementation": "cuda",
        "peers": ["cudnn_bf16"],
        "lengths": [32768],
        "dims": [128, 64],
        "channels": 2048,
    },
    "cpu": {"implementation": "cpu", "peers": ["xla"], "lengths": [1024], "dims": [64], "channels": 128},
}


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A share of the blocks, of every block of queries alike."""

    share: float

    @property
    def selection(self) -> sparge.Selection:
        return sparge.Selection(top_k=self.share, similarity_threshold=-1)

    def mask(self, q, k, causal):
        return sparge.block_mask(q, k, self.selection, is_causal=causal)

    def contender(self, recipe, implementation) -> contenders.Contender:
        def call(q, k, v, causal):
            return sage_jax.dot_product_attention(
                q, k, v, is_causal=causal, recipe=recipe, implementation=implementation, block_mask=self.mask(q, k, causal)
            )

        trains = recipe.backward is not None
        return contenders.Contender("sage_jax", f"{recipe.name} {self.share:g}", call, differentiable=trains)


def plan(options: argparse.Namespace) -> list[attention.Line]:
    return [
        attention.Line(PASSES[name], 1, length, options.channels // dim, dim, causal)
        for dim, length, causal, name in itertools.product(options.dims, options.lengths, (False, True), options.passes)
    ]


def measure(line: attention.Line, dense, sparse, options) -> tuple[list[dict], list[str]]:
    """Rows of one line, and the sentences on what could not run.

    Args:
      dense: contenders.
      sparse: label of a contender -> (the contender, what it keeps).
    """
    entrants = [*dense, *(contender for contender, _ in sparse.values())]
    rows, failures = attention.measure_speed(line, entrants, options)
    q, k, *_ = line.inputs()
    for row in rows:
        _, kept = sparse.get(f"{row['impl']} {row['recipe']}", (None, None))
        if kept:
            density = jax.jit(lambda q, k, kept=kept: kept.mask(q, k, line.causal).mean())(q, k)
            row |= {"share": kept.share, "density": measuring.digits(float(density), 3)}
    if line.kind == "fwd":
        choose = jax.jit(functools.partial(Sparse(options.shares[0]).mask, causal=line.causal))
        run = {"select": functools.partial(choose, q, k)}
        seconds = measuring.interleaved_medians(run, options.repeats, options.seconds)["select"]
        rows.append(line.row(contenders.Contender("sage_jax", "select", None), seconds) | {"tflops": None})
    return rows, [f"{text} ({attention.describe(line)})" for text in failures]


def share(text: str) -> float:
    value = commandline.positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1, all of the blocks")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked and completed from the device's preset."""
    parser = commandline.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, commandline.positive(int)
    add("--lengths", nargs="+", type=count, help="tokens of one sequence")
    add("--dims", nargs="+", type=count, help="head dimensions")
    add("--channels", type=count, help="heads times head dimension (default: 2048)")
    add("--shares", nargs="+", type=share, default=[0.5, 0.25, 0.125], help="of the blocks (default: .5 .25 .125)")
    attention.add_contestants(parser, ["train8"], peers="(default: cudnn_bf16)")
    attention.add_timing(parser, PASSES, repeats=5, seconds=0.02)
    commandline.add_folder(parser, "where <gpu>-sparse.json goes (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    commandline.complete(options, PRESET_VALUES[measuring.preset()])
    for dim in options.dims:
        if dim > MAX_HEAD_DIM or options.channels % dim:
            parser.error(f"--dims {dim} is above {MAX_HEAD_DIM} or does not divide --channels {options.channels}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    head = measuring.environment()
    path = measuring.results_path(head["gpu"], "sparse", options.out)
    dense = attention.contestants(options)
    sparse = {}
    for recipe, kept in itertools.product(options.recipes, map(Sparse, options.shares)):
        contender = kept.contender(recipe, options.implementation)
        sparse[contender.label] = contender, kept
    rows, failures, lines = [], [], plan(options)
    for number, line in enumerate(lines, 1):
        print(f"[{number}/{len(lines)}] {attention.describe(line)}", flush=True)
        measured, failed = measure(line, dense, sparse, options)
        rows += measured
        failures += failed
    resultfile.store(path, {**head, "samples": options.repeats, "left_out": failures, "speed": rows})
    print(f"\n{resultfile.speed_table({'speed': rows})}\n")
    for text in failures:
        print(f"could not run {text}")
    print(path)
    return 1 if any(text.startswith("sage_jax") for text in failures) else 0


if __name__ == "__main__":
    raise SystemExit(main())
