"""`benchmarks/attention.py` on a tiny grid: results file, resumption, table, bad options."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark = importlib.import_module("attention")
contenders = importlib.import_module("contenders")
cpu_benchmark = importlib.import_module("cpu")
measuring = importlib.import_module("measuring")
resultfile = importlib.import_module("resultfile")
sys.path.remove(str(ROOT / "benchmarks"))
tree_hash = measuring.tree_hash

GRID = "--seq 64 --tokens 128 --channels 128 --head-dim 64 --accuracy-seq 64"
TINY = f"--preset cpu {GRID} --repeats 1 --seconds 1e-4 --recipes sage2 train8".split()

SPEED = {
    "pass": str,
    "impl": str,
    "recipe": (str, type(None)),
    "batch": int,
    "seq": int,
    "heads": int,
    "kv_heads": int,
    "head_dim": int,
    "causal": bool,
    "ms": float,
    "tflops": (float, type(None)),
}
ACCURACY = {
    "impl": str,
    "recipe": (str, type(None)),
    "data": str,
    "seq": int,
    "head_dim": int,
    "tensor": str,
    "cos": float,
    "rel_l2": float,
}


def assert_rows(rows, schema):
    for row in rows:
        assert list(row) == list(schema)
        for field, kind in schema.items():
            assert isinstance(row[field], kind), (field, row)


@pytest.fixture(scope="module", autouse=True)
def same_code():
    """The code counts as unchanged while these tests run, even if someone edits it meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "tree_hash", lambda folder: "f" * 40)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path of the results, exit status) of one run with all passes."""
    path = tmp_path_factory.mktemp("benchmark") / "cpu.json"
    return path, benchmark.main([*TINY, "--output", str(path)])


def test_results_follow_the_schema(tiny):
    path, status = tiny
    assert status == 0
    results = json.loads(path.read_text())
    head = ["gpu", "driver", "cuda", "jax", "date", "tree", "tests", "speed", "accuracy"]
    assert list(results) == head
    assert set(results["tree"]) == {"cuda", "sage_jax"}
    assert all(len(name) == 40 for name in results["tree"].values())
    assert results["tests"] == {"passed": 0, "failed": 0, "skipped": 0}
    assert_rows(results["speed"], SPEED)
    assert_rows(results["accuracy"], ACCURACY)
    timed = {(r["pass"], r["impl"], r["recipe"], r["causal"]) for r in results["speed"]}
    both = (False, True)
    expected = {("fwd", "sage_jax", "sage2", c) for c in both}
    expected |= {(p, "xla", None, c) for p in ("fwd", "bwd", "fwd_bwd") for c in both}
    expected |= {(p, "sage_jax", "train8", c) for p in ("fwd", "bwd", "fwd_bwd") for c in both}
    expected |= {("quantize", "sage_jax", r, False) for r in ("sage2", "train8")}
    assert timed == expected and len(results["speed"]) == len(expected)
    errors = {(r["recipe"], r["data"], r["tensor"]): r["rel_l2"] for r in results["accuracy"]}
    assert len(errors) == len(results["accuracy"]) == 4 * (1 + 4 + 4)
    assert 0.005 < errors["sage2", "normal", "o"] < 0.06
    assert 0 < errors[None, "sink", "dk"] < 0.01 and ("sage2", "normal", "dq") not in errors


def test_tflops_count_the_operations(tiny):
    for row in json.loads(tiny[0].read_text())["speed"]:
        factor = {"fwd": 1, "bwd": 2.5, "fwd_bwd": 3.5, "quantize": None}[row["pass"]]
        if factor is None:
            assert row["tflops"] is None
            continue
        operations = factor * 4 * 2 * 2 * 64 * 64 * 64 / (2 if row["causal"] else 1)
        assert row["tflops"] == pytest.approx(operations / (row["ms"] * 1e-3) / 1e12, rel=1e-3)


def test_a_second_run_measures_nothing_again_and_prints_the_table(tiny, capsys):
    path, _ = tiny
    before = json.loads(path.read_text())
    assert benchmark.main([*TINY, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "[1/" not in printed
    assert json.loads(path.read_text())["speed"] == before["speed"]
    lines = printed.splitlines()
    columns = "implementation pass head dim seq batch causal ms TFLOPS × xla"
    assert " ".join(lines[1].split()) == columns
    xla = [line for line in lines if line.startswith("xla  ") and " fwd " in line]
    assert len(xla) == 2 and all(line.endswith(" 1.00") for line in xla)
    assert any(line.startswith("sage_jax train8 ") and "sink" in line for line in lines)


def test_results_of_other_code_are_not_continued(tiny, tmp_path, capsys):
    results = json.loads(tiny[0].read_text())
    results["tree"]["cuda"] = "0" * 40
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(results))
    benchmark.main([*TINY, "--output", str(path), "--budget-seconds", "1e-9"])
    printed = capsys.readouterr().out
    assert "starting afresh" in printed
    assert "the budget is spent: 11 measurements are left for later" in printed
    assert json.loads(path.read_text())["speed"] == []


def test_counts_of_tests_come_from_pytest(tiny, tmp_path):
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    )
    path = tmp_path / "cpu.json"
    path.write_text(tiny[0].read_text())
    benchmark.main([*TINY, "--output", str(path), "--tests", str(junit)])
    assert json.loads(path.read_text())["tests"] == {"passed": 4, "failed": 3, "skipped": 3}


def test_what_cannot_run_is_named_and_fails_the_run_only_if_it_is_ours(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(contenders.PEERS, "fa3_bf16", lambda: broken("fa3_bf16", None))
    options = [*TINY, "--passes", "fwd", "--no-accuracy", "--fresh", "--output"]
    options += [str(tmp_path / "cpu.json"), "--peers", "fa3_bf16"]
    assert benchmark.main(options) == 0
    assert "could not run fa3_bf16: no such kernel here\n" in capsys.readouterr().out
    monkeypatch.setattr(contenders, "ours", lambda recipe, _: broken("sage_jax", recipe.name))
    assert benchmark.main(options) == 1


def test_operands_that_are_given_ready_are_made_before_the_clock_starts(tmp_path, monkeypatch):
    def halves(*operands):
        return tuple(x.astype(jnp.float16) for x in operands)

    ready = contenders.Contender("fa3_bf16", None, lambda q, k, v, causal: q, differentiable=False, prepare=halves)
    line = benchmark.Line("fwd", 1, 8, 1, 32, False)
    inputs = line.inputs()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    for given in shapes, inputs:
        run = benchmark.speed_runs(line, ready, given)
        assert [x.dtype for x in run.args] == [jnp.float16] * 3 and run.args[0].shape == line.shape
    assert run().dtype == jnp.float16
    monkeypatch.setitem(contenders.PEERS, "fa3_bf16", lambda: ready)
    path = tmp_path / "cpu.json"
    assert benchmark.main([*TINY, "--fresh", "--output", str(path), "--peers", "fa3_bf16"]) == 0
    results = json.loads(path.read_text())
    assert {row["pass"] for row in results["speed"] if row["impl"] == "fa3_bf16"} == {"fwd"}
    assert not any(row["impl"] == "fa3_bf16" for row in results["accuracy"])


def test_a_peer_without_gradients_is_left_out_of_training(monkeypatch, capsys):
    forward = contenders.Contender("fa3_bf16", None, lambda q, k, v, causal: q, differentiable=False)
    monkeypatch.setitem(contenders.PEERS, "fa3_bf16", lambda: forward)
    options = benchmark.parse([*TINY, "--peers", "fa3_bf16", "xla"])
    assert [c.impl for c in benchmark.contestants(options, training=True)] == ["sage_jax"] * len(options.recipes) + ["xla"]
    assert capsys.readouterr().out == "left out: fa3_bf16: it is timed forward only, and this measures training\n"
    assert forward in benchmark.contestants(options)


def test_the_gpu_grid_starts_with_what_matters_most():
    options = benchmark.parse(["--preset", "gpu"])
    steps = benchmark.plan(options)
    assert steps[0] == benchmark.Line("fwd", 1, 16384, 16, 128, False)
    assert len(steps) == len(set(steps)) == 3 * 3 * 2 * 2 + 3 * 2 + 8
    assert all(s.batch * s.seq == 16384 for s in steps if isinstance(s, benchmark.Line))


def test_recipes_with_changes():
    options = benchmark.parse(["--recipes", "train8:dp=bf16:delta=exact", "sage2:q_block=64"])
    assert not benchmark.parse(["--recipes", "sage2:smooth_k=False"]).recipes[0].smooth_k
    assert [(r.dp, r.delta, r.q_block) for r in options.recipes] == [
        ("bf16", "exact", 1),
        ("int8", "output", 64),
    ]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--seq 100", "--tokens 512 is no multiple of the sequence length 100"),
        ("--head-dim 48", "--channels 128 is no multiple of the head dimension 48"),
        ("--recipes sage9", "recipe='sage9' is unknown; choose one of sage1"),
        ("--recipes train8:dp=int4", "dp='int4' is not supported"),
        ("--recipes train8:colour=red", "recipe='train8:colour=red': a recipe has no field 'colour'"),
        ("--repeats zero", "'zero' is not a positive whole number"),
        ("--budget-seconds -1", "'-1' is not a positive number"),
        ("--passes sideways", "invalid choice: 'sideways'"),
        ("--recipes train8:dp", "recipe='train8:dp': 'dp' should be field=value"),
        ("--recipes train8:q_block=x", "q_block should be a number, but is 'x'"),
        ("--recipes train8:smooth_k=no", "smooth_k should be true or false, but is 'no'"),
        ("--head-dim 512 --channels 512", "--head-dim 512 is above 256"),
        ("--implementation tpu", "invalid choice: 'tpu'"),
        ("--seconds inf", "'inf' is not a positive number"),
        ("--output .", "--output . is a folder"),
        ("--tests nowhere.xml", "--tests nowhere.xml does not exist"),
        ("--speed", "unrecognized arguments: --speed"),
    ],
)
def test_wrong_options_give_one_line(options, sentence, capsys):
    assert_refused(benchmark.parse, f"--preset cpu {options}", sentence, capsys)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--dtypes float64", "invalid choice: 'float64'"),
        ("--heads 0", "'0' is not a positive whole number"),
        ("--tokens -1", "'-1' is not a positive whole number"),
        ("--head-dims 64 300", "head dimension 300 is not supported"),
        ("--repeats 0", "'0' is not a positive whole number"),
        ("--toke 5", "unrecognized arguments: --toke"),
    ],
)
def test_wrong_options_of_the_cpu_benchmark_give_one_line(options, sentence, capsys):
    assert_refused(cpu_benchmark.parse, options, sentence, capsys)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--budget-seconds" in printed and "results/<gpu>.json" in printed


def test_samples_are_taken_in_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) or jnp.zeros(()) for name in "ab"}
    medians = measuring.interleaved_medians(runs, repeats=3, seconds=1e-9)
    assert list(medians) == ["a", "b"] and all(seconds > 0 for seconds in medians.values())
    assert "".join(order) == "aaa" + "bbb" + "ab" * 3  # warm-up, then in turns


def test_tree_hash_is_gits(tmp_path, monkeypatch):
    """Of the files as they are, in a repository or outside of one; ignored files do not count."""

    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "a.py").write_text("1")
    (tmp_path / "code" / "deep" / "b.sh").write_text("2")
    (tmp_path / "code" / "deep" / "b.sh").chmod(0o755)
    (tmp_path / "code" / "built.so").write_text("3")
    (tmp_path / ".gitignore").write_text("*.so\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    committed = git("rev-parse", "HEAD:code")
    assert tree_hash("code") == committed
    (tmp_path / ".git").rename(tmp_path / "elsewhere")
    assert tree_hash("code") == committed
    (tmp_path / "code" / "a.py").write_text("changed")
    assert tree_hash("code") != committed


@pytest.mark.parametrize(
    "name, file",
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090.json"),
        ("cpu", "cpu.json"),
    ],
)
def test_one_file_a_gpu_model(name, file):
    assert measuring.results_path(name) == ROOT / "benchmarks" / "results" / file


def broken(impl, recipe):
    """A contender that cannot run."""

    def raises(q, k, v, causal):
        raise NotImplementedError("no such kernel\nhere")

    return contenders.Contender(impl, recipe, raises)


def assert_refused(parse, options, sentence, capsys):
    """Parsing ends the program with one line that contains the sentence."""
    with pytest.raises(SystemExit) as stopped:
        parse(options.split())
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in printed and printed.count("\n") == 1
