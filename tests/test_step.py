"""`benchmarks/step.py` at a tiny size: its rows, what counts as attention's kernels, bad options."""

import types

import jax
import pytest
from programs import load

from test_benchmark import assert_refused, broken, contenders, measuring

step = load("benchmarks/step.py")

TINY = (
    "--contexts 32 64 --tokens 64 --layers 1 --heads 1 --head-dim 64 --implementation cpu --peers xla --repeats 2"
).split()

# As the profiler names them on an H200, shortened.
KERNELS = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": 5e6,
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>": 1e6,
    "void sage::sm90::attention_fwd<sage::sm90::ForwardConfig<>>": 2e6,
    "nvjet_sm90_tst_128x128_64x6_2x1_v_bz_NNT": 3e6,
    "input_add_reduce_fusion_1": 4e6,
}


def named(name, **fields):
    return types.SimpleNamespace(name=name, **fields)


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A folder with the profile of a GPU and a host; every kernel above ran twice on one of two streams."""
    events = [named(name, duration_ns=ns) for name, ns in KERNELS.items()]
    lines = [
        named("Stream #14(Compute)", events=events * 2),
        named("Stream #15(MemcpyH2D)", events=[named("MemcpyH2D", duration_ns=1e6)]),
        named("XLA Ops", events=events),
    ]
    planes = [named("/device:GPU:0", lines=lines), named("/host:CPU", lines=lines)]
    read = lambda path: types.SimpleNamespace(planes=planes)
    monkeypatch.setattr(jax.profiler, "ProfileData", types.SimpleNamespace(from_file=read))
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "host.xplane.pb").touch()
    return tmp_path


def test_rows_of_every_context_and_implementation(capsys):
    assert step.main(TINY) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line and line[-1] == "–"]
    assert [(row[0], row[-5]) for row in rows] == [
        (context, label) for context in ("32", "64") for label in ("train8", "xla")
    ]
    assert all(float(row[-4]) > 0 and row[-3:] == ["–"] * 3 for row in rows)  # a CPU has no kernels


def test_streams_of_the_gpu_are_added_up(profile):
    found = step.kernel_seconds(profile)
    expected = {name: 2e-9 * ns for name, ns in KERNELS.items()} | {"MemcpyH2D": 1e-3}
    assert found == pytest.approx(expected)


def test_attention_is_told_from_all_else():
    found = step.Step(20.0, {name: 1e-6 * ns for name, ns in KERNELS.items()})
    assert (found.device, found.attention) == (pytest.approx(15), pytest.approx(8))
    (line,) = [x for x in step.table([(4096, "ours", found)]).splitlines() if "ours" in x]
    assert line.split() == ["4096", "ours", "20.0", "15.0", "8.0", "7.0"]
    alone = step.Step(20.0, {"nvjet_sm90": 3.0})
    assert (alone.device, alone.attention) == (3.0, None)


def test_the_longest_kernels(profile, capsys):
    assert step.main([*TINY, "--contexts", "64", "--kernels", "2"]) == 0
    text = capsys.readouterr().out
    assert text.index("sdpa") < text.index("input_add_reduce") and "nvjet" not in text


def test_what_cannot_run_is_named_and_fails_the_run_only_if_it_is_ours(monkeypatch, capsys):
    monkeypatch.setitem(contenders.PEERS, "fa3_bf16", lambda: broken("fa3_bf16", None))
    options = [*TINY, "--contexts", "64", "--peers", "fa3_bf16"]
    assert step.main(options) == 0
    assert "could not run fa3_bf16: no such kernel" in capsys.readouterr().out
    monkeypatch.setattr(contenders, "ours", lambda recipe, _: broken("sage_jax", recipe.name))
    assert step.main(options) == 1


def test_the_gpu_sizes(monkeypatch):
    monkeypatch.setattr(measuring, "preset", lambda: "gpu")
    options = step.parse([])
    assert (options.contexts, options.tokens) == ([4096, 16384], 16384)
    assert (options.layers, options.heads, options.head_dim) == (8, 8, 128)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--contexts 0", "'0' is not a positive whole number"),
        ("--contexts 100", "--tokens 512 is no multiple of the context 100"),
        ("--head-dim 33", "--head-dim 33 is odd; the GPT's rotary positions need an even number"),
        ("--recipes sage2", "--recipes sage2 has no backward pass; choose train8 or sagebwd"),
    ],
)
def test_bad_options_give_one_line(options, sentence, capsys):
    assert_refused(step.parse, options, sentence, capsys)
