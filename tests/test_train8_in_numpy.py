"""The recipe `train8` in NumPy: a second opinion, without a line of the specification."""

import jax
import jax.numpy as jnp
import pytest
from programs import load

from sage_jax import accuracy

train8_in_numpy = load("tools/train8_in_numpy.py")


@pytest.mark.parametrize("name, head_dim", [("normal", 64), ("sink", 64), ("sigma3", 128)])
def test_errors_are_those_of_the_library(name, head_dim):
    """Within a tenth: where a softmax is sharp, errors depend that much on how a few codes happen to round."""
    *qkv, dout = accuracy.synthetic(name, jax.random.key(0), tokens=512, head_dim=head_dim, dtype=jnp.bfloat16)
    library = accuracy.compare(*qkv, dout=dout, recipes=["train8"]).errors["train8"]
    for tensor, error in train8_in_numpy.errors(name, 512, head_dim).items():
        assert library[tensor].rel_l2 == pytest.approx(error, rel=0.1)


def test_prints_what_a_results_file_says_next_to_it(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(
        '{"accuracy": [{"recipe": "train8", "data": "normal", "seq": 128, "head_dim": 32, "tensor": "dk", "rel_l2": 0.05}]}'
    )
    words = ["--tokens", "128", "--head-dim", "32", "--data", "normal"]
    train8_in_numpy.main([*words, "--results", str(path)])
    head, line = capsys.readouterr().out.splitlines()
    assert head.endswith("o, dq, dk, dv") and line.count("(") == 1 and "(0.0500, 1." in line


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--data", "nonsense"], "--data nonsense is unknown; choose from normal, outlier, sink, sigma3"),
        (["--tokens", "100"], "--tokens 100 is no multiple of 64"),
        (["--tokens", "0"], "--tokens 0 is no multiple of 64"),
    ],
)
def test_refuses_what_it_cannot_do(words, complaint, capsys):
    with pytest.raises(SystemExit):
        train8_in_numpy.main(words)
    assert complaint in capsys.readouterr().err
