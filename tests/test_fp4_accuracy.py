"""The program behind the accuracy tables of docs/nvfp4.md, on few tokens."""

import pytest
from programs import load

program = load("tools/fp4_accuracy.py")


def test_the_tables_have_a_row_for_each_variant(capsys):
    program.main(["seeds", "gradients", "--tokens", "64", "--seeds", "2"])
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| ")]
    assert "sage3, range" in rows and "published, mean" in rows
    assert rows[-3:] == ["LSE and O of INT8 scores", "LSE of INT8 scores, O of FP4", "LSE and O of FP4"]
    assert "nan" not in printed


def test_seeds_are_those_named():
    found = program.accuracy(64, range(2), {"sage3": program.SAGE3})
    alone = program.accuracy(64, range(1), {"sage3": program.SAGE3})
    assert all(found[kind]["sage3"][0] == alone[kind]["sage3"][0] for kind in program.KINDS)
    assert len({len(x["sage3"]) for x in found.values()} | {2}) == 1


@pytest.mark.parametrize("arguments, complaint", [(["speed"], "there is no table speed"), (["--seeds", "0"], "--seeds")])
def test_wrong_arguments_are_told(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert complaint in capsys.readouterr().err
