"""`benchmarks/sparse.py` on a tiny grid: rows, densities, and what is refused."""

import json

import pytest
from programs import load

from test_benchmark import assert_refused

sparse = load("benchmarks/sparse.py")
TINY = "--lengths 384 --dims 64 --channels 64 --implementation cpu --peers xla --repeats 1 --seconds 1e-4 --out".split()


def test_rows_have_their_densities(tmp_path):
    assert sparse.main([*TINY, str(tmp_path)]) == 0
    results = json.loads((tmp_path / "cpu-sparse.json").read_text())
    assert list(results)[-3:] == ["samples", "left_out", "speed"] and results["left_out"] == []
    rows = results["speed"]
    forward = [(row["impl"], row["recipe"]) for row in rows if row["pass"] == "fwd" and not row["causal"]]
    shares = [("sage_jax", f"train8 {x}") for x in ("0.5", "0.25", "0.125")]
    assert forward == [("sage_jax", "train8"), ("xla", None), *shares, ("sage_jax", "select")]
    assert {row["pass"] for row in rows} == {"fwd", "fwd_bwd"} and all(row["ms"] > 0 for row in rows)
    kept = {(row["share"], row["causal"]): row["density"] for row in rows if "share" in row}
    assert kept[0.5, False] == pytest.approx(2 / 3, abs=1e-3)  # two of three blocks of keys
    assert kept[0.125, False] == pytest.approx(1 / 3, abs=1e-3) and kept[0.125, True] < kept[0.5, True] < 0.7


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--shares 1.5", "'1.5' is above 1, all of the blocks"),
        ("--dims 48 --channels 64", "--dims 48 is above 256 or does not divide --channels 64"),
        ("--recipes train9", "recipe='train9' is unknown"),
    ],
)
def test_bad_options(arguments, told, capsys):
    assert_refused(sparse.parse, arguments, told, capsys)
