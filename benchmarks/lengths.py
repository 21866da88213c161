"""Time of attention over the length of a sequence, and over batch × heads.

    python benchmarks/lengths.py                     # on a GPU: up to 131072 tokens, causal
    python benchmarks/lengths.py --causal both       # without a mask as well
    python benchmarks/lengths.py --plot lengths.json # only draws an earlier results file

Two series: one sequence from 512 to 131072 tokens, where work grows with the square of the length,
and 1 to 16 sequences of 4096 tokens, where it grows with batch × heads. Inputs and results are
bfloat16; quantization is part of every figure. It writes `<gpu>-lengths.json` (a row's "ms" is the
median of its samples, "ms_fastest" and "ms_slowest" are their spread; "tflops" counts operations as
attention.py does) and a plot of the same name. Without a GPU the grid is small. What needs more
memory than the device lends is left out, and named. All programs are compiled first, in parallel;
all implementations of one line of the grid are timed in turns, on the same inputs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a plain checkout too

import attention  # noqa: E402
import commandline  # noqa: E402
import contenders  # noqa: E402
import measuring  # noqa: E402
import resultfile  # noqa: E402

from sage_jax.recipe import MAX_HEAD_DIM  # noqa: E402

PASSES = {"forward": "fwd", "both": "fwd_bwd"}  # as the results name them
CAUSAL = {"yes": (True,), "no": (False,), "both": (False, True)}
PRESET_VALUES = {
    "gpu": {
        "implementation": "cuda",
        "peers": ["cudnn_bf16"],
        "lengths": [2**i for i in range(9, 18)],
        "batches": [1, 2, 4, 8, 16],
        "batch_length": 4096,
        "heads": 16,
        "dim": 128,
    },
    "cpu": {
        "implementation": "cpu",
        "peers": ["xla"],
        "lengths": [256, 512, 1024],
        "batches": [1, 2, 4],
        "batch_length": 256,
        "heads": 2,
        "dim": 64,
    },
}
_COLORS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#30638e", "#8f8f8f")


def plan(options: argparse.Namespace) -> list[attention.Line]:
    """The lines of both series; one that belongs to both is there once."""
    shapes = [(1, length) for length in options.lengths]
    shapes += [(batch, options.batch_length) for batch in options.batches]
    lines = [
        attention.Line(PASSES[name], batch, length, options.heads, options.dim, causal)
        for (batch, length), causal, name in itertools.product(
            shapes, CAUSAL[options.causal], options.passes
        )
    ]
    return list(dict.fromkeys(lines))


def compiled(line: attention.Line, contender: contenders.Contender):
    """The compiled pass and its number of operands; None where the contender has no such pass."""
    shapes = [jax.ShapeDtypeStruct(line.shape, jnp.bfloat16)] * 4
    run = attention.speed_runs(line, contender, shapes)
    return run and (run.func.lower(*run.args).compile(), len(run.args))


def compile_all(lines, entrants) -> tuple[dict, list[str], list[str]]:
    """(line, label) -> what `compiled` gives, the sentences on what failed, and on what is too big.

    In threads, because XLA compiles on one core at a time.
    """
    programs, failures, too_big = {}, [], []
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = {}
        for line, contender in itertools.product(lines, entrants):
            name = f"{contender.label} ({attention.describe(line)})"
            if line.batch * line.heads * line.seq**2 > contender.largest_scores:
                too_big.append(f"{name}: it keeps all scores in memory")
                continue
            jobs[line, contender.label] = name, pool.submit(compiled, line, contender)
        for key, (name, job) in jobs.items():
            try:
                program = job.result()
            except Exception as reason:  # noqa: BLE001  (one must not cost the others their line)
                failures.append(f"{name}: {measuring.sentence(reason)}")
                continue
            if program is None:
                continue
            need, room = needed_bytes(program[0]), device_bytes()
            if room is not None and need > room:
                gib = f"{need / 2**30:.1f} GiB, of {room / 2**30:.1f}"
                too_big.append(f"{name}: it needs {gib}")
                continue
            programs[key] = program
    return programs, failures, too_big


def needed_bytes(program: jax.stages.Compiled) -> int:
    """Of calls in a row: the results of one are held until the next has its own."""
    planned = measuring.Planned.of(program)
    return planned.peak + planned.results


def device_bytes() -> int | None:
    """Bytes that JAX may take of the device, None where it sets no limit."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def measure(line: attention.Line, entrants, programs, options):
    """Rows of one line, and the sentences on those that could not run."""
    inputs, runs, failures = line.inputs(), {}, []
    for contender in entrants:
        if (line, contender.label) not in programs:
            continue
        program, operands = programs[line, contender.label]
        run = functools.partial(program, *inputs[:operands])
        try:
            jax.block_until_ready(run())
            runs[contender.label] = run
        except Exception as reason:  # noqa: BLE001
            failures.append(
                f"{contender.label} ({attention.describe(line)}): {measuring.sentence(reason)}"
            )
    samples = measuring.interleaved_samples(runs, options.repeats, options.seconds)
    rows = []
    for contender in entrants:
        if times := samples.get(contender.label):
            row = line.row(contender, statistics.median(times))
            row["ms_fastest"] = measuring.digits(1e3 * min(times))
            row["ms_slowest"] = measuring.digits(1e3 * max(times))
            rows.append(row)
    return rows, failures


def series(results: dict[str, Any]) -> list[tuple[str, dict[str, list[tuple[float, dict]]]]]:
    """What the plot's columns show: (title of the x axis, label of a curve -> (x, row) by x)."""
    heads, length = results["heads"], results["batch_length"]
    columns = [
        (
            f"sequence length, tokens (batch 1, {heads} heads)",
            lambda row: row["batch"] == 1 and row["seq"] in results["lengths"] and row["seq"],
        ),
        (
            f"batch × heads (sequences of {length} tokens)",
            lambda row: (
                row["seq"] == length
                and row["batch"] in results["batches"]
                and row["batch"] * row["heads"]
            ),
        ),
    ]
    found = []
    for title, position in columns:
        curves: dict[str, list[tuple[float, dict]]] = {}
        for row in results["speed"]:
            if x := position(row):
                name = " ".join(filter(None, (row["impl"], row["recipe"])))
                done = next(name for name, kind in PASSES.items() if kind == row["pass"])
                label = f"{name}, {done}{', causal' if row['causal'] else ''}"
                curves.setdefault(label, []).append((x, row))
        if curves:
            ordered = {label: sorted(c, key=lambda at: at[0]) for label, c in curves.items()}
            found.append((title, ordered))
    return found


def plot(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Milliseconds above, TFLOPS below, with the samples' spread; a column for each series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = series(results)
    figure, panels = pyplot.subplots(
        2, len(columns), figsize=(6 * len(columns), 7.5), sharex="col", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    names = dict.fromkeys((row["impl"], row["recipe"]) for row in results["speed"])
    colors = dict(zip(names, itertools.cycle(_COLORS)))
    handles = {}
    for (title, curves), (times, speeds) in zip(columns, panels.T, strict=True):
        for label, points in curves.items():
            x, rows = zip(*points, strict=True)
            row = rows[0]
            style = {
                "color": colors[row["impl"], row["recipe"]],
                "linestyle": "-" if row["pass"] == "fwd" else "--",
                "marker": "^" if row["causal"] else "o",
                "markersize": 4,
                "linewidth": 1.2,
                "capsize": 2,
            }
            ms = [row["ms"] for row in rows]
            spread = [
                [row["ms"] - row["ms_fastest"] for row in rows],
                [row["ms_slowest"] - row["ms"] for row in rows],
            ]
            handles[label] = times.errorbar(x, ms, spread, **style)
            operations = [row["tflops"] * row["ms"] for row in rows]
            spread = [
                [row["tflops"] - n / row["ms_slowest"] for n, row in zip(operations, rows)],
                [n / row["ms_fastest"] - row["tflops"] for n, row in zip(operations, rows)],
            ]
            speeds.errorbar(x, [row["tflops"] for row in rows], spread, **style)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        times.set_xscale("log", base=2)
        times.set_yscale("log")
        times.set(ylabel="ms, median")
        speeds.set(xlabel=title, ylabel="TFLOPS")
        speeds.set_ylim(bottom=0)
        speeds.set_xticks(ticks, [str(x) for x in ticks], rotation=30)
    for axes in panels.flat:
        axes.grid(color="#e8e8e8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"attention on {results['gpu']}, head dimension {results['head_dim']}, bf16")
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=3, frameon=False,
        fontsize="small",
    )  # fmt: skip
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked and completed from the device's preset."""
    parser = commandline.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, commandline.positive(int)
    add("--lengths", nargs="+", type=count, help="tokens of the first series, powers of two")
    add("--batches", nargs="*", type=count, help="sequences of the second series; none: no series")
    add("--batch-length", type=count, help="tokens of a sequence of the second series")
    add("--heads", type=count, help="heads of a sequence (default: 16)")
    add("--dim", type=count, help="head dimension (default: 128)")
    attention.add_contestants(parser, ["sage2", "train8"], peers="(default: cudnn_bf16)")
    attention.add_timing(parser, PASSES, repeats=3, seconds=0.02)
    add("--causal", choices=CAUSAL, default="yes", help="with the mask or without (default: yes)")
    commandline.add_folder(parser, "where <gpu>-lengths.json and .png go (default: benchmarks/results)")
    add("--plot", type=pathlib.Path, metavar="JSON", help="draw this results file beside itself")
    options = parser.parse_args(arguments)
    commandline.complete(options, PRESET_VALUES[measuring.preset()])
    if options.dim > MAX_HEAD_DIM:
        parser.error(f"--dim {options.dim} is above {MAX_HEAD_DIM}, the largest")
    if options.plot and not options.plot.is_file():
        parser.error(f"--plot {options.plot} does not exist; name a file that this command wrote")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; install it")
    return options


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    if options.plot:
        plot(options.plot.with_suffix(".png"), json.loads(options.plot.read_text()))
        return 0
    head = measuring.environment()
    path = measuring.results_path(head["gpu"], "lengths", options.out)
    entrants, lines = attention.contestants(options), plan(options)
    print(f"compiling {len(lines)} lines of {len(entrants)} implementations", flush=True)
    programs, failures, too_big = compile_all(lines, entrants)
    rows = []
    for number, line in enumerate(lines, 1):
        elapsed = time.monotonic() - start
        print(f"[{number}/{len(lines)}, {elapsed:.0f} s] {attention.describe(line)}", flush=True)
        measured, failed = measure(line, entrants, programs, options)
        rows += measured
        failures += failed
    results = {
        **head,
        "lengths": options.lengths,
        "batches": options.batches,
        "batch_length": options.batch_length,
        "heads": options.heads,
        "head_dim": options.dim,
        "samples": options.repeats,
        "left_out": too_big + failures,
        "speed": rows,
    }
    resultfile.store(path, results)
    if rows:
        print(f"\n{resultfile.speed_table(results)}\n")
        apart = max(row["ms_slowest"] / row["ms"] - 1 for row in rows)
        print(f"slowest sample above its median: {100 * apart:.1f}% at most")
    for text in too_big:
        print(f"left out: {text}")
    for text in failures:
        print(f"could not run {text}")
    print(path)
    if rows and importlib.util.find_spec("matplotlib"):
        plot(path.with_suffix(".png"), results)
        print(path.with_suffix(".png"))
    elif rows:
        print("no plot, because matplotlib is missing: install it and give --plot the file above")
    print(f"{time.monotonic() - start:.0f} s in all")
    return 1 if any(text.startswith("sage_jax") for text in failures) else 0


if __name__ == "__main__":
    sys.exit(main())
