"""The CPU module's build under compilers that lack an instruction set."""

import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CMAKE = shutil.which(
    "cmake", path=f"{pathlib.Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
)
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are those of x86")
@pytest.mark.skipif(
    not (CMAKE and COMPILER and importlib.util.find_spec("nanobind")),
    reason="needs cmake, a compiler and nanobind",
)
@pytest.mark.parametrize(
    ("unknown", "kernels"),
    [
        ("-mavx512bf16", "generic;avx2;avx512"),
        ("-mavx512vnni", "generic;avx2"),
        ("-mavx2", "generic"),
    ],
)
def test_a_compiler_without_an_instruction_set_builds_the_others(tmp_path, unknown, kernels):
    old = tmp_path / "c++"
    old.write_text(
        "#!/bin/sh\nfor flag; do\n"
        f'  case $flag in {unknown} | -march=*) echo "unknown option $flag" >&2; exit 1 ;; esac\n'
        f'done\nexec {COMPILER} "$@"\n'
    )
    old.chmod(0o755)
    said = subprocess.run(
        [CMAKE, "-S", ROOT, "-B", tmp_path / "build", "-DSAGE_JAX_CUDA=OFF",
         f"-DCMAKE_CXX_COMPILER={old}", f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert f"-- CPU kernels: {kernels}\n" in said.stdout
