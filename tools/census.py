"""Compiles the CUDA kernels for every architecture and takes a census of their machine code.

Nothing here needs a GPU. It checks that every kernel uses the matrix instructions it was written for, keeps within its
budget of registers, and spills nothing, and that no kernel is missing of which more is expected; it prints
one line a kernel and fails with one sentence a violation.

    python tools/census.py [--library FILE] [--archs 80;89;90a;120a] [--jobs N]

Without --library it builds one in build/census, with cmake and ninja from this interpreter's environment or the PATH. It
needs cuobjdump and nvdisasm: from the PATH or from PyPI (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), which it
installs into this interpreter's environment if they are missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import loops  # noqa: E402
ARCHS = "80;89;90a;120a"
# (kernel, registers, why): what a kernel may use, the first match counting. A matrix kernel has its multiprocessor to
# itself and may use all that an instruction can name.
BUDGETS = (
    ("*256*", 128, "512 threads a block"),
    ("dense_states", 40, "latency is hidden by warps"),
    ("segment_ranges", 40, "latency is hidden by warps"),
    ("clear_maxima", 16, "latency is hidden by warps"),
    ("write_codes*", 128, "two blocks of 256 threads a multiprocessor"),
    ("finish_codes*", 128, "two blocks of 256 threads a multiprocessor"),
    ("query_terms*", 128, "two blocks of 256 threads a multiprocessor"),
    ("gradient_operands*", 128, "two blocks of 256 threads a multiprocessor"),
    ("finish_dq*", 80, "three blocks of 256 threads a multiprocessor"),
    ("combine_splits*", 80, "three blocks of 256 threads a multiprocessor"),
    ("fp4_statistics*", 128, "two blocks of 256 threads a multiprocessor"),
    ("fp4_write_codes*", 128, "two blocks of 256 threads a multiprocessor"),
    ("fp4_reduce", 64, "a block of 1024 threads"),
    ("fp4_queries*", 168, "three blocks of 128 threads a multiprocessor, one of 256"),
    ("fp4_delta*", 128, "two blocks of 256 threads a multiprocessor"),
    ("quantize_q*", 128, "two blocks of 256 threads a multiprocessor"),
)
ONE_ARCHITECTURE = {"finish_dq*": "90a"}  # those of BUDGETS that are built for one alone
# Registers of a thread where setmaxnreg moves them: (architecture, kernel): (at launch, of a loader, of a consumer), of
# which a kernel with two kinds of blocks has two each.
# The file has 65536: 384 threads start with 168 each, 512 with 128, 640 with 96, and no more is handed out than that.
TWO_CONSUMERS, THREE_CONSUMERS = (168, {56}, {224}), (128, {56}, {152})
HANDED = {
    ("90a", "attention_fwd<ForwardConfig E4m3Values 64 0>"): THREE_CONSUMERS,
    ("90a", "attention_fwd<ForwardConfig E4m3Values 64 1>"): THREE_CONSUMERS,  # with interpolated exponentials
    ("90a", "attention_fwd<ForwardConfig E4m3Values 128 0>"): THREE_CONSUMERS,
    ("90a", "attention_fwd<ForwardConfig E4m3Values 128 1>"): THREE_CONSUMERS,  # with interpolated exponentials
    ("90a", "attention_fwd<ForwardConfig HalfValues PvFormat 1 64 0>"): TWO_CONSUMERS,
    ("90a", "attention_fwd<ForwardConfig HalfValues PvFormat 1 128 0>"): TWO_CONSUMERS,
    ("90a", "attention_fwd<ForwardConfig HalfValues PvFormat 2 64 0>"): TWO_CONSUMERS,
    ("90a", "attention_fwd<ForwardConfig HalfValues PvFormat 2 128 0>"): TWO_CONSUMERS,
    ("90a", "backward_gradients<GradientsConfig 64>"): (128, {32, 56}, {152, 160}),
    ("90a", "backward_gradients<GradientsConfig 128>"): (168, {40, 56}, {224, 232}),
    ("90a", "backward_at_once<AtOnceConfig 64>"): (128, {32}, {160}),
    ("90a", "backward_at_once<AtOnceConfig 128>"): (168, {40}, {232}),
    ("90a", "backward_delta<DeltaConfig 64>"): (96, {64}, {104}),
    ("90a", "backward_delta<DeltaConfig 128>"): (96, {64}, {104}),
    ("120a", "attention_fwd_fp4<ForwardConfig 64 12>"): THREE_CONSUMERS,
    ("120a", "attention_fwd_fp4<ForwardConfig 128 12>"): THREE_CONSUMERS,
}
# What a turn of a kernel's main loop may cost, per warp: (architecture, kernel): (product, products, instructions with
# rare paths). For d=128 the published kernel has 850 instructions for as many scores (16 x 128); for d=64 a kernel of
# its structure would have 770 (docs/kernels/sm120_fp4.md).
LOOPS = {
    ("120a", "attention_fwd_fp4<ForwardConfig 128 12>"): ("OMMA", 64, 800),
    ("120a", "attention_fwd_fp4<ForwardConfig 64 12>"): ("OMMA", 32, 660),
}
# Kernels that common/launch.h lets start early, from sm_90 on.
EARLY = ("attention_decode*", "combine_splits*", "finish_codes*", "finish_dq*")
DISASSEMBLERS = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
BUILDERS = ("cmake", "ninja", "nanobind", "jaxlib")


@dataclasses.dataclass
class Kernel:
    """One kernel as compiled for one architecture; `instructions` counts the opcodes of interest."""

    arch: str
    name: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lowered: set = dataclasses.field(default_factory=set)  # to how many registers setmaxnreg lowers a thread's
    raised: set = dataclasses.field(default_factory=set)  # and raises them
    code: list = dataclasses.field(default_factory=list)  # (address, text), of kernels in LOOPS

    @property
    def warpgroups(self) -> bool:
        """Whether it was written for warpgroup-level matrix products: its configuration says so, not its code."""
        if "fp4" in self.name or self.name.startswith("combine_splits"):
            return False
        return self.arch == "90a" and re.match(r"\w+<\w+ (E4m3Values|HalfValues|\d+>)", self.name) is not None

    @property
    def spills(self) -> int:
        return self.instructions["STL"] + self.instructions["LDL"]


TOKEN = re.compile(r"S\d*_|L[bij](?P<literal>\d+)E|(?P<enum>L)(?=N|\d)|(?P<length>\d+)|.")


def short_name(mangled: str) -> str:
    """A kernel's name with its configuration, from the mangled one: backward_dq<DqConfig Train8 DpInt8 E4m3Native 128>."""
    parts, at, enum = [], 0, False
    while at < len(mangled):
        if enum and parts and (value := re.compile(r"E(\d+)E").match(mangled, at)):
            parts.append(value[1])  # of an enumeration: its type's name comes before
            at, enum = value.end(), False
            continue
        match = TOKEN.match(mangled, at)
        at = match.end()
        if match["literal"]:
            parts.append(match["literal"])
        elif match["length"] and int(match["length"]):
            end = at + int(match["length"])
            parts.append(mangled[at:end])
            at = end
        enum = enum or bool(match["enum"])
    scopes = ("sage", "sm80", "sm89", "sm90", "sm120", "prepass", "AttentionShape")
    skip = lambda part: part in scopes or part.startswith("_") or part.endswith(("Call", "Params"))  # noqa: E731
    parts = [p for p in parts if not skip(p)] or [mangled]
    return f"{parts[0]}<{' '.join(parts[1:])}>" if parts[1:] else parts[0]


def expected(kernel: Kernel) -> list[tuple[str, str]]:
    """(opcode, reason) of what the kernel's machine code must contain."""
    name, arch = kernel.name, int(re.match(r"\d+", kernel.arch)[0])
    wanted = []
    if arch >= 90 and any(fnmatch.fnmatchcase(name, early) for early in EARLY):
        wanted.append(("ACQBULK", "the wait for the grid before, without which an early start is a race"))
    if kernel.warpgroups:
        wanted += [("IGMMA", "INT8 products"), ("UTMALDG", "tensor copies")]
        if "delta" not in name:  # which adds a row's products up
            wanted.append(("HGMMA" if "HalfValues" in name else "QGMMA", "floating products"))
        if (kernel.arch, name) in HANDED:
            wanted.append(("USETMAXREG", "registers handed from the loader to the consumers"))
        if "at_once" in name:
            wanted.append(("UTMAREDG", "sums of dQ, added to memory by the copy engine"))
            wanted.append(("UTMASTG", "gradients, stored by the copy engine"))
        return wanted
    if "_fp4" in name:
        product = ("OMMA", "FP4 products") if kernel.arch == "120a" else ("HMMA", "FP4 products through f16")
        wanted = [product, ("LDSM", "ldmatrix"), ("LDGSTS", "cp.async")]
        if arch >= 90:
            wanted.append(("UTMALDG", "tensor copies"))
        if (kernel.arch, name) in HANDED:
            wanted.append(("USETMAXREG", "registers handed from the loader to the consumers"))
        return wanted
    if name.startswith(("attention_", "backward_d")):
        wanted += [("IMMA", "INT8 scores"), ("LDSM", "ldmatrix"), ("LDGSTS", "cp.async")]
    if name.startswith(("backward_dq", "backward_dkv")) and "Train8" in name:
        native = "E4m3Native" in name
        wanted += [("QMMA", "e4m3 products") if native else ("HMMA", "e4m3 through f16")]
    if name.startswith("backward_d") and "DpBf16" in name or "SageBwd" in name:
        wanted += [("HMMA", "dO·Vᵀ in bf16")]
    if name.startswith("attention_") and re.search(r"E4m3|Values16|F16|Bf16|Half", name):
        qmma = arch == 89 or arch >= 100
        if not ("Native" in name and qmma):
            wanted += [("HMMA", "P·V")] if "Native" not in name else []
        else:
            wanted += [("QMMA", "P·V in e4m3")]
    return wanted


def _is_matrix_kernel(kernel: Kernel) -> bool:
    return kernel.name.startswith(("attention_", "backward_d"))


def _warpgroup_violations(k: Kernel, where: str) -> list[str]:
    found = []
    products = sum(k.instructions[opcode] for opcode in ("IGMMA", "QGMMA", "HGMMA"))
    waits = k.instructions["WARPGROUP.DEPBAR"]
    if waits >= products:  # ptxas could not keep accumulators in flight, and waits for every product
        found.append(f"{where} has been serialised: {waits} waits for {products} matrix products.")
    return found


def _numbers(some: set) -> str:
    return " and ".join(map(str, sorted(some))) or "no number of"


def _handed_violations(k: Kernel, where: str) -> list[str]:
    """What is wrong with the registers of a kernel that moves them; nothing to say of one that should and does not."""
    if not k.instructions["USETMAXREG"]:
        return []
    if (k.arch, k.name) not in HANDED:
        return [f"{where} moves registers by setmaxnreg; say in HANDED how many."]
    launch, loader, consumer = HANDED[k.arch, k.name]
    found = []
    if k.registers != launch:
        found.append(f"{where} starts with {k.registers} registers, but setmaxnreg reckons with {launch}.")
    for who, seen, wanted in (("loader", k.lowered, loader), ("consumer", k.raised, consumer)):
        if seen != wanted:
            found.append(f"{where} leaves a {who} {_numbers(seen)} registers, not {_numbers(wanted)}.")
    return found


def _loop_violations(k: Kernel, where: str) -> list[str]:
    product, products, most = LOOPS[k.arch, k.name]
    loop = loops.main_loop(k.code, product)
    if loop is None:
        return [f"{where} has no loop around {product}."]
    found = []
    if loop.count(product) != products:
        found.append(f"{where} executes {loop.count(product)} {product} in a turn of its main loop, not {products}.")
    if loop.instructions > most:
        found.append(f"{where} has {loop.instructions} instructions in its main loop, more than {most}.")
    return found


def absences(kernels: list[Kernel]) -> list[str]:
    """One sentence for everything that the tables above expect and a whole library lacks.

    Without them a kernel that is renamed or not built would take its checks with it. Of an architecture that the
    library was not built for nothing is expected.
    """
    built, present = {k.arch for k in kernels}, {(k.arch, k.name) for k in kernels}
    found = []
    for table, entries in (("HANDED", HANDED), ("LOOPS", LOOPS)):
        for arch, name in entries:
            if arch in built and (arch, name) not in present:
                found.append(f"the library holds no {name} for sm_{arch}, which {table} names.")
    others = [k.name for k in kernels if not _is_matrix_kernel(k)]
    for pattern, *_ in BUDGETS:
        if ONE_ARCHITECTURE.get(pattern) not in (None, *built):
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) for name in others):
            found.append(f"the library holds no {pattern}, which BUDGETS names.")
    return found


def violations(kernels: list[Kernel]) -> list[str]:
    """One sentence for everything about these kernels that is not as it should be."""
    found = []
    for k in kernels:
        where = f"{k.name} for sm_{k.arch}"
        if k.stack or k.spills:
            found.append(
                f"{where} spills: {k.spills} local loads and stores, a stack frame of {k.stack} bytes; "
                "lower its registers (fewer values alive in the loop) or its blocks per multiprocessor."
            )
        if k.warpgroups:
            found += _warpgroup_violations(k, where)
        elif not _is_matrix_kernel(k):
            budget, why = next(((r, w) for name, r, w in BUDGETS if fnmatch.fnmatchcase(k.name, name)), (0, ""))
            if not budget:
                found.append(f"{where} has no budget of registers; give it one in BUDGETS.")
            elif k.registers > budget:
                found.append(f"{where} uses {k.registers} registers, more than {budget} ({why}).")
        found += _handed_violations(k, where)
        if (k.arch, k.name) in LOOPS:
            found += _loop_violations(k, where)
        for opcode, reason in expected(k):
            if not k.instructions[opcode]:
                found.append(f"{where} has no {opcode} instruction ({reason}).")
    return found


OPCODE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?"
    r"(IMMA|QMMA|OMMA|HMMA|IGMMA|QGMMA|HGMMA|WARPGROUP\.\w+|UTMALDG|UTMAREDG|UTMASTG|USETMAXREG|LDSM|LDGSTS|STL|LDL|MUFU|ACQBULK)\b"
)
MOVED = re.compile(r"USETMAXREG\.(DEALLOC|TRY_ALLOC)\S*\s+(?:UP\w+,\s*)?(0x[0-9a-f]+)")


def parse_sass(lines, kernels: dict[tuple[str, str], Kernel]):
    """Counts instructions in the output of `cuobjdump -sass`, an iterable of lines."""
    arch, current = "", None
    for line in lines:
        if line.startswith("arch ="):
            arch = line.split("sm_")[1].strip()
        elif "Function :" in line:
            mangled = line.split("Function :")[1].strip()
            current = kernels.setdefault((arch, mangled), Kernel(arch, short_name(mangled)))
        elif current is not None:
            if match := OPCODE.match(line):
                current.instructions[match[1]] += 1
            if match := MOVED.search(line):
                (current.lowered if match[1] == "DEALLOC" else current.raised).add(int(match[2], 16))
            if (arch, current.name) in LOOPS and (instruction := loops.instruction(line)):
                current.code.append(instruction)


def parse_resources(lines, kernels: dict[tuple[str, str], Kernel]):
    """Registers, stack frame and static shared memory from the output of `cuobjdump -res-usage`."""
    arch, mangled = "", ""
    for line in lines:
        if line.startswith("arch ="):
            arch = line.split("sm_")[1].strip()
        elif match := re.search(r"Function (\S+?):", line):
            mangled = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernel = kernels.setdefault((arch, mangled), Kernel(arch, short_name(mangled)))
            kernel.registers, kernel.stack, kernel.shared = map(int, match.groups())


def take(library: pathlib.Path, arch: str | None = None) -> list[Kernel]:
    """The census of a shared library, sorted by name and architecture; of one architecture if it is given."""
    tool, kernels = cuobjdump(), {}
    of_arch = ["-arch", f"sm_{arch}"] if arch else []
    for option, parse in (("-sass", parse_sass), ("-res-usage", parse_resources)):
        command = [tool, option, *of_arch, str(library)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_tool_env()) as process:
            parse(process.stdout, kernels)
        if process.returncode:
            raise SystemExit(f"census: `{' '.join(command)}` failed with status {process.returncode}.")
    return sorted(kernels.values(), key=lambda k: (k.name, k.arch))


def _pypi_bin() -> pathlib.Path | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(pathlib.Path(folder).glob("cu*/bin/cuobjdump")):
            return path.parent
    return None


def _tool_env() -> dict[str, str]:
    folders = [str(_pypi_bin())] if _pypi_bin() else []
    folders += [str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {**os.environ, "PATH": os.pathsep.join((*folders, "/usr/local/cuda/bin"))}


def _install(packages):
    print(f"census: installing {', '.join(packages)}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
        check=True,
    )  # fmt: skip
    importlib.invalidate_caches()


def cuobjdump() -> str:
    """Path of cuobjdump, with nvdisasm beside it or on the PATH."""
    both = lambda: all(shutil.which(t, path=_tool_env()["PATH"]) for t in ("cuobjdump", "nvdisasm"))  # noqa: E731
    if not both():
        _install(DISASSEMBLERS)
    if not both():
        raise SystemExit(
            "census: no cuobjdump and nvdisasm; run `pip install " + " ".join(DISASSEMBLERS) + "`."
        )
    return shutil.which("cuobjdump", path=_tool_env()["PATH"])


def build(archs: str, jobs: int) -> pathlib.Path:
    """Compiles the kernel library and the handlers for `archs` in build/census; its path."""
    missing = [p for p in BUILDERS if not _available(p)]
    if missing:
        _install(missing)
    folder = ROOT / "build" / "census"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DSAGE_JAX_CUDA=ON",
        f"-DSAGE_JAX_CUDA_ARCHS={archs}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSAGE_JAX_MODULE_DIR={folder}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder), "-j", str(jobs), "--target", "_native_cuda"]):
        done = subprocess.run(command, env=_tool_env(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"census: `{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")
    return folder / "libsage_jax_kernels.so"


def _available(name: str) -> bool:
    if name in ("cmake", "ninja"):
        return shutil.which(name, path=_tool_env()["PATH"]) is not None
    return importlib.util.find_spec(name) is not None


def table(kernels: list[Kernel]) -> str:
    columns = "IMMA QMMA HMMA OMMA IGMMA QGMMA HGMMA LDSM LDGSTS UTMALDG MUFU".split()
    width = max(len(k.name) for k in kernels)
    head = f"{'kernel':{width}} {'arch':>5} {'regs':>5} {'stack':>5} {'spills':>6}"
    lines = [head + "".join(f"{c:>8}" for c in columns)]
    for k in kernels:
        counts = "".join(f"{k.instructions[c]:>8}" for c in columns)
        lines.append(f"{k.name:{width}} {k.arch:>5} {k.registers:>5} {k.stack:>5} {k.spills:>6}{counts}")
    return "\n".join(lines)


def loop_table(kernels: list[Kernel]) -> str:
    """Instructions of the main loops in LOOPS by class: of every turn, and of rare paths."""
    lines = []
    for k in kernels:
        if (k.arch, k.name) in LOOPS and (loop := loops.main_loop(k.code, LOOPS[k.arch, k.name][0])):
            always, sometimes = loops.by_class(loop.always), loops.by_class(loop.sometimes)
            lines.append(f"main loop of {k.name} for sm_{k.arch}: {loop.always.total()} instructions a turn, "
                         f"{loop.sometimes.total()} on rare paths")  # fmt: skip
            lines += [f"  {name:13}{n:>5}{sometimes[name]:>5}" for name, n in always.items()]
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--library", type=pathlib.Path, help="a built libsage_jax_kernels.so")
    parser.add_argument("--archs", default=ARCHS, help=f"to compile for (default: {ARCHS})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel compilations")
    options = parser.parse_args(argv)
    library = options.library or build(options.archs, options.jobs)
    if not library.exists():
        raise SystemExit(f"census: {library} does not exist; leave --library out to build one.")
    kernels = take(library)
    print(table(kernels))
    print(loop_table(kernels))
    built = {k.arch for k in kernels}
    found = violations(kernels) + absences(kernels)
    if options.library is None:
        absent = [a for a in options.archs.split(";") if a not in built]
        found += [f"the library holds no kernel for sm_{a}." for a in absent]
    for sentence in found:
        print(f"census: {sentence}")
    print(f"census: {len(kernels)} kernels for {len(built)} architectures, {len(found)} violations")
    return 1 if found or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
