"""The example that `make demo` runs, tiny: what it prints, what it writes, how it refuses."""

import json
import pathlib

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
TINY = (
    "--preset cpu --layers 2 --heads 1 --head-dim 16 --context 48 --batch 2 --steps 6 --sample 12"
).split()


@pytest.fixture
def train_gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_gpt

    return train_gpt


def error_line(train_gpt, capsys, *arguments: str) -> str:
    """What it says on wrong options: exactly one line, and nothing on standard output."""
    with pytest.raises(SystemExit) as exit_info:
        train_gpt.main(list(arguments))
    said = capsys.readouterr()
    assert exit_info.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.endswith("(--help explains every option)\n")
    return said.err


def test_a_tiny_run_writes_table_picture_and_numbers(train_gpt, capsys, tmp_path):
    assert train_gpt.main([*TINY, "--output", str(tmp_path / "out"), "--prompt", "import "]) == 0
    said = capsys.readouterr().out
    header = next(line for line in said.splitlines() if line.startswith("attention"))
    for column in ("train loss", "held-out loss", "tokens/s", "gradient error"):
        assert column in header
    assert header.count("difference") == 2
    assert "    import " in said  # the sample

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    exact, ours = written["runs"]["exact"], written["runs"]["train8"]
    for name, run in written["runs"].items():
        row = next(line for line in said.splitlines() if line.startswith(f"{name} "))
        assert f"{run['final_held_out_loss']:.4f}" in row
        assert len(run["train_loss"]) == 6 and np.all(np.isfinite(run["train_loss"]))
        assert run["tokens_per_second"] > 0 and run["step_memory_bytes"] > 0
        assert run["held_out_loss"][-1][0] == 6
    row = next(line for line in said.splitlines() if line.startswith("train8 ")).split()
    for at, loss in ((1, "final_train_loss"), (3, "final_held_out_loss")):
        assert row[at : at + 2] == [f"{ours[loss]:.4f}", f"{ours[loss] - exact[loss]:+.4f}"]
    # Same parameters and first batch: losses of step 1 agree but for what 8 bits take away.
    assert exact["train_loss"][0] == pytest.approx(ours["train_loss"][0], rel=2e-2)
    assert exact["train_loss"] != ours["train_loss"]
    errors = ours["gradient_error_of_step_1"]
    assert "blocks.1.attention.query.kernel" in errors
    assert 0 < max(errors.values()) < 0.25
    assert f"{max(errors.values()):.4f}" in said

    from gpt import checkpoint

    model, folder = checkpoint.load(tmp_path / "out" / "model.npz")
    assert (model.shape.layers, model.shape.context, folder) == (2, 48, None)

    picture = (tmp_path / "out" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_exact_runs_again_start_one_rounding_apart(train_gpt, tmp_path):
    assert train_gpt.main([*TINY, "--output", str(tmp_path), "--again", "2"]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert list(runs) == ["exact", "exact 2", "exact 3", "train8"]
    exact = runs["exact"]["train_loss"]
    for name in ("exact 2", "exact 3"):
        again = runs[name]["train_loss"]
        assert again != exact
        assert again == pytest.approx(exact, rel=5e-3)
        assert 0 < max(runs[name]["gradient_error_of_step_1"].values()) < 0.1
    assert runs["exact 2"]["train_loss"] != runs["exact 3"]["train_loss"]


def test_a_model_without_qk_norm_trains_and_is_read_again(train_gpt, capsys, tmp_path):
    assert train_gpt.main([*TINY, "--steps", "2", "--no-qk-norm", "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    names = runs["train8"]["gradient_error_of_step_1"]
    assert "blocks.0.attention.query.kernel" in names
    assert not any("query_norm" in name or "key_norm" in name for name in names)

    from gpt import checkpoint

    assert not checkpoint.load(tmp_path / "model.npz").model.shape.qk_norm


def test_a_run_begins_where_another_ended(train_gpt, capsys, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_gpt.main([*TINY, "--no-qk-norm", "--output", str(first)]) == 0
    start = ["--start", str(first / "model.npz")]
    longer = "--preset cpu --context 96 --batch 1 --steps 2 --sample 12".split()
    assert train_gpt.main([*longer, *start, "--output", str(second)]) == 0
    one, two = (json.loads((x / "results.json").read_text())["runs"] for x in (first, second))
    ended, begun = one["exact"]["held_out_loss"][-1][1], two["exact"]["held_out_loss"][0][1]
    assert begun == pytest.approx(ended, abs=0.1) and begun < one["exact"]["held_out_loss"][0][1]

    from gpt import checkpoint

    shape = checkpoint.load(second / "model.npz").model.shape
    assert (shape.layers, shape.head_dim, shape.context, shape.qk_norm) == (2, 16, 96, False)
    capsys.readouterr()
    assert "--layers 3 differs from 2" in error_line(train_gpt, capsys, *longer, *start, "--layers", "3")
    assert "leave out --qk-norm" in error_line(train_gpt, capsys, *longer, *start, "--qk-norm")
    assert "another --output" in error_line(train_gpt, capsys, *longer, *start, "--output", str(first))
    assert "is not a model" in error_line(train_gpt, capsys, *longer, "--start", str(first / "loss.png"))
    assert "cannot be read: No such file" in error_line(train_gpt, capsys, *longer, "--start", str(first / "none"))


def test_a_run_from_another_keeps_its_text_and_context(train_gpt, capsys, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    for i in range(40):
        (words / f"{i}.py").write_text(f"x = {i}\n" * 200)
    assert train_gpt.main([*TINY, "--text", str(words), "--output", str(tmp_path / "first")]) == 0
    model = str(tmp_path / "first" / "model.npz")
    arguments = ["--preset", "cpu", "--steps", "2", "--sample", "12", "--start", model]
    assert train_gpt.main([*arguments, "--output", str(tmp_path / "second")]) == 0
    said = capsys.readouterr().out
    assert f"context 48, float32, on cpu, from {model}" in said and f"files of {words}" in said


def test_equal_seeds_give_equal_batches(train_gpt):
    from gpt import text

    words = np.arange(200, dtype=np.uint8)
    first, again, other = (
        next(text.batches(words, batch=2, context=16, seed=seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.all(np.diff(first) == 1)  # windows of consecutive bytes, targets one later


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "0"], "'0' is not a whole number from 1 up"),
        (["--seed", "-1"], "'-1' is not a whole number from 0 to 4294967295"),
        (["--seed", "4294967296"], "'4294967296' is not a whole number from 0 to 4294967295"),
        (["--learning-rate", "fast"], "'fast' is not a positive number"),
        (["--preset", "tpu"], "invalid choice: 'tpu'"),
        (["--head-dim", "31"], "--head-dim 31 is odd"),
        (["--head-dim", "258"], "head dimension 258"),
        (["--recipes", "sage9"], "recipe='sage9' is unknown"),
        (["--recipes", "sage2"], "sage2"),
        (["--recipes", "train8,train8"], "--recipes names train8 twice"),
        (["--output", "/dev/null/x"], "--output /dev/null/x cannot be made a folder"),
        (["--text", "/nowhere"], "/nowhere is not a folder"),
        (["--prompt", ""], "--prompt is empty"),
        (["--context", "1"], "--context 1 leaves a query nothing but itself"),
        (["--context", "4"], "--prompt has 4 bytes"),
        (["--context", "48", "--sample", "45"], "has room for 44 bytes after the prompt"),
        (["--dtype", "float16"], "--dtype float16 needs a GPU"),
        (["--implementation", "cuda"], "--implementation cuda does not run on JAX's default"),
        (["--exact", "cudnn"], "--exact cudnn needs a GPU and --dtype bfloat16 or float16"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_wrong_options_give_one_line(train_gpt, capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.setattr(train_gpt.jax, "default_backend", lambda: "cpu")  # also where a GPU is
    common = ["--preset", "cpu", "--output", str(tmp_path)]
    assert told in error_line(train_gpt, capsys, *common, *arguments)


def test_the_sample_fits_the_context_unless_told_otherwise(train_gpt):
    parser = train_gpt._parser()
    for context, length in ((48, 44), (512, 240)):
        options = parser.parse_args(["--preset", "cpu", "--context", str(context)])
        assert train_gpt._with_preset(parser, options).sample == length


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_any_number_of_steps_has_a_schedule(train_gpt, steps):
    from gpt import training

    optimizer = training._optimizer(steps, 1e-2)
    parameters = {"matrix": np.ones((2, 2), np.float32)}
    state = optimizer.init(parameters)
    for _ in range(steps):
        updates, state = optimizer.update(parameters, state, parameters)
        assert 0 < np.abs(updates["matrix"]).max() <= 1.2e-2


def test_a_folder_with_too_little_text_is_refused(train_gpt, capsys, tmp_path):
    (tmp_path / "short.py").write_text("x = 1\n")
    line = error_line(
        train_gpt, capsys, "--preset", "cpu", "--text", str(tmp_path), "--output", str(tmp_path)
    )
    assert "needs 4096 of each" in line


def test_no_file_is_on_both_sides_of_the_split(train_gpt, tmp_path):
    from gpt import text

    for number in range(60):
        (tmp_path / f"module_{number}.py").write_text(f"x = {number:04d}\n" * 20)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text("y = 1\n" * 100)
    corpus = text.load(tmp_path, 4)
    assert corpus.files == 60
    sides = [
        {line for line in side.tobytes().splitlines() if line}
        for side in (corpus.train, corpus.held_out)
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60


def test_help_explains_every_option(train_gpt, capsys):
    with pytest.raises(SystemExit):
        train_gpt.main(["--help"])
    said = capsys.readouterr().out
    for action in train_gpt._parser()._actions:
        assert action.option_strings[-1] in said and action.help
