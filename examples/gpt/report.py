"""The table, the picture and the numbers of a comparison."""

import itertools
import json
import pathlib

from gpt.training import Run

_EXACT, _OTHERS = "#c4c4c4", ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#5b8c2a", "#8d5b4c")


def table(runs: list[Run]) -> str:
    """One row a run; each difference is that of the loss before it to the first, exact run's."""
    exact = runs[0]
    rows = [
        ("attention", "train loss", "difference", "held-out loss", "difference", "tokens/s",
         "step memory", "worst gradient error of step 1")
    ]  # fmt: skip
    for run in runs:
        train, held_out, gradient = "", "", ""
        if run is not exact:
            train = f"{run.final_train_loss - exact.final_train_loss:+.4f}"
            held_out = f"{run.final_held_out_loss - exact.final_held_out_loss:+.4f}"
            name, error = _worst(run, exact)
            gradient = f"{error:.4f} ({name})"
        memory = f"{run.memory / 2**20:,.0f} MiB" if run.memory else "not reported"
        rows.append(
            (run.name, f"{run.final_train_loss:.4f}", train, f"{run.final_held_out_loss:.4f}",
             held_out, f"{run.tokens_per_second:,.0f}", memory, gradient)
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: pathlib.Path, runs: list[Run], facts: dict, sample: str) -> None:
    """Everything measured, plus `facts` about the model, the data and the machine."""
    exact = runs[0]
    measured = {
        run.name: {
            "train_loss": run.train_loss,
            "held_out_loss": run.held_out_loss,
            "final_train_loss": run.final_train_loss,
            "final_held_out_loss": run.final_held_out_loss,
            "tokens_per_second": run.tokens_per_second,
            "step_memory_bytes": run.memory,
            "gradient_error_of_step_1": None if run is exact else run.gradient_errors(exact),
        }
        for run in runs
    }
    path.write_text(json.dumps({**facts, "runs": measured, "sample": sample}, indent=1) + "\n")


def plot(path: pathlib.Path, runs: list[Run], title: str) -> None:
    """Both loss curves on the left; on the right how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, apart) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    exact = runs[0]
    for run, color in zip(runs, itertools.chain([_EXACT], itertools.cycle(_OTHERS)), strict=False):
        steps = range(1, len(run.train_loss) + 1)
        wide = 3 if run is exact else 1  # the others lie on top of it
        losses.plot(steps, run.train_loss, color=color, linewidth=wide, label=run.name)
        losses.plot(*zip(*run.held_out_loss, strict=True), "o", color=color, markersize=3 + wide)
        if run is not exact:
            gaps = [a - b for a, b in zip(run.train_loss, exact.train_loss, strict=True)]
            apart.plot(steps, gaps, color=color, linewidth=1, label=f"{run.name} - exact")
    losses.set(
        xlabel="step", ylabel="nats per byte", title=f"{title}\nlines: train, dots: held out"
    )
    apart.axhline(0, color="black", linewidth=0.8)
    apart.set(xlabel="step", ylabel="nats per byte", title="difference of train losses, same batch")
    for axes in (losses, apart):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _worst(run: Run, exact: Run) -> tuple[str, float]:
    errors = run.gradient_errors(exact)
    return max(errors.items(), key=lambda item: item[1])
