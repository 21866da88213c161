"""`tools/gpu_check.sh` with stand-ins for the GPU and Python: steps, limits, logs, exit status."""

import pathlib
import shutil
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "tools" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

PYTHON = """#!/usr/bin/env bash
# Stands for Python: tests write a junit file, the benchmark fails or takes long if told so.
case "$*" in
  -) cat > /dev/null ;;
  *"import xdist"*) exit 1 ;;
  *lengths.py* | *memory.py* | *sparse.py*) echo "$*" ;;
  *attention.py*) echo "bench: $*"; [ ! -f "$HERE/slow" ] || sleep 60; [ ! -f "$HERE/broken" ] ;;
  *pytest*)
    echo "tests: $*"
    [ ! -f "$HERE/wrong" ] || { echo "FAILED tests/test_gpu.py::test_it[x] - assert 1 < 0"; exit 1; }
    for word; do case $word in --junitxml=*) touch "${word#*=}" ;; esac; done ;;
  *) echo "py312" ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """A function that runs the script with stand-ins first in the PATH."""
    tools = {
        "nvidia-smi": "#!/bin/sh\necho 'A GPU, 9.0, 580.1'\n",
        "cmake": "#!/bin/sh\necho cmake $*\n[ ! -f $HERE/no_compiler ]\n",
        "compute-sanitizer": "#!/bin/sh\necho sanitizer $*\n",
        "python": PYTHON,
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path)}
        command = ["bash", str(SCRIPT), "--python", "python", "--out", str(tmp_path / "out")]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        summary = tmp_path / "out" / "summary.txt"
        return done, summary.read_text().splitlines() if summary.exists() else []

    return run


def test_all_steps_in_order(check, tmp_path):
    done, summary = check("--bench", "--passes fwd", "--pytest", "-x")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(",")[0] for line in summary] == [
        f"{step}: passed" for step in ("build", "test", "sanitize", "bench", "lengths", "memory", "sparse")
    ]
    log = {
        step: (tmp_path / "out" / f"{step}.log").read_text()
        for step in ("build", "test", "bench", "lengths", "memory", "sparse")
    }
    assert "SAGE_JAX_CUDA=ON" in log["build"] and "--build build/gpu_py312" in log["build"]
    assert " -x tests" in log["test"] and "-m gpu" in log["test"]
    assert f"--tests {tmp_path}/out/tests.xml --passes fwd" in log["bench"]
    assert "--causal both" in log["lengths"] and "--out benchmarks/results" in log["memory"]
    sanitized = (tmp_path / "out" / "sanitize.log").read_text()
    assert all(f"--tool {tool}check" in sanitized for tool in ("mem", "race", "sync"))


def test_chosen_steps_only(check):
    done, summary = check("bench", "build")
    assert done.returncode == 0
    assert [line.split(":")[0] for line in summary] == ["build", "bench"]


def test_a_step_is_stopped_at_its_limit(check, tmp_path):
    (tmp_path / "slow").touch()
    done, summary = check("bench", "--limit", "bench=1")
    assert done.returncode == 1
    assert summary[0].startswith("bench: stopped at its limit of 1 s")


def test_failures_are_reported_and_a_failed_build_ends_the_run(check, tmp_path):
    (tmp_path / "broken").touch()
    done, summary = check("test", "bench")
    assert done.returncode == 1
    assert summary[0].startswith("test: passed") and summary[1].startswith("bench: failed")
    (tmp_path / "no_compiler").touch()
    done, summary = check()
    assert done.returncode == 1
    assert len(summary) == 1 and summary[0].startswith("build: failed")


def test_the_summary_names_the_tests_that_failed(check, tmp_path):
    (tmp_path / "wrong").touch()
    done, summary = check("test", "bench")
    assert done.returncode == 1
    assert summary[0].startswith("test: failed") and summary[2].startswith("bench: passed")
    assert summary[1] == "  FAILED tests/test_gpu.py::test_it[x] - assert 1 < 0"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["fly"], "unknown argument 'fly'; the steps are build, test, sanitize, bench, lengths, memory and sparse"),
        (["--limit", "bench=soon"], "--limit bench=soon is not of the form STEP=SECONDS"),
        (["--limit", "fly=60"], "--limit fly=60 is not of the form STEP=SECONDS"),
        ([""], "unknown argument ''"),
        (["--archs"], "--archs needs a value"),
    ],
)
def test_wrong_options_give_one_line(check, arguments, sentence):
    done, _ = check(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_help(check):
    done, _ = check("--help")
    assert done.returncode == 0 and "Steps, in this order" in done.stdout
    assert "set -u" not in done.stdout


def test_without_a_gpu(check, tmp_path):
    (tmp_path / "nvidia-smi").unlink()
    done, _ = check("build")
    assert done.returncode == 2 and "nvidia-smi is missing" in done.stderr
