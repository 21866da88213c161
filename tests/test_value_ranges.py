"""The tool that measures what the ranges of e4m3 codes cost."""

import pytest
from programs import load

import sage_jax
from sage_jax import quantization, reference

value_ranges = load("tools/value_ranges.py")


def test_ranges_cost_what_the_tables_say():
    """Wide values need a wide range of V; normal ones do not care."""
    normal = value_ranges.range_errors("normal", 1024, 64)
    spike = value_ranges.range_errors("spike", 1024, 64)
    assert max(normal) - min(normal) < 1e-3 and 0.03 < normal[0] < 0.045
    assert spike[1] > spike[2] > spike[3] > spike[4] >= spike[0] - 1e-3


def test_the_range_in_use_is_among_those_measured():
    pair = float(reference.BOUNDED_P_SCALE), sage_jax.recipes["sage2"].v_range
    assert pair in value_ranges.RANGES


def test_room_above_the_sample_costs_what_the_tables_say():
    """Most where queries look at a small value."""
    errors = value_ranges.headroom_errors("sink", 2048, 64)
    used = value_ranges.HEADROOMS.index(float(quantization.HEADROOM))
    assert errors[used] < 1.3 * errors[0] and errors[-1] > 1.3 * errors[used]
    normal = value_ranges.headroom_errors("normal", 2048, 64)
    assert max(normal) < 1.05 * min(normal)


def test_headroom_errors_are_printed(capsys):
    value_ranges.main(["--headroom", "--tokens", "300", "--head-dim", "32", "--data", "normal"])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[2:5] == ["all", "2", "times"] and len(line.split()) == 2 + len(value_ranges.HEADROOMS)


def test_kernel_errors_are_printed(capsys):
    value_ranges.main(["--kernel", "--tokens", "300", "--head-dim", "32", "--data", "sink,drift"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["data", "tokens", "sage2"] and [line.split()[0] for line in lines] == ["sink", "drift"]
    assert all(0 < float(line.split()[2]) < 0.1 for line in lines)


def test_unknown_data_are_named(capsys):
    with pytest.raises(SystemExit):
        value_ranges.main(["--data", "nonsense"])
    assert "--data nonsense is unknown; choose from normal, outlier" in capsys.readouterr().err
