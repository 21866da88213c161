"""`benchmarks/lengths.py` on a tiny grid: both series, results file, plot, what is left out."""

import json

import pytest
from programs import load

from test_benchmark import SPEED, assert_refused, assert_rows, broken, contenders, measuring
from test_benchmark import same_code  # noqa: F401  (a fixture of this module too)

lengths = load("benchmarks/lengths.py")

GRID = "--lengths 128 64 --batches 1 2 --batch-length 64 --heads 2 --dim 64 --peers xla"
TINY = f"{GRID} --implementation cpu --causal both --repeats 2 --seconds 1e-4 --out".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of the results, exit status) of one run with both passes."""
    folder = tmp_path_factory.mktemp("lengths") / "made"
    return folder, lengths.main([*TINY, str(folder)])


def test_results_and_plot_are_named_after_the_device(tiny):
    folder, status = tiny
    assert status == 0
    assert sorted(path.name for path in folder.iterdir()) == ["cpu-lengths.json", "cpu-lengths.png"]
    results = json.loads((folder / "cpu-lengths.json").read_text())
    head = ["gpu", "driver", "cuda", "jax", "date", "tree"]
    grid = ["lengths", "batches", "batch_length", "heads", "head_dim", "samples"]
    assert list(results) == [*head, *grid, "left_out", "speed"] and results["left_out"] == []
    assert (folder / "cpu-lengths.png").read_bytes().startswith(b"\x89PNG")


def test_rows_hold_the_median_and_its_spread(tiny):
    rows = json.loads((tiny[0] / "cpu-lengths.json").read_text())["speed"]
    assert_rows(rows, SPEED | {"ms_fastest": float, "ms_slowest": float})
    assert all(0 < row["ms_fastest"] <= row["ms"] <= row["ms_slowest"] for row in rows)
    timed = [(r["impl"], r["recipe"], r["pass"], r["batch"], r["seq"], r["causal"]) for r in rows]
    kinds = [("sage_jax", "sage2", "fwd"), ("sage_jax", "train8", "fwd"), ("xla", None, "fwd")]
    kinds += [("sage_jax", "train8", "fwd_bwd"), ("xla", None, "fwd_bwd")]
    shapes = [(1, 128), (1, 64), (2, 64)]  # (1, 64) belongs to both series and is measured once
    expected = {(*kind, *shape, c) for kind in kinds for shape in shapes for c in (False, True)}
    assert set(timed) == expected and len(timed) == len(expected)


def test_each_series_is_a_column_of_the_plot(tiny):
    results = json.loads((tiny[0] / "cpu-lengths.json").read_text())
    (over_length, first), (over_batch, second) = lengths.series(results)
    assert over_length == "sequence length, tokens (batch 1, 2 heads)"
    assert over_batch == "batch × heads (sequences of 64 tokens)"
    assert list(first) == list(second) and len(first) == 10
    assert "sage_jax train8, both, causal" in first and "xla, forward" in first
    assert all([x for x, _ in curve] == [64, 128] for curve in first.values())
    assert all([x for x, _ in curve] == [2, 4] for curve in second.values())


def test_an_earlier_file_is_drawn_without_measuring(tiny, tmp_path):
    path = tmp_path / "kept.json"
    path.write_text((tiny[0] / "cpu-lengths.json").read_text())
    assert lengths.main(["--plot", str(path)]) == 0
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_what_the_device_cannot_hold_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lengths, "device_bytes", lambda: 200_000)
    assert lengths.main([*TINY, str(tmp_path), "--recipes", "train8", "--causal", "yes"]) == 0
    results = json.loads((tmp_path / "cpu-lengths.json").read_text())
    named = "sage_jax train8 (kind fwd_bwd, batch 1, seq 128, heads 2, head_dim 64, causal True)"
    assert any(text.startswith(f"{named}: it needs 0.0 GiB") for text in results["left_out"])
    assert f"left out: {named}: it needs" in capsys.readouterr().out
    timed = {(row["recipe"], row["pass"], row["seq"]) for row in results["speed"]}
    assert ("train8", "fwd", 64) in timed and ("train8", "fwd_bwd", 128) not in timed


def test_what_cannot_run_is_named_and_fails_the_run_only_if_it_is_ours(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(contenders.PEERS, "fa3_bf16", lambda: broken("fa3_bf16", None))
    options = [*TINY, str(tmp_path), "--peers", "fa3_bf16", "--recipes", "sage2"]
    options += ["--passes", "forward", "--lengths", "64", "--batches"]
    assert lengths.main(options) == 0
    assert "could not run fa3_bf16 (kind fwd, batch 1, seq 64" in capsys.readouterr().out
    results = json.loads((tmp_path / "cpu-lengths.json").read_text())
    assert len(lengths.series(results)) == 1 and len(results["left_out"]) == 2
    monkeypatch.setattr(contenders, "ours", lambda recipe, _: broken("sage_jax", recipe.name))
    assert lengths.main(options) == 1
    assert "no such kernel here" in capsys.readouterr().out


def test_the_gpu_grid_has_both_series(monkeypatch):
    monkeypatch.setattr(measuring, "preset", lambda: "gpu")
    options = lengths.parse([])
    lines = lengths.plan(options)
    assert options.implementation == "cuda" and options.peers == ["cudnn_bf16"]
    assert [recipe.name for recipe in options.recipes] == ["sage2", "train8"]
    assert len(lines) == len(set(lines)) == 2 * (9 + 4)
    assert {line.seq for line in lines if line.batch == 1} == {2**i for i in range(9, 18)}
    assert {line.batch for line in lines if line.seq == 4096} == {1, 2, 4, 8, 16}
    assert all((line.heads, line.head_dim, line.causal) == (16, 128, True) for line in lines)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--lengths 0", "'0' is not a positive whole number"),
        ("--dim 512", "--dim 512 is above 256, the largest"),
        ("--recipes sage9", "recipe='sage9' is unknown; choose one of sage1"),
        ("--passes bwd", "invalid choice: 'bwd'"),
        ("--causal maybe", "invalid choice: 'maybe'"),
        ("--peers torch", "invalid choice: 'torch'"),
        ("--seconds inf", "'inf' is not a positive number"),
        (f"--out {__file__}", "is a file; name the folder to write to"),
        ("--plot nowhere.json", "--plot nowhere.json does not exist"),
        ("--length 512", "unrecognized arguments: --length"),
    ],
)
def test_wrong_options_give_one_line(options, sentence, capsys):
    assert_refused(lengths.parse, options, sentence, capsys)
