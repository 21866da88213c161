"""Trains a small byte-level GPT with exact attention, then again with 8-bit attention.

Every run starts from the same parameters and sees the same batches, so all that differs is the
attention. With --again N exact attention trains N more times, from parameters that are off by one
rounding to bfloat16: what those runs differ by is what equal runs differ by. With --start all begin
from the model of an earlier run, for instance to go on with a longer context. Writes a table, loss
curves, all numbers, a sample of generated text, and the model that was trained with exact
attention, for fp4_or_int8.py.

    python examples/train_gpt.py                      # sizes fit the machine
    python examples/train_gpt.py --recipes sagebwd --steps 50 --output somewhere
"""

import argparse
import dataclasses
import functools
import pathlib
import platform
import shlex
import sys
import time

import flax
import jax
import jax.numpy as jnp
from flax import nnx

import sage_jax
from gpt import checkpoint, report, sampling, text, training
from gpt.model import GPT, Shape
from gpt.options import Parser, count, natural, positive, seed

_SAMPLE = 240  # bytes of generated text
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Defaults of the options of the same names."""

    layers: int
    heads: int
    head_dim: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    dtype: str
    recipes: str
    exact: str


PRESETS = {
    # About two minutes on two cores.
    "cpu": Preset(
        layers=3, heads=2, head_dim=64, context=512, batch=4, steps=200,
        learning_rate=3e-3, dtype="float32", recipes="train8", exact="xla",
    ),
    # 151 million parameters in the blocks.
    "gpu": Preset(
        layers=12, heads=8, head_dim=128, context=4096, batch=4, steps=300,
        learning_rate=6e-4, dtype="bfloat16", recipes="train8,sagebwd", exact="cudnn",
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(given)
    start = _start(parser, options)
    options = _with_preset(parser, options)
    shape = Shape(
        options.layers, options.heads, options.head_dim, options.context, DTYPES[options.dtype],
        options.qk_norm,
    )  # fmt: skip
    try:
        attentions = _attentions(options)
        corpus = text.load(options.text, options.context)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--output {options.output} cannot be made a folder: {problem.strerror}")

    if start is None:
        model = GPT(shape, rngs=nnx.Rngs(options.seed))  # under jit XLA takes minutes for a GPU
    else:
        graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0))))
        model = nnx.merge(graph, nnx.state(start))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    device = jax.devices()[0]
    print(
        f"{size / 1e6:.1f}M parameters, {shape.layers} layers, {shape.heads} heads of "
        f"{shape.head_dim}, context {shape.context}, {options.dtype}, on {device.device_kind}"
        f"{f', from {options.start}' if options.start else ''}\n"
        f"{corpus.train.size / 1e6:.1f} MB of text to train on, {corpus.held_out.size / 1e6:.1f} "
        f"MB held out: {corpus.files} files of {corpus.folder}"
    )
    again = {f"exact {n}": n for n in range(2, 2 + options.again)}
    exact = attentions["exact"]
    attentions = {"exact": exact, **dict.fromkeys(again, exact), **attentions}
    runs = [
        training.train(
            name, attend, model, corpus, steps=options.steps, batch=options.batch,
            context=shape.context, learning_rate=options.learning_rate, seed=options.seed,
            rounding=again.get(name),
        )
        for name, attend in attentions.items()
    ]  # fmt: skip
    sample = sampling.generate(
        model, runs[-1].parameters, options.prompt.encode(), options.sample, options.seed
    ).decode(errors="replace")

    facts = {
        "command": shlex.join(["python", "examples/train_gpt.py", *given]),
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "parameters": size,
        "text_bytes": {"train": corpus.train.size, "held_out": corpus.held_out.size},
        "device": device.device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "sage_jax": sage_jax.__version__,
        },
    }
    title = f"{size / 1e6:.1f}M parameters, context {shape.context}, {device.device_kind}"
    report.write_json(options.output / "results.json", runs, facts, sample)
    report.plot(options.output / "loss.png", runs, title)
    checkpoint.save(options.output / "model.npz", shape, runs[0].parameters, options.text)
    print(f"\n{report.table(runs)}\n")
    print(f"Written by {runs[-1].name} through a cache of 8-bit keys and values:\n")
    print("\n".join(f"    {line}" for line in sample.splitlines()))
    seconds = time.perf_counter() - started
    names = ("loss.png", "results.json", "model.npz")
    written = ", ".join(f"{options.output}/{name}" for name in names)
    print(f"\n{written} ({seconds:.0f} s in all)")
    return 0


def _attentions(options) -> dict:
    """Name -> attention function of every run, the exact one first.

    Raises:
      ValueError: a recipe does not exist, cannot train, or does not fit the model.
    """
    exact = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=options.exact
    )
    attentions = {"exact": exact}
    q = jax.ShapeDtypeStruct(
        (options.batch, options.context, options.heads, options.head_dim), DTYPES[options.dtype]
    )
    for recipe in options.recipes.split(","):
        if recipe in attentions and recipe != "exact":
            raise ValueError(f"--recipes names {recipe} twice; every recipe is trained once")
        ours = functools.partial(
            sage_jax.dot_product_attention,
            is_causal=True,
            recipe=recipe,
            implementation=options.implementation,
        )
        refusal = sage_jax.supports(
            q, q, q, is_causal=True, recipe=recipe, differentiate=True,
            implementation=options.implementation,
        )  # fmt: skip
        if refusal:
            raise ValueError(refusal)
        attentions[recipe] = ours
    return attentions


def _start(parser: argparse.ArgumentParser, options: argparse.Namespace) -> GPT | None:
    """The model of --start, from which the options that were not given take its sizes, context, type and text."""
    if options.start is None:
        return None
    if options.start.resolve().parent == options.output.resolve():
        parser.error(f"--start {options.start} lies where this run would write; give another --output")
    try:
        model, folder = checkpoint.load(options.start)
    except ValueError as problem:
        parser.error(f"--start: {problem}")
    except OSError as problem:
        parser.error(f"--start {options.start} cannot be read: {problem.strerror}")
    shape = model.shape
    for name in ("layers", "heads", "head_dim"):
        given, found = getattr(options, name), getattr(shape, name)
        if given not in (None, found):
            parser.error(
                f"--{name.replace('_', '-')} {given} differs from {found}, that of {options.start}; leave it out"
            )
        setattr(options, name, found)
    if options.qk_norm not in (None, shape.qk_norm):
        parser.error(
            f"{options.start} has {'a' if shape.qk_norm else 'no'} QK-norm; leave out "
            f"--{'' if options.qk_norm else 'no-'}qk-norm"
        )
    options.qk_norm = shape.qk_norm
    options.context = options.context or shape.context
    options.dtype = options.dtype or jnp.dtype(shape.dtype).name
    options.text = options.text or folder
    return model


def _with_preset(parser: argparse.ArgumentParser, options: argparse.Namespace):
    """Fills in what was not given, and refuses numbers that no model can have."""
    if options.preset is None:
        options.preset = "gpu" if jax.default_backend() == "gpu" else "cpu"
    for name, value in dataclasses.asdict(PRESETS[options.preset]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.qk_norm is None:
        options.qk_norm = True
    if options.head_dim % 2:
        parser.error(f"--head-dim {options.head_dim} is odd; rotary positions need an even number")
    if options.exact == "cudnn" and (jax.default_backend() != "gpu" or options.dtype == "float32"):
        parser.error(
            f"--exact cudnn needs a GPU and --dtype bfloat16 or float16, but JAX runs on "
            f"{jax.default_backend()} and the type is {options.dtype}; use --exact xla"
        )
    if options.dtype == "float16" and jax.default_backend() == "cpu":
        parser.error(
            "--dtype float16 needs a GPU, because the attention of jax.nn has no float16 products on "
            "a CPU; use float32 or bfloat16"
        )
    platform_of = {"cpu": "cpu", "cuda": "gpu", "reference": jax.default_backend()}
    if platform_of.get(options.implementation, jax.default_backend()) != jax.default_backend():
        parser.error(
            f"--implementation {options.implementation} does not run on JAX's default device, a "
            f"{jax.default_backend()}; leave the option out, or choose reference"
        )
    _check_lengths(parser, options)
    return options


def _check_lengths(parser: argparse.ArgumentParser, options: argparse.Namespace):
    """Fills in --sample, and refuses a context that is too short for training or for the sample."""
    prompt = len(options.prompt.encode())
    if options.context < 2:
        parser.error("--context 1 leaves a query nothing but itself to attend to; give at least 2")
    if not prompt:
        parser.error("--prompt is empty; give at least one character to continue")
    if prompt >= options.context:
        parser.error(
            f"--prompt has {prompt} bytes, but a context of {options.context} must hold it and what "
            "is generated after it"
        )
    room = options.context - prompt
    if options.sample is None:
        options.sample = min(_SAMPLE, room)
    if options.sample > room:
        parser.error(
            f"--sample {options.sample} is too long: a context of {options.context} has room for "
            f"{room} bytes after the prompt"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__.split("\n\n    ")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A preset gives the value of every option that is not given:\n"
        + "\n".join(f"  {name}: {_options_of(preset)}" for name, preset in PRESETS.items()),
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sizes; default: gpu if JAX sees a GPU, otherwise cpu")
    add("--recipes", metavar="A,B",
        help="8-bit recipes to compare with exact attention, with changes as in train8:delta=exact")  # fmt: skip
    add("--layers", type=count, metavar="N", help="transformer blocks")
    add("--heads", type=count, metavar="N", help="attention heads; width is heads x head-dim")
    add("--head-dim", type=count, metavar="N", help="channels of a head, even")
    add("--context", type=count, metavar="N", help="bytes a sequence")
    add("--batch", type=count, metavar="N", help="sequences a step")
    add("--steps", type=count, metavar="N", help="training steps of each run")
    add("--learning-rate", type=positive, metavar="X", help="AdamW's peak learning rate")
    add("--dtype", choices=DTYPES, help="type of activations; parameters are always float32")
    add("--start", type=pathlib.Path, metavar="FILE",
        help="model.npz of an earlier run to begin from, with a fresh optimizer; its sizes, context, type and "
        "text hold unless others are given (other batches: --seed); default: random parameters")  # fmt: skip
    add("--qk-norm", action=argparse.BooleanOptionalAction,
        help="normalise the queries and keys of each head; default: yes")  # fmt: skip
    add("--exact", choices=("xla", "cudnn"), help="implementation of jax.nn in the exact run")
    add("--again", type=natural, default=0, metavar="N",
        help="more exact runs, whose parameters start one rounding apart; default: 0")  # fmt: skip
    add("--implementation", choices=("cpu", "cuda", "reference"),
        help="implementation of sage_jax; default: the best one for the device")  # fmt: skip
    add("--text", type=pathlib.Path, metavar="DIR",
        help="folder of *.py files, the text; default: Python's standard library")  # fmt: skip
    add("--seed", type=seed, default=0, metavar="N", help="of parameters, batches and sample")
    add("--prompt", default="def ", help="start of the generated text; default: %(default)r")
    add("--sample", type=count, metavar="N",
        help=f"bytes to generate; default: {_SAMPLE}, or what fits the context")  # fmt: skip
    add("--output", type=pathlib.Path, default=pathlib.Path("demo_output"), metavar="DIR",
        help="where loss.png, results.json and model.npz go; default: %(default)s")  # fmt: skip
    return parser


def _options_of(preset: Preset) -> str:
    fields = dataclasses.asdict(preset).items()
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in fields)


def _plain(value):
    return str(value) if isinstance(value, pathlib.Path) else value


if __name__ == "__main__":
    sys.exit(main())
