"""Which recipe each layer bears: errors next to exact attention, the choice, tables, a picture."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import jax
import numpy as np
import optax
from flax import nnx

from gpt.model import GPT
from gpt.tensors import Tensors
from sage_jax import accuracy, supports
from sage_jax.accuracy_report import format_table
from sage_jax.flax import attention_fn
from sage_jax.recipe import EXACT, Recipe

_COLORS = ("#d1495b", "#edae49", "#00798c", "#6a4c93")


@dataclasses.dataclass(frozen=True)
class Layer:
    """Errors of the output of one layer by recipe, and the first recipe within the tolerance."""

    errors: dict[str, accuracy.Error]
    choice: str  # label of a recipe, or "exact"

    @classmethod
    def measured(
        cls,
        name: str,
        tensors: Tensors,
        recipes: dict[str, Recipe],
        tolerance: float,
        is_causal: bool,
    ) -> "Layer":
        """`recipes`: label -> recipe, the cheapest first.

        Raises:
          ValueError: a recipe cannot run on these tensors.
        """
        for recipe in recipes.values():
            refusal = supports(*tensors, is_causal=is_causal, recipe=recipe)
            if refusal:
                raise ValueError(f"{name}: {refusal}")
        report = accuracy.compare(
            *tensors, recipes=recipes, gradients=False, is_causal=is_causal
        )  # fmt: skip
        errors = {label: report.errors[label]["o"] for label in recipes}
        within = (label for label, error in errors.items() if error.rel_l2 <= tolerance)
        return cls(errors, next(within, EXACT))


@dataclasses.dataclass(frozen=True)
class Loss:
    """Cross entropy of a model in nats per byte, of each sequence."""

    of_sequences: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.of_sequences.mean())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.mean))

    def above(self, other: "Loss") -> tuple[float, float]:
        """Mean difference over the same sequences, and its standard error (NaN for one)."""
        apart = self.of_sequences - other.of_sequences
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(((apart - apart.mean()) ** 2).sum() / (apart.size - 1) / apart.size)
        return float(apart.mean()), float(spread)


def loss(model: GPT, recipes: list[Recipe | str], batches: Iterable[np.ndarray]) -> Loss:
    """`recipes`: one a layer, or "exact". batches: int32 [B,T+1], inputs and targets."""
    graph, state = nnx.split(model)
    attends = [attention_fn(recipe, is_causal=True) for recipe in recipes]

    @jax.jit
    def of_batch(state, tokens):
        logits = nnx.merge(graph, state)(tokens[:, :-1], attends)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(axis=1)

    return Loss(np.concatenate([np.asarray(of_batch(state, x), np.float64) for x in batches]))


def table(layers: dict[str, Layer]) -> str:
    """A row for each layer, two numbers for each recipe, and the choice."""
    labels = list(next(iter(layers.values())).errors)
    rows = [
        [name, *(f"{e.rel_l2:.4f}  {e.cos:.5f}" for e in layer.errors.values()), layer.choice]
        for name, layer in layers.items()
    ]
    return "\n".join(format_table(["layer", *labels, "choice"], rows))


def loss_table(losses: dict[str, Loss]) -> str:
    """A row for each way to run the model; differences are those to the first, exact one."""
    exact = next(iter(losses.values()))
    rows = []
    for label, measured in losses.items():
        difference = "" if measured is exact else "{:+.5f} ± {:.5f}".format(*measured.above(exact))
        rows.append([label, f"{measured.mean:.5f}", f"{measured.perplexity:.4f}", difference])
    header = ["attention", "loss, nats per byte", "perplexity", "loss above exact ± standard error"]
    return "\n".join(format_table(header, rows))


def facts(layers: dict[str, Layer], losses: dict[str, Loss]) -> dict:
    """Everything measured, as plain numbers; what is not finite becomes None."""

    def plain(x: float) -> float | None:
        return x if np.isfinite(x) else None

    exact = next(iter(losses.values()), None)
    return {
        "errors": {
            name: {
                label: {"relative_l2": plain(e.rel_l2), "cosine": plain(e.cos)}
                for label, e in layer.errors.items()
            }
            for name, layer in layers.items()
        },
        "losses": {
            label: {
                "nats_per_byte": plain(measured.mean),
                "perplexity": plain(measured.perplexity),
                "above_exact": plain(measured.above(exact)[0]),
                "standard_error": plain(measured.above(exact)[1]),
            }
            for label, measured in losses.items()
        },
    }


def plot(
    path: pathlib.Path, layers: dict[str, Layer], losses: dict[str, Loss], tolerance: float
) -> None:
    """Errors of each layer, filled where chosen; beside it what each way to run the model costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, panels = max(5.0, 1.5 + 0.9 * len(layers)), 2 if losses else 1
    figure, axes = pyplot.subplots(
        1, panels, figsize=(width + 4.5 * (panels - 1), 4.2), squeeze=False, layout="constrained",
        width_ratios=[width, 4.5][:panels],
    )  # fmt: skip
    errors = axes[0, 0]
    labels = list(next(iter(layers.values())).errors)
    for label, color in zip(labels, itertools.cycle(_COLORS)):
        heights = [layer.errors[label].rel_l2 for layer in layers.values()]
        fills = [color if layer.choice == label else "white" for layer in layers.values()]
        errors.scatter(range(len(layers)), heights, 60, fills, edgecolors=color, linewidths=1.8)
        errors.plot([], [], "o", color=color, label=label)
    errors.axhline(tolerance, color="black", linewidth=0.8, linestyle="--", label="tolerance")
    errors.set_yscale("log")
    errors.set_xticks(range(len(layers)), list(layers), rotation=90 if len(layers) > 8 else 0)
    errors.margins(x=0.15 if len(layers) < 8 else 0.05)
    errors.set(ylabel="relative L2 error of the output", title="filled: the layer's choice")
    figure.legend(loc="outside lower left", ncols=5, frameon=False, fontsize="small")
    if losses:
        exact, *others = losses.values()
        apart, spread = zip(*(measured.above(exact) for measured in others), strict=True)
        axes[0, 1].errorbar(range(len(others)), apart, spread, fmt="ko", markersize=4, capsize=3)
        axes[0, 1].axhline(0, color="black", linewidth=0.8)
        axes[0, 1].set_xticks(range(len(others)), list(losses)[1:], rotation=20, ha="right")
        axes[0, 1].set(title="held-out loss above exact attention's", ylabel="nats per byte")
        axes[0, 1].margins(x=0.15)
    for one in axes.ravel():
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
