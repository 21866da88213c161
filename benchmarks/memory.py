"""What attention keeps and asks for in memory, next to other implementations. Nothing is run.

    python benchmarks/memory.py                      # on a GPU: 16384 tokens × 2048 channels
    python benchmarks/memory.py --no-model           # attention alone, soon done
    python benchmarks/memory.py --checkpoint none blocks residuals --out somewhere

All figures are bytes in XLA's plans of compiled programs, for one causal sequence in bfloat16 (the
tables show MiB):

  kept         all that attention keeps between its forward and its backward pass
  temporaries  what the compiled backward pass needs besides operands and results
  peak         arguments, results and temporaries of a gradient step of the GPT of
               examples/train_gpt.py, float32 parameters included, optimizer's state not

On a CPU the kernels' own scratch is missing from the plans. A GPU's compiler computes values again
by itself where a step would not fit the device's memory; compare on a device on which it fits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / name) for name in ("benchmarks", "examples"))]

import attention  # noqa: E402
import commandline  # noqa: E402
import contenders  # noqa: E402
import measuring  # noqa: E402
import resultfile  # noqa: E402

import sage_jax  # noqa: E402
from sage_jax.accuracy_report import format_table  # noqa: E402
from sage_jax.recipe import MAX_HEAD_DIM  # noqa: E402

BARS = {"kept": 0.65, "temporaries": 1.3}  # largest ratio to the first peer that is accepted
CHECKPOINTS = {  # which values besides its input a block of the GPT keeps; none: it keeps all
    "none": None,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "residuals": jax.checkpoint_policies.save_only_these_names(sage_jax.RESIDUALS),
}
PRESET_VALUES = {
    "gpu": {"implementation": "cuda", "peers": ["cudnn_bf16"], "tokens": 16384, "channels": 2048,
            "head_dim": 128, "layers": 24},
    "cpu": {"implementation": "cpu", "peers": ["xla"], "tokens": 512, "channels": 128,
            "head_dim": 64, "layers": 2},
}  # fmt: skip


def of_attention(contender: contenders.Contender, shape) -> dict[str, Any]:
    """Bytes of one attention alone. shape: [B, T, N, H] of q, k and v."""
    call = functools.partial(contender.call, causal=True)
    operand = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    out, pull = jax.eval_shape(lambda q, k, v: jax.vjp(call, q, k, v), *[operand] * 3)
    backward = jax.jit(lambda pull, dout: pull(dout)).lower(pull, out).compile()
    return {
        "impl": contender.impl,
        "recipe": contender.recipe,
        "kept": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull)),
        "temporaries": measuring.Planned.of(backward).temporaries,
    }


def of_model(contender: contenders.Contender, checkpoint: str, options) -> dict[str, Any]:
    """Bytes of a gradient step of the GPT with this attention in every layer."""
    from flax import nnx
    from gpt.model import GPT, Shape
    from gpt.training import loss_function

    class Checkpointed(nnx.Module):
        """A block that computes again, in the backward pass, what the policy does not save."""

        def __init__(self, block):
            self.block = block

        def __call__(self, x, positions, attend):
            again = lambda x: self.block(x, positions, attend)
            return jax.checkpoint(again, policy=CHECKPOINTS[checkpoint])(x)

    def model():
        made = GPT(shape, rngs=nnx.Rngs(0))
        if CHECKPOINTS[checkpoint]:
            made.blocks = nnx.List([Checkpointed(block) for block in made.blocks])
        return made

    heads = options.channels // options.head_dim
    shape = Shape(options.layers, heads, options.head_dim, options.tokens, jnp.bfloat16)
    graph, parameters = nnx.split(nnx.eval_shape(model))
    loss = loss_function(graph, functools.partial(contender.call, causal=True))
    tokens = jax.ShapeDtypeStruct((1, options.tokens + 1), jnp.int32)
    step = jax.jit(jax.value_and_grad(loss)).lower(parameters, tokens).compile()
    planned = measuring.Planned.of(step)
    return {
        "impl": contender.impl,
        "recipe": contender.recipe,
        "checkpoint": checkpoint,
        **planned._asdict(),
        "peak": planned.peak,
    }


def with_ratios(rows: list[dict[str, Any]], peer: str | None, *fields: str) -> None:
    """Adds to each row "<field>_ratio", that to the peer's row; None without one or one of 0."""
    for row in rows:
        same = (
            r for r in rows if r["impl"] == peer and r.get("checkpoint") == row.get("checkpoint")
        )
        reference = next(same, {})
        for field in fields:
            base = reference.get(field)
            row[f"{field}_ratio"] = measuring.digits(row[field] / base) if base else None


def table(rows: list[dict[str, Any]], peer: str | None, fields: list[str]) -> str:
    """MiB of each field, and its ratio to the peer's where there is one."""
    checkpoint = ["checkpoint"] if "checkpoint" in rows[0] else []
    header, cells = ["implementation", *checkpoint], []
    for field in fields:
        header += [f"{field}, MiB", *([f"× {peer}"] if f"{field}_ratio" in rows[0] else [])]
    for row in rows:
        line = [" ".join(filter(None, (row["impl"], row["recipe"]))), *(row[c] for c in checkpoint)]
        for field in fields:
            line.append(f"{row[field] / 2**20:,.1f}")
            if f"{field}_ratio" in row:
                ratio = row[f"{field}_ratio"]
                line.append("–" if ratio is None else f"{ratio:.3f}")
        cells.append(line)
    return "\n".join(format_table(header, cells))


def verdicts(rows: list[dict[str, Any]], peer: str | None) -> list[str]:
    """A sentence for each of our recipes and each bar."""
    return [
        f"sage_jax {row['recipe']}: {field} {ratio:.3f} of {peer}'s, "
        f"{'within' if ratio <= bar else 'ABOVE'} the bar of {bar}"
        for row in rows
        for field, bar in BARS.items()
        if row["impl"] == "sage_jax" and (ratio := row[f"{field}_ratio"]) is not None
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked and completed from the device's preset."""
    parser = commandline.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, commandline.positive(int)
    add("--tokens", type=count, help="tokens of the sequence (default: 16384; on a CPU 512)")
    add("--channels", type=count, help="head dimension times heads (default: 2048; on a CPU 128)")
    add("--head-dim", type=count, help="(default: 128; on a CPU 64)")
    add("--layers", type=count, help="of the GPT (default: 24; on a CPU 2)")
    attention.add_contestants(
        parser,
        ["train8"],
        peers="ratios are to the first (default: cudnn_bf16; on a CPU xla)",
    )
    add(
        "--checkpoint",
        nargs="+",
        choices=CHECKPOINTS,
        default=["none"],
        help="what the GPT's blocks keep: all (none), their inputs (blocks), or also what our "
        "attention keeps (residuals) (default: none)",
    )
    add("--no-model", dest="model", action="store_false", help="attention alone, without the GPT")
    commandline.add_folder(parser, "write <gpu>-memory.json there (default: only print)")
    options = parser.parse_args(arguments)
    commandline.complete(options, PRESET_VALUES[measuring.preset()])
    if options.channels % options.head_dim:
        parser.error(
            f"--channels {options.channels} is no multiple of the head dimension {options.head_dim}"
        )
    if options.head_dim > MAX_HEAD_DIM:
        parser.error(f"--head-dim {options.head_dim} is above {MAX_HEAD_DIM}, the largest")
    if options.model:
        commandline.check_gpt(parser, options.head_dim, ", or give --no-model")
    commandline.check_trainable(parser, options.recipes)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    head, entrants = measuring.environment(), attention.contestants(options, training=True)
    heads = options.channels // options.head_dim
    shape = (1, options.tokens, heads, options.head_dim)
    steps = [("attention", c, functools.partial(of_attention, c, shape)) for c in entrants]
    if options.model:
        steps += [
            (f"model, checkpoint {kind}", c, functools.partial(of_model, c, kind, options))
            for kind, c in itertools.product(options.checkpoint, entrants)
        ]
    rows, left_out = {"attention": [], "model": []}, []
    for name, contender, compiles in steps:
        print(f"compiling {name}: {contender.label}", flush=True)
        try:
            rows[name.partition(",")[0]].append(compiles())
        except Exception as reason:  # noqa: BLE001  (one must not cost the others their row)
            left_out.append(f"{contender.label} ({name}): {measuring.sentence(reason)}")
    peer = next((row["impl"] for row in rows["attention"] if row["impl"] != "sage_jax"), None)
    with_ratios(rows["attention"], peer, "kept", "temporaries")
    with_ratios(rows["model"], peer, "peak")
    results = {
        **head,
        "tokens": options.tokens,
        "channels": options.channels,
        "head_dim": options.head_dim,
        "layers": options.layers,
        "peer": peer,
        "bars": BARS,
        "left_out": left_out,
        **rows,
    }
    print(f"\n{options.tokens} tokens × {options.channels} channels, head dim {options.head_dim}")
    if rows["attention"]:
        print(table(rows["attention"], peer, ["kept", "temporaries"]))
        for text in verdicts(rows["attention"], peer):
            print(text)
    if rows["model"]:
        print(f"\na gradient step of a GPT of {options.layers} layers")
        print(table(rows["model"], peer, ["arguments", "results", "temporaries", "peak"]))
    for text in left_out:
        print(f"could not compile {text}")
    if options.out:
        path = measuring.results_path(head["gpu"], "memory", options.out)
        resultfile.store(path, results)
        print(path)
    return 1 if any(text.startswith("sage_jax") for text in left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
