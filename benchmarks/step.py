"""Where the time of a training step goes: attention, and all else.

    python benchmarks/step.py                                # a GPT of 101M parameters on a GPU
    python benchmarks/step.py --contexts 16384 --kernels 12  # and the kernels that take longest

The step is the gradient of the GPT of examples/train_gpt.py, with the same parameters and bytes for
every implementation of attention. For each it prints, in ms,

  step       from the call to the result on the host, the median of several
  device     how long the GPU's kernels and copies ran in one step, by JAX's profiler
  attention  those of them that are attention's own, quantization included

Kernels that run beside one another count twice. A CPU's profile has no kernels: there is the step
alone. XLA's attention has no kernels of its own: there is no line between it and all else.
"""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / name) for name in ("benchmarks", "examples"))]

import attention  # noqa: E402
import commandline  # noqa: E402
import contenders  # noqa: E402
import measuring  # noqa: E402

from sage_jax.accuracy_report import format_table  # noqa: E402

# What the kernels of attention are called: ours, cuDNN's, and those around cuDNN's backward pass.
ATTENTION = ("sage::", "sdpa", "cudnn::fusion", "flash")
PROFILED = 3  # steps
PRESET_VALUES = {
    "gpu": {"implementation": "cuda", "peers": ["cudnn_bf16"], "contexts": [4096, 16384],
            "tokens": 16384, "layers": 8, "heads": 8, "head_dim": 128},
    "cpu": {"implementation": "cpu", "peers": ["xla"], "contexts": [128, 512], "tokens": 512,
            "layers": 2, "heads": 2, "head_dim": 64},
}  # fmt: skip


class Step(NamedTuple):
    """Milliseconds of one step; `kernels` has those of each kernel, and is empty on a CPU."""

    total: float
    kernels: dict[str, float]

    @property
    def device(self) -> float | None:
        return sum(self.kernels.values()) if self.kernels else None

    @property
    def attention(self) -> float | None:
        own = [ms for name, ms in self.kernels.items() if any(word in name for word in ATTENTION)]
        return sum(own) if own else None


def measure(contender: contenders.Contender, context: int, options) -> Step:
    """Compiles the gradient step of the GPT with this attention, times it, then profiles it."""
    from flax import nnx
    from gpt.model import GPT, Shape
    from gpt.training import loss_function

    shape = Shape(options.layers, options.heads, options.head_dim, context, jnp.bfloat16)
    graph, state = nnx.split(GPT(shape, rngs=nnx.Rngs(0)))
    parameters, tree = jax.tree.flatten(state)
    loss = loss_function(graph, functools.partial(contender.call, causal=True))
    batch = options.tokens // context
    tokens = np.random.default_rng(0).integers(0, 256, (batch, context + 1)).astype(np.int32)
    step = jax.jit(jax.value_and_grad(lambda leaves, x: loss(tree.unflatten(leaves), x)))
    step = step.lower(parameters, tokens).compile()

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(parameters, tokens))
        return time.perf_counter() - start

    for _ in range(2):
        seconds()
    total = statistics.median(seconds() for _ in range(options.repeats))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                seconds()
        kernels = kernel_seconds(pathlib.Path(folder))
    return Step(1e3 * total, {name: 1e3 * s / PROFILED for name, s in kernels.items()})


def kernel_seconds(folder: pathlib.Path) -> dict[str, float]:
    """Seconds of each kernel in the profile that `jax.profiler.trace` left there, all streams added up."""
    total: collections.Counter[str] = collections.Counter()
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):  # other lines name the same time otherwise
                    for event in line.events:
                        total[event.name] += event.duration_ns * 1e-9
    return dict(total)


def table(rows: list[tuple[int, str, Step]]) -> str:
    """A line for each context and implementation."""

    def cell(ms: float | None) -> str:
        return "–" if ms is None else f"{ms:.1f}"

    cells = []
    for context, label, step in rows:
        rest = None if step.attention is None else step.device - step.attention
        times = (step.total, step.device, step.attention, rest)
        cells.append([str(context), label, *map(cell, times)])
    header = ["context", "attention of", "step, ms", "device", "attention", "all else"]
    return "\n".join(format_table(header, cells))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = commandline.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, commandline.positive(int)
    add("--contexts", nargs="+", type=count, help="(default: 4096 16384; on a CPU 128 512)")
    add(
        "--tokens",
        type=count,
        help="of a step, in all its sequences (default: 16384; on a CPU 512)",
    )
    add("--layers", type=count, help="of the GPT (default: 8; on a CPU 2)")
    add("--heads", type=count, help="(default: 8; on a CPU 2)")
    add("--head-dim", type=count, help="(default: 128; on a CPU 64)")
    attention.add_contestants(parser, ["train8"], peers="(default: cudnn_bf16; on a CPU xla)")
    add(
        "--repeats", type=count, default=10, help="steps of which the median is taken (default: 10)"
    )
    add("--kernels", type=count, metavar="N", help="also print the N kernels that take longest")
    options = parser.parse_args(arguments)
    commandline.complete(options, PRESET_VALUES[measuring.preset()] | {"kernels": 0})
    for context in options.contexts:
        if options.tokens % context:
            parser.error(f"--tokens {options.tokens} is no multiple of the context {context}")
    commandline.check_gpt(parser, options.head_dim)
    commandline.check_trainable(parser, options.recipes)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows, failures = [], []
    for context in options.contexts:
        for contender in attention.contestants(options, training=True):
            print(f"context {context}: {contender.label}", flush=True)
            try:
                rows.append((context, contender.label, measure(contender, context, options)))
            except Exception as reason:  # noqa: BLE001  (one must not cost the others their row)
                failures.append(f"{contender.label}: {measuring.sentence(reason)}")
    if rows:
        print(f"\n{table(rows)}")
    for context, label, step in rows:
        longest = sorted(step.kernels.items(), key=lambda kernel: -kernel[1])[: options.kernels]
        if longest:
            print(f"\n{label}, context {context}")
            print("\n".join(f"{ms:9.3f} ms  {name[:120]}" for name, ms in longest))
    for text in failures:
        print(f"could not run {text}")
    return 1 if any(text.startswith("sage_jax") for text in failures) else 0


if __name__ == "__main__":
    sys.exit(main())
