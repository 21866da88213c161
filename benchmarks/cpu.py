"""Times `sage_jax.dot_product_attention` against `jax.nn.dot_product_attention` on the CPU.

Each row is one shape: milliseconds of both, their ratio (above 1: we are faster), and the megabytes
by which one call raises the process's peak resident memory, less its results. (XLA's own figure
would miss the scratch of our handlers.) The memory columns need Linux and use fresh processes.

    python benchmarks/cpu.py                       # a few seconds a row
    python benchmarks/cpu.py --tokens 512 --head-dims 64 --dtypes float32
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time

if __name__ == "__main__":  # not for those who import this
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]  # runs from a plain checkout too

import commandline  # noqa: E402

import sage_jax  # noqa: E402
from sage_jax.support import DTYPES  # noqa: E402


def functions(name: str, causal: bool):
    """(forward, forward and backward) of one implementation, as functions of q, k, v, dout."""
    if name == "ours":
        attend = functools.partial(
            sage_jax.dot_product_attention, is_causal=causal, implementation="cpu"
        )
    else:
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=causal)

    def forward(q, k, v, dout):
        return attend(q, k, v)

    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return jax.jit(forward), jax.jit(both)


def inputs(tokens: int, heads: int, head_dim: int, dtype: str):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (1, tokens, heads, head_dim), dtype) for key in keys]


def milliseconds(function, arguments, repeats: int) -> float:
    """The fastest of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def peak_resident_mb() -> float:
    """The largest resident memory that this process has had, in MB."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory_mb(name: str, pass_index: int, causal: bool, shape) -> float:
    """Temporary memory of one compiled function, measured in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); "
        f"import cpu; cpu.print_memory({name!r}, {pass_index}, {causal}, {shape!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(result.stdout.split()[-1])


def print_memory(name: str, pass_index: int, causal: bool, shape) -> None:
    """Prints how far one call raises the process's peak memory, less the size of its results."""
    arguments = inputs(*shape)
    function = functions(name, causal)[pass_index].lower(*arguments).compile()
    small = [x[:, :64] for x in arguments]
    jax.block_until_ready(functions(name, causal)[pass_index](*small))  # thread pools, lazy modules
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from the present size
    before = peak_resident_mb()
    results = jax.block_until_ready(function(*arguments))
    size = sum(x.nbytes for x in jax.tree.leaves(results)) / 2**20
    print(max(peak_resident_mb() - before - size, 0.0))


def parse(arguments: list[str] | None = None):
    """The options, checked."""
    count = commandline.positive(int)
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=count, nargs="+", default=[1024, 4096], help="(default: 1024 4096)")
    add("--heads", type=count, default=4, help="(default: 4)")
    add("--head-dims", type=count, nargs="+", default=[64, 128], help="(default: 64 128)")
    add("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    add("--causal", action="store_true", help="causal attention (default: full)")
    add("--repeats", type=count, default=3, help="calls, of which the fastest counts (default: 3)")
    add("--no-memory", action="store_true", help="skip the memory columns")
    options = parser.parse_args(arguments)
    for head_dim in options.head_dims:
        q = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.float32)
        refusal = sage_jax.supports(q, q, q, implementation="cpu", platform="cpu")
        if refusal:
            parser.error(refusal)
    if not options.no_memory and not os.path.exists("/proc/self/clear_refs"):
        parser.error("memory is measured on Linux only; give --no-memory")
    return options


def main() -> None:
    options = parse()

    from sage_jax import _native_cpu

    print(f"{os.cpu_count()} CPUs, kernels for {_native_cpu.isa()}, jax {jax.__version__}")
    print("tokens  dim  dtype     pass     |  jax.nn ms   ours ms  ratio |  jax.nn MB  ours MB")
    for tokens in options.tokens:
        for head_dim in options.head_dims:
            for dtype in options.dtypes:
                shape = (tokens, options.heads, head_dim, str(np.dtype(jnp.dtype(dtype))))
                arguments = inputs(*shape)
                for index, label in enumerate(("forward", "fwd+bwd")):
                    ms = [
                        milliseconds(
                            functions(name, options.causal)[index], arguments, options.repeats
                        )
                        for name in ("jax.nn", "ours")
                    ]
                    row = f"{tokens:6}  {head_dim:3}  {dtype:8}  {label:7}  | "
                    row += f"{ms[0]:10.1f} {ms[1]:9.1f}  {ms[0] / ms[1]:5.2f} |"
                    if not options.no_memory:
                        mb = [
                            memory_mb(name, index, options.causal, shape)
                            for name in ("jax.nn", "ours")
                        ]
                        row += f" {mb[0]:10.1f} {mb[1]:8.1f}"
                    print(row, flush=True)


if __name__ == "__main__":
    main()
