"""Speed and accuracy of every recipe next to other attention implementations.

    python benchmarks/attention.py                      # on a GPU: about 20 minutes
    python benchmarks/attention.py --budget-seconds 300 # the most important rows first; run it
                                                        # again to measure the rest
    python benchmarks/attention.py --preset cpu         # a small grid, without a GPU

It writes `benchmarks/results/<gpu>.json` after every measurement, so that it may be stopped at any
time, and prints a table. Inputs and results are bfloat16; quantization is part of every figure.
TFLOPS count 4·B·N·T·S·H operations forward, 2.5 times that backward, half of it when causal. All
implementations of one line of the grid are timed in one process, in turns, on the same inputs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a plain checkout too

import commandline  # noqa: E402
import contenders  # noqa: E402
import measuring  # noqa: E402
import resultfile  # noqa: E402

from sage_jax import accuracy  # noqa: E402
from sage_jax.recipe import MAX_HEAD_DIM, PRESETS, Recipe  # noqa: E402

PASSES = ("fwd", "bwd", "fwd_bwd", "quantize")
DATA = ("normal", "outlier", "sink", "sigma3")
VARIANTS = ("train8:delta=exact", "train8:pv=bf16")  # gradients that err less, for some time
PRESET_VALUES = {
    "gpu": {
        "implementation": "cuda",
        "peers": list(contenders.PEERS),
        "tokens": 16384,
        "channels": 2048,
        "seq": [16384, 4096, 1024],
        "head_dim": [128, 64],
        "accuracy_seq": 4096,
        "seconds": 0.05,
    },
    "cpu": {
        "implementation": "cpu",
        "peers": ["xla"],
        "tokens": 512,
        "channels": 128,
        "seq": [512, 256],
        "head_dim": [64],
        "accuracy_seq": 256,
        "seconds": 0.02,
    },
}


class Line(NamedTuple):
    """One line of the speed grid; all implementations are timed on it together."""

    kind: str
    batch: int
    seq: int
    heads: int
    head_dim: int
    causal: bool

    def row(self, contender: contenders.Contender, seconds: float) -> dict[str, Any]:
        return {
            "pass": self.kind,
            "impl": contender.impl,
            "recipe": contender.recipe,
            "batch": self.batch,
            "seq": self.seq,
            "heads": self.heads,
            "kv_heads": self.heads,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "ms": measuring.digits(1e3 * seconds),
            "tflops": self.tflops(seconds),
        }

    def tflops(self, seconds: float) -> float | None:
        """None for quantization, which has no matrix products."""
        forward = 4.0 * self.batch * self.heads * self.seq**2 * self.head_dim
        factor = {"fwd": 1.0, "bwd": 2.5, "fwd_bwd": 3.5}.get(self.kind)
        operations = factor and factor * forward * (0.5 if self.causal else 1)
        return operations and measuring.digits(operations / seconds / 1e12)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of q, k, v and dout: [B, T, N, H]."""
        return self.batch, self.seq, self.heads, self.head_dim

    def inputs(self) -> list[jax.Array]:
        """q, k, v, dout: normal values in bfloat16."""
        keys = jax.random.split(jax.random.key(self.seq), 4)
        return [jax.random.normal(key, self.shape).astype(jnp.bfloat16) for key in keys]

    def owns(self, row: dict[str, Any]) -> bool:
        return (row["pass"], *(row[field] for field in self._fields[1:])) == tuple(self)


class Case(NamedTuple):
    """One line of the accuracy grid: one head."""

    data: str
    seq: int
    head_dim: int

    def owns(self, row: dict[str, Any]) -> bool:
        return (row["data"], row["seq"], row["head_dim"]) == tuple(self)


def plan(options: argparse.Namespace) -> list[Line | Case]:
    """The grid, the most telling measurements first."""
    lines = [
        Line(kind, options.tokens // seq, seq, options.channels // dim, dim, causal)
        for kind, seq, dim, causal in itertools.product(
            options.passes, options.seq, options.head_dim, (False, True)
        )
        if not (kind == "quantize" and causal)
    ]

    def late(line: Line) -> int:
        return (
            PASSES.index(line.kind)
            + 2 * options.seq.index(line.seq)
            + 3 * options.head_dim.index(line.head_dim)
            + line.causal
        )

    lines.sort(key=late)
    cases = []
    if options.accuracy:
        cases = [Case(data, options.accuracy_seq, dim) for dim in options.head_dim for data in DATA]
    return [*lines[:8], *cases, *lines[8:]]


def add_contestants(
    parser: argparse.ArgumentParser,
    recipes: Sequence[str],
    peers: str,
    ours: str = "that of the device",
) -> None:
    """Adds the options that `contestants` reads.

    Args:
      recipes: names of those measured by default.
      peers: the help on the default peers.
      ours: which implementation of sage_jax is the default.
    """
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=commandline.recipe,
        default=[commandline.recipe(name) for name in recipes],
        metavar="RECIPE",
        help=f"name, or a variant such as train8:delta=exact (default: {' '.join(recipes)})",
    )
    parser.add_argument("--peers", nargs="*", choices=contenders.PEERS, help=peers)
    parser.add_argument(
        "--implementation",
        choices=("cpu", "cuda", "reference"),
        help=f"sage_jax's implementation to measure (default: {ours})",
    )


def add_timing(
    parser: argparse.ArgumentParser, passes: Collection[str], repeats: int, seconds: float | None = None
) -> None:
    """Adds the options of which passes are timed, and how long; `seconds` None leaves it to the device's preset."""
    count, number = commandline.positive(int), commandline.positive(float)
    least = "" if seconds is None else f" (default: {seconds})"
    parser.add_argument("--passes", nargs="+", choices=passes, default=list(passes), help="(default: all)")
    parser.add_argument(
        "--repeats", type=count, default=repeats, help=f"samples of each median (default: {repeats})"
    )
    parser.add_argument("--seconds", type=number, default=seconds, help=f"least duration of a sample{least}")


def contestants(options: argparse.Namespace, *, training: bool = False) -> list[contenders.Contender]:
    """Our recipes and the peers that are installed, with `training` those that have gradients; says which are not, and why."""
    found = [contenders.ours(recipe, options.implementation) for recipe in options.recipes]
    for name in options.peers:
        try:
            peer = contenders.PEERS[name]()
        except Exception as reason:  # noqa: BLE001  (whatever a peer raises on import)
            print(f"left out: {name}: {measuring.sentence(reason)}")
            continue
        if training and not peer.differentiable:
            print(f"left out: {name}: it is timed forward only, and this measures training")
            continue
        found.append(peer)
    return found


def speed_runs(line: Line, contender: contenders.Contender, inputs):
    """A function without arguments that does the pass once, or None where it does not apply.

    It is the `functools.partial` of a jitted function and its arguments. Except for "bwd", `inputs`
    may be of `jax.ShapeDtypeStruct`; such a function can be compiled, not called.
    """
    q, k, v, dout = inputs
    call = functools.partial(contender.call, causal=line.causal)
    if line.kind == "quantize":
        if contender.quantize is None:
            return None
        return functools.partial(jax.jit(contender.quantize), q, k, v)
    if line.kind == "fwd":
        return functools.partial(jax.jit(call), *_prepared(contender, q, k, v))
    if not contender.differentiable:
        return None
    if line.kind == "bwd":
        _, pull = jax.jit(lambda q, k, v: jax.vjp(call, q, k, v))(q, k, v)
        return functools.partial(jax.jit(lambda pull, dout: pull(dout)), pull, dout)

    def both(q, k, v, dout):
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(dout)

    return functools.partial(jax.jit(both), q, k, v, dout)


def _prepared(contender: contenders.Contender, *operands):
    if contender.prepare is None:
        return operands
    if isinstance(operands[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(contender.prepare, *operands)
    return jax.block_until_ready(jax.jit(contender.prepare)(*operands))


def measure_speed(line: Line, entrants, options) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one line of the grid, and the sentences on those that could not run."""
    inputs, runs, failures = line.inputs(), {}, []
    for contender in entrants:
        if line.batch * line.heads * line.seq**2 > contender.largest_scores:
            continue
        try:
            run = speed_runs(line, contender, inputs)
            if run is not None:
                jax.block_until_ready(run())
                runs[contender.label] = run
        except Exception as reason:  # noqa: BLE001  (one must not cost the others their line)
            failures.append(f"{contender.label}: {measuring.sentence(reason)}")
    seconds = measuring.interleaved_medians(runs, options.repeats, options.seconds)
    return [line.row(c, seconds[c.label]) for c in entrants if c.label in runs], failures


def measure_accuracy(case: Case, entrants, options) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one line of the accuracy grid: bfloat16 inputs against float32 attention on them."""
    inputs = accuracy.synthetic(
        case.data, jax.random.key(0), tokens=case.seq, head_dim=case.head_dim, dtype=jnp.bfloat16
    )
    *operands, dout = inputs
    exact = accuracy.exact(*operands, dout)
    rows, failures = [], []
    for contender in entrants:
        if contender.prepare is not None:
            continue
        try:
            measured = jax.block_until_ready(_all_tensors(contender)(*operands, dout))
        except Exception as reason:  # noqa: BLE001
            failures.append(f"{contender.label}: {measuring.sentence(reason)}")
            continue
        for tensor, value in measured.items():
            error = accuracy.error(value, exact[tensor])
            rows.append(
                {
                    "impl": contender.impl,
                    "recipe": contender.recipe,
                    "data": case.data,
                    "seq": case.seq,
                    "head_dim": case.head_dim,
                    "tensor": tensor,
                    "cos": measuring.digits(error.cos, 8),
                    "rel_l2": measuring.digits(error.rel_l2),
                }
            )
    return rows, failures


@functools.cache  # compiled once, not once for each kind of data
def _all_tensors(contender: contenders.Contender):
    """A function (q, k, v, dout) -> {"o": out, and the gradients if there are any}."""

    @jax.jit
    def run(q, k, v, dout):
        call = functools.partial(contender.call, causal=False)
        if not contender.differentiable:
            return {"o": call(q, k, v)}
        out, pull = jax.vjp(call, q, k, v)
        return {"o": out} | dict(zip(("dq", "dk", "dv"), pull(dout), strict=True))

    return run


def done(step: Line | Case, results: dict[str, Any], recipes: list[Recipe]) -> bool:
    """Whether an earlier run has this step, with all the recipes of this one."""
    rows = [
        row for row in results["speed" if isinstance(step, Line) else "accuracy"] if step.owns(row)
    ]
    needs_backward = isinstance(step, Line) and "bwd" in step.kind
    wanted = {r.name for r in recipes if r.backward or not needs_backward}
    return bool(rows) and wanted <= {row["recipe"] for row in rows}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked and completed from the preset."""
    parser = commandline.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, number, count = parser.add_argument, commandline.positive(float), commandline.positive(int)
    add("--preset", choices=PRESET_VALUES, help="grid to start from (default: by JAX's device)")
    add(
        "--output", type=pathlib.Path, help="file to write (default: benchmarks/results/<gpu>.json)"
    )
    add("--fresh", action="store_true", help="measure everything again, ignoring an earlier file")
    add("--budget-seconds", type=number, help="stop starting measurements after this time")
    add(
        "--tests",
        type=pathlib.Path,
        help="junit file of pytest, for the test counts in the results",
    )
    add_contestants(
        parser,
        # FP4: docs/nvfp4.md
        [*(name for name, recipe in PRESETS.items() if not recipe.fp4), *VARIANTS],
        peers="implementations to compare with",
        ours="the preset's, cuda or cpu",
    )
    add("--seq", nargs="+", type=count, help="sequence lengths, the most important first")
    add("--head-dim", nargs="+", type=count, help="head dimensions, likewise")
    add("--tokens", type=count, help="tokens in the batch: sequence length times batch")
    add("--channels", type=count, help="head dimension times heads")
    add("--accuracy-seq", type=count, help="tokens of the accuracy measurements")
    add("--no-accuracy", dest="accuracy", action="store_false", help="measure speed only")
    add_timing(parser, PASSES, repeats=5)
    options = parser.parse_args(arguments)
    options.preset = options.preset or measuring.preset()
    commandline.complete(options, PRESET_VALUES[options.preset])
    for seq, dim in itertools.product(options.seq, options.head_dim):
        if options.tokens % seq:
            parser.error(f"--tokens {options.tokens} is no multiple of the sequence length {seq}")
        if options.channels % dim:
            parser.error(
                f"--channels {options.channels} is no multiple of the head dimension {dim}"
            )
    if max(options.head_dim) > MAX_HEAD_DIM:
        parser.error(f"--head-dim {max(options.head_dim)} is above {MAX_HEAD_DIM}, the largest")
    if options.output and options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; name the .json file to write")
    if options.tests and not options.tests.exists():
        parser.error(f"--tests {options.tests} does not exist; pass what pytest --junitxml wrote")
    return options


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    head = measuring.environment()
    path = options.output or measuring.results_path(head["gpu"])
    results = resultfile.earlier(path, head, options.fresh)
    if options.tests:
        results["tests"] = measuring.count_tests(options.tests)
    entrants = contestants(options)
    steps = [step for step in plan(options) if not done(step, results, options.recipes)]
    ours_failed = False
    for number, step in enumerate(steps, 1):
        elapsed = time.monotonic() - start
        if options.budget_seconds and elapsed > options.budget_seconds:
            print(f"the budget is spent: {len(steps) - number + 1} measurements are left for later")
            break
        print(f"[{number}/{len(steps)}, {elapsed:.0f} s] {describe(step)}", flush=True)
        part = "speed" if isinstance(step, Line) else "accuracy"
        measure = measure_speed if isinstance(step, Line) else measure_accuracy
        rows, failures = measure(step, entrants, options)
        for failure in failures:
            print(f"  could not run {failure}")
            ours_failed |= failure.startswith("sage_jax")
        results[part] = [row for row in results[part] if not step.owns(row)] + rows
        resultfile.store(path, results)
    resultfile.store(path, results)
    if results["speed"]:
        print(f"\n{resultfile.speed_table(results)}")
    if results["accuracy"]:
        print(f"\nrelative L2 errors\n{resultfile.accuracy_table(results)}")
    print(f"\n{path}")
    return 1 if ours_failed else 0


def describe(step: Line | Case) -> str:
    return ", ".join(f"{name} {value}" for name, value in step._asdict().items())


if __name__ == "__main__":
    sys.exit(main())
