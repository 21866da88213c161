"""`benchmarks/memory.py` on tiny shapes: what is counted, ratios, the model's step, bad options."""

import json

import pytest
from programs import load, native_calls

from test_benchmark import assert_refused, broken, contenders, measuring
from test_benchmark import same_code  # noqa: F401  (a fixture of this module too)

memory = load("benchmarks/memory.py")

TINY = (
    "--tokens 256 --channels 128 --head-dim 64 --layers 2 --implementation cpu --peers xla"
).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(results, exit status, texts of the compiled programs) of one run with each kind of checkpoint."""
    folder = tmp_path_factory.mktemp("memory")
    kinds = ["--checkpoint", "none", "blocks", "residuals"]
    programs, planned = [], measuring.Planned.of

    def recorded(compiled):
        programs.append(compiled.as_text())
        return planned(compiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Planned, "of", recorded)
        status = memory.main([*TINY, *kinds, "--out", str(folder)])
    return json.loads((folder / "cpu-memory.json").read_text()), status, programs


def test_results_follow_the_schema(tiny):
    results, status, _ = tiny
    assert status == 0
    head = ["gpu", "driver", "cuda", "jax", "date", "tree", "tokens", "channels", "head_dim"]
    assert list(results) == [*head, "layers", "peer", "bars", "left_out", "attention", "model"]
    assert results["bars"] == {"kept": 0.65, "temporaries": 1.3} and results["left_out"] == []
    names = [(row["impl"], row["recipe"]) for row in results["attention"]]
    assert names == [("sage_jax", "train8"), ("xla", None)]
    kinds = [(row["checkpoint"], row["impl"]) for row in results["model"]]
    expected = [(c, i) for c in ("none", "blocks", "residuals") for i in ("sage_jax", "xla")]
    assert kinds == expected


def test_kept_bytes_are_those_of_the_residuals(tiny):
    """Of `train8`: three tensors of codes, the output in bfloat16, scales, means, row values."""
    ours, xla = tiny[0]["attention"]
    values, rows = 256 * 128, 256 * 2
    assert 5 * values + 3 * 4 * rows < ours["kept"] < 5 * values + 3 * 4 * rows + 4096
    assert xla["kept"] > 3 * 2 * values + 2 * 2 * 256 * 256  # q, k, v and the probabilities
    assert ours["kept_ratio"] == pytest.approx(ours["kept"] / xla["kept"], rel=1e-4)
    assert xla["kept_ratio"] == xla["temporaries_ratio"] == 1


def test_the_peak_is_the_sum_of_the_plan(tiny):
    rows = {(row["checkpoint"], row["impl"]): row for row in tiny[0]["model"]}
    parameters = 4 * (256 * 128 + 2 * (12 * 128 * 128 + 2 * 128 + 2 * 64) + 128)
    for row in rows.values():
        parts = row["arguments"] + row["results"] + row["temporaries"] - row["aliased"]
        assert row["peak"] == parts
        assert parameters + 4 * 257 <= row["arguments"] < parameters + 4 * 257 + 1024
    assert rows["residuals", "sage_jax"]["peak"] != rows["blocks", "sage_jax"]["peak"]
    assert rows["blocks", "xla"]["peak_ratio"] == 1


def test_blocks_compute_attention_again_and_kept_residuals_spare_it(tiny):
    """Counted in the compiled programs, as XLA's plans at tiny sizes need not become smaller."""
    results, _, programs = tiny
    of_models = programs[len(results["attention"]) :]
    calls = {
        row["checkpoint"]: native_calls(text)
        for row, text in zip(results["model"], of_models, strict=True)
        if row["impl"] == "sage_jax"
    }
    once = dict(attend=2, attend_backward=2, quantize_kv=2, quantize_q=2)  # two layers
    again = dict(attend=4, attend_backward=2, quantize_kv=4, quantize_q=4)
    assert calls == {"none": once, "blocks": again, "residuals": once}


def test_tables_and_verdicts(capsys, monkeypatch):
    monkeypatch.setitem(memory.BARS, "kept", 1e-9)
    assert memory.main([*TINY, "--no-model"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "implementation kept, MiB × xla temporaries, MiB × xla" in lines
    verdicts = [line for line in lines if "the bar of" in line]
    assert len(verdicts) == 2 and verdicts[0].endswith("of xla's, ABOVE the bar of 1e-09")
    assert verdicts[1].endswith("of xla's, within the bar of 1.3")
    assert not any("GPT" in line or "json" in line for line in lines)


def test_without_peers_there_are_no_ratios(tmp_path, capsys):
    options = [*TINY, "--no-model", "--out", str(tmp_path), "--peers"]
    assert memory.main(options) == 0
    (row,) = json.loads((tmp_path / "cpu-memory.json").read_text())["attention"]
    assert row["kept"] > 0 and row["kept_ratio"] is None
    assert "the bar of" not in capsys.readouterr().out


def test_what_cannot_be_compiled_is_named_and_fails_the_run_only_if_it_is_ours(monkeypatch, capsys):
    monkeypatch.setitem(contenders.PEERS, "fa3_bf16", lambda: broken("fa3_bf16", None))
    options = [*TINY, "--no-model", "--peers", "fa3_bf16"]
    assert memory.main(options) == 0
    assert "could not compile fa3_bf16 (attention): no such kernel here" in capsys.readouterr().out
    monkeypatch.setattr(contenders, "ours", lambda recipe, _: broken("sage_jax", recipe.name))
    assert memory.main(options) == 1


def test_nothing_runs():
    """2^20 tokens would take hours; their plan takes as long as any."""
    ours = contenders.ours(memory.commandline.recipe("train8"), "cpu")
    assert memory.of_attention(ours, (1, 2**20, 16, 128))["kept"] > 5 * 2**20 * 2048


def test_the_gpu_sizes(monkeypatch):
    monkeypatch.setattr(measuring, "preset", lambda: "gpu")
    options = memory.parse([])
    assert (options.tokens, options.channels, options.head_dim) == (16384, 2048, 128)
    assert options.layers == 24 and options.checkpoint == ["none"]
    assert options.peers == ["cudnn_bf16"] and options.out is None


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--tokens 0", "'0' is not a positive whole number"),
        ("--channels 100", "--channels 100 is no multiple of the head dimension 64"),
        ("--head-dim 512 --channels 512", "--head-dim 512 is above 256, the largest"),
        ("--head-dim 33 --channels 33", "--head-dim 33 is odd; the GPT's rotary positions need"),
        ("--recipes sage2", "--recipes sage2 has no backward pass; choose train8 or sagebwd"),
        ("--recipes sage9", "recipe='sage9' is unknown; choose one of sage1"),
        ("--checkpoint some", "invalid choice: 'some'"),
        ("--peers torch", "invalid choice: 'torch'"),
        (f"--out {__file__}", "is a file; name the folder to write to"),
        ("--token 512", "unrecognized arguments: --token"),
    ],
)
def test_wrong_options_give_one_line(options, sentence, capsys):
    assert_refused(memory.parse, options, sentence, capsys)


def test_the_model_needs_its_packages(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "flax" or None)
    sentence = "the GPT needs flax: install what is missing, or give --no-model"
    assert_refused(memory.parse, "", sentence, capsys)
    assert not memory.parse(["--no-model"]).model
