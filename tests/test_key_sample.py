"""tools/key_sample.py: a sample of the keys smooths as well as all of them, as docs/numerics.md says."""

import pytest
from programs import load

key_sample = load("tools/key_sample.py")


@pytest.mark.parametrize("kind", key_sample.KEYS)
def test_a_sample_is_as_good_as_all_keys(kind):
    none, sample = key_sample.ratios(kind, 1024, 1024, 2)
    assert sample < 1.06  # 1.03 measured where it is worst
    assert none > 1.3 * sample or kind.startswith(("normal", "four sinks", "heavy"))


def test_of_short_lengths_in_long_arrays_a_sample_is_still_better_than_none():
    none, sample = key_sample.ratios("neighbours alike, a vector 8 times as large", 1024, 100, 2)
    assert 2 * sample < none


def test_prints_a_table(capsys):
    key_sample.main(["--tokens", "1024,1100", "--valid", "900", "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(key_sample.KEYS) and all(line.count("|") == 5 for line in lines)
