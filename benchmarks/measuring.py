"""How the benchmarks measure: medians in turns, and what a results file says of the machine."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def interleaved_medians(
    runs: Mapping[str, Callable[[], Any]], repeats: int, seconds: float
) -> dict[str, float]:
    """Median seconds of one call of each run; arguments as for `interleaved_samples`."""
    samples = interleaved_samples(runs, repeats, seconds)
    return {label: statistics.median(times) for label, times in samples.items()}


def interleaved_samples(
    runs: Mapping[str, Callable[[], Any]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one call of each run, measured in turns so that clocks drift for all alike.

    Each sample queues as many calls as fill `seconds` and waits once at the end: the host is ahead
    of the device all the time, so what it costs to launch a call does not show.

    Args:
      runs: label -> function without arguments that returns arrays; compiled and warmed up here.
      repeats: samples of each.
      seconds: least duration of a sample.
    """
    calls = {}
    for label, run in runs.items():
        for _ in range(2):  # compilation, then the allocator's and the caches' first sight
            jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls[label] = max(1, math.ceil(seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[label]):
                last = run()
            jax.block_until_ready(last)
            samples[label].append((time.perf_counter() - start) / calls[label])
    return samples


class Planned(NamedTuple):
    """Bytes that a compiled program asks of the device, as XLA planned them."""

    arguments: int
    results: int
    temporaries: int
    aliased: int  # of the results, that lie in arguments

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Planned:
        plan = compiled.memory_analysis()
        return cls(
            plan.argument_size_in_bytes,
            plan.output_size_in_bytes,
            plan.temp_size_in_bytes,
            plan.alias_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        return self.arguments + self.results + self.temporaries - self.aliased


def digits(x: float, count: int = 5) -> float | None:
    """x with as many digits as the measurement has; None for NaN and Inf, which JSON lacks."""
    return float(f"{x:.{count}g}") if math.isfinite(x) else None


def sentence(reason: Exception) -> str:
    """What an exception says, in one line of bounded length."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) < 200 else text[:200] + "…"


def device_name() -> str:
    """The model of the GPU that JAX runs on, or "cpu"."""
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind


def preset() -> str:
    """Which defaults suit the device that JAX runs on: "cpu" or "gpu"."""
    return "cpu" if device_name() == "cpu" else "gpu"


def results_path(name: str, kind: str = "", folder: pathlib.Path | None = None) -> pathlib.Path:
    """<folder>/<gpu>.json or <gpu>-<kind>.json, in lower case with dashes.

    The folder is benchmarks/results where none is named.
    """
    words = f"{name} {kind}".lower().split()
    return (folder or ROOT / "benchmarks" / "results") / ("-".join(words) + ".json")


def environment() -> dict[str, Any]:
    """The head of a results file: machine, versions, and the trees that are measured."""
    return {
        "gpu": device_name(),
        "driver": _driver(),
        "cuda": _cuda(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tree": {name: tree_hash(name) for name in ("cuda", "sage_jax")},
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _cuda() -> str | None:
    """Version of the CUDA runtime that JAX loaded, None without one."""
    try:
        from jax._src.lib import cuda_versions

        version = cuda_versions.cuda_runtime_get_version()
    except (ImportError, AttributeError):  # a private module; None without the CUDA plugin
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def tree_hash(folder: str) -> str:
    """git's hash of a folder as it lies in the working tree.

    Equal to `git rev-parse HEAD:<folder>` when everything is committed, and different otherwise, so
    that a measurement of uncommitted code never passes for one of a commit. It needs git, not a
    repository: a plain copy of the tree gives the same hash.
    """
    if not shutil.which("git"):
        raise RuntimeError("the results name the measured code by git's tree hash; install git.")
    with tempfile.TemporaryDirectory() as scratch:
        env = dict(os.environ, GIT_DIR=f"{scratch}/git", GIT_WORK_TREE=str(ROOT))
        env.pop("GIT_INDEX_FILE", None)

        def git(*arguments: str) -> str:
            command = ["git", *arguments]
            done = subprocess.run(
                command, env=env, cwd=ROOT, capture_output=True, text=True, check=True
            )
            return done.stdout.strip()

        git("init", "-q")
        git("add", "--", folder)
        return git("write-tree", f"--prefix={folder}/")


def count_tests(junit: pathlib.Path) -> dict[str, int]:
    """Passed, failed and skipped tests from the file that `pytest --junitxml` wrote."""
    suites = list(xml.etree.ElementTree.parse(junit).iter("testsuite"))
    total = lambda name: sum(int(suite.get(name, 0)) for suite in suites)
    failed, skipped = total("failures") + total("errors"), total("skipped")
    return {"passed": total("tests") - failed - skipped, "failed": failed, "skipped": skipped}
