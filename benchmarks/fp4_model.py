"""How fast the FP4 forward kernel would be on a chip with FP4 products, from its machine code alone.

    python benchmarks/fp4_model.py [--library FILE]

Counts what a warp's turn of the main loop (16 x 128 scores) asks of each unit of a multiprocessor, for this kernel and for
the published one (SageAttention3, arXiv 2505.11594), and predicts the rate on an RTX 5090. Without --library it compiles
the kernel, for which nvcc is needed. docs/kernels/sm120_fp4.md discusses the result. It is a model: nothing here was
measured by us on that chip.

The model. A warp alternates between two phases: products, which ask for the matrix unit (and the loads from shared memory
that feed it), and the softmax, which asks for issue slots, MUFU and the ALU. A phase takes as long as its busiest unit.
The warps of a scheduler are then customers of two servers, and exact mean value analysis of that closed network (Reiser
and Lavenberg, J. ACM 27(2), 1980) gives their throughput: with one warp the phases add up, with many the
slower one sets the pace. Latencies within a phase, barriers and the ends of rows are left out; so the rate that the
published kernel was measured to have, divided by the one predicted for it, is applied as a correction to both.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import census  # noqa: E402
import loops  # noqa: E402

SCORES = 16 * 128  # of a warp's turn


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of a multiprocessor, in operations or results a clock; it has four schedulers."""

    name: str
    multiprocessors: int
    gigahertz: float
    fp4_teraops: float  # dense, float32 accumulation

    # CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", compute capability 8.6 to 12.0.
    mufu: int = 16
    alu: int = 64  # comparisons, logic, conversions: the slower of the two pipes
    shuffles: int = 32
    shared_bytes: int = 128  # chipsandcheese.com, "Blackwell: Nvidia's Massive GPU" (measured)

    @property
    def product_clocks(self) -> float:
        """Of a scheduler's matrix unit, for one m16n8k64."""
        per_scheduler = self.fp4_teraops * 1e12 / (self.multiprocessors * self.gigahertz * 1e9) / 4
        return 2 * 16 * 8 * 64 / per_scheduler


# NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A: multiprocessors, boost clock, FP4 tensor TFLOPS (dense).
RTX_5090 = Chip("RTX 5090", multiprocessors=170, gigahertz=2.407, fp4_teraops=1676)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a turn of a warp asks for."""

    head_dim: int
    warps: int  # a scheduler's
    instructions: int
    products: int
    mufu: int
    alu: int  # maxima, logic, conversions
    shuffles: int
    shared_loads: float  # of 128 bytes
    measured: float | None = None  # tera-operations a second, of this kernel on an RTX 5090

    @property
    def operations(self) -> int:
        return 4 * SCORES * self.head_dim

    def clocks(self, chip: Chip) -> dict[str, float]:
        """Clocks of a scheduler, or of its quarter of what the multiprocessor shares, by unit."""
        return {
            "matrix": self.products * chip.product_clocks,
            "issue": float(self.instructions),
            "MUFU": self.mufu * 4 * 32 / chip.mufu,
            "ALU": self.alu * 4 * 32 / chip.alu,
            "shared memory": 4 * (self.shared_loads * 128 / chip.shared_bytes + self.shuffles * 32 / chip.shuffles),
        }

    def phases(self, chip: Chip) -> tuple[float, float]:
        """Clocks of products and of the softmax."""
        c = self.clocks(chip)
        products = max(c["matrix"], c["shared memory"])
        return products, max(c["issue"] - self.products, c["MUFU"], c["ALU"])


def _shared_loads(opcodes) -> float:
    """128-byte accesses of LDS and LDSM: 16 bytes a lane take four, at most."""
    loads = 0.0
    for opcode, n in opcodes.items():
        if opcode.startswith("LDSM"):
            loads += n * (4 if opcode.endswith(".4") else 2 if opcode.endswith(".2") else 1)
        elif opcode.startswith("LDS"):
            loads += n * (4 if ".128" in opcode else 2 if ".64" in opcode else 1)
    return loads


def ours(kernel: census.Kernel) -> Turn:
    """A turn of this kernel, from its machine code; paths that only some turns take are not in it."""
    loop = loops.main_loop(kernel.code, "OMMA")
    classes = loops.by_class(loop.always)
    head_dim, consumers = map(int, kernel.name.rstrip(">").split()[-2:])
    return Turn(
        head_dim=head_dim, warps=consumers // 4, instructions=loop.always.total(), products=classes["matrix"],
        mufu=classes["MUFU"], alu=classes["max"] + classes["byte, logic"] + classes["conversions"],
        shuffles=classes["shuffles"], shared_loads=_shared_loads(loop.always),
    )  # fmt: skip


# Counted in the published kernel, compiled by nvcc 13.0 for sm_120a: 850 instructions, of them 64 products, 278 float, 82
# MUFU, 82 maxima, 92 logic, 88 integer, 56 loads from shared memory (32 of them of matrices), 36 conversions, 12 shuffles.
# Measured by its authors (their figure for head dimension 128): the best over lengths. Two warps a scheduler.
PUBLISHED_128 = Turn(128, 2, 850, 64, 82, 82 + 92 + 36, 12, 32 * 4 + 24 * 2, measured=1038)
# The same structure with half the channels: half the products and matrix loads, and half of the 64 multiplications that
# rescale the output.
PUBLISHED_64 = Turn(64, 2, 850 - 32 - 16 - 32, 32, 82, 82 + 92 + 36, 12, 16 * 4 + 24 * 2, measured=839)


def clocks_a_turn(phases: tuple[float, float], warps: int) -> float:
    """Mean clocks between the ends of two turns of a scheduler's warps, by mean value analysis."""
    queue = [0.0, 0.0]
    for n in range(1, warps + 1):
        stay = [phase * (1 + q) for phase, q in zip(phases, queue)]
        between = sum(stay) / n
        queue = [s / between for s in stay]
    return between


def rate(turn: Turn, chip: Chip) -> float:
    """Predicted tera-operations a second, without the correction."""
    clocks = clocks_a_turn(turn.phases(chip), turn.warps)
    return turn.operations / clocks * 4 * chip.multiprocessors * chip.gigahertz / 1e3


def table(kernel: Turn, published: Turn, chip: Chip) -> str:
    correction = published.measured / rate(published, chip)
    rows = [(name, f"{a:.0f}", f"{b:.0f}") for (name, a), b in zip(
        kernel.clocks(chip).items(), published.clocks(chip).values())]  # fmt: skip
    bound = lambda turn: max(turn.clocks(chip), key=turn.clocks(chip).get)  # noqa: E731
    rows += [
        ("busiest unit", bound(kernel), bound(published)),
        ("its limit, TOPS", *(f"{_limit(t, chip):.0f}" for t in (kernel, published))),
        ("warps a scheduler", f"{kernel.warps}", f"{published.warps}"),
        ("clocks a turn", *(f"{clocks_a_turn(t.phases(chip), t.warps):.0f}" for t in (kernel, published))),
        ("predicted, TOPS", *(f"{rate(t, chip):.0f}" for t in (kernel, published))),
        (f"x {correction:.2f}, TOPS", f"{rate(kernel, chip) * correction:.0f}", f"{published.measured:.0f} (measured)"),
    ]
    head = f"| {chip.name}, head dimension {kernel.head_dim} | this kernel | published |\n|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _limit(turn: Turn, chip: Chip) -> float:
    return turn.operations / max(turn.clocks(chip).values()) * 4 * chip.multiprocessors * chip.gigahertz / 1e3


def compiled(folder: pathlib.Path) -> pathlib.Path:
    """The kernel alone, as a shared library in `folder`."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=census._tool_env()["PATH"])
    if nvcc is None:
        raise SystemExit("fp4_model: nvcc is missing; pass --library with a build that holds sm_120a.")
    library = folder / "fp4.so"
    command = [nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_120a,code=sm_120a", "-Xcompiler", "-fPIC", "-shared",
               f"-I{ROOT / 'cuda'}", str(ROOT / "cuda/sm120/attention_fwd_fp4.cu"), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return library


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=pathlib.Path, help="a libsage_jax_kernels.so with sm_120a")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        kernels = census.take(options.library or compiled(pathlib.Path(scratch)))
    turns = {turn.head_dim: turn for turn in map(ours, (k for k in kernels if (k.arch, k.name) in census.LOOPS))}
    if not turns:
        raise SystemExit("fp4_model: the library holds no FP4 kernel for sm_120a.")
    for published in (PUBLISHED_128, PUBLISHED_64):
        if published.head_dim in turns:
            print(table(turns[published.head_dim], published, RTX_5090), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
