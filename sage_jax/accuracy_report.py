"""What `sage_jax.accuracy.compare` returns: errors by recipe and tensor as table, dict, plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

TENSORS = ("o", "lse", "dq", "dk", "dv")
TITLES = {"o": "O", "lse": "LSE", "dq": "dQ", "dk": "dK", "dv": "dV"}


@dataclasses.dataclass(frozen=True)
class Error:
    """How far one tensor of one recipe is from the exact one.

    Attributes:
      rel_l2: ‖x − exact‖₂ / ‖exact‖₂ over all entries; NaN when either side has a NaN.
      cos: cosine of the angle between the two.
      heads_rel_l2, heads_cos: the same of each head, [B, N] (of dK and dV: [B, K]), or None when
        the comparison did not keep them.
    """

    rel_l2: float
    cos: float
    heads_rel_l2: np.ndarray | None = None
    heads_cos: np.ndarray | None = None

    @classmethod
    def from_sums(cls, sums: np.ndarray, per_head: bool) -> Error:
        """From float64 [B, heads, 4]: the sums of (x − y)², x·y, x² and y² of each head."""
        rel_l2, cos = _ratios(sums.sum(axis=(0, 1)))
        heads = _ratios(sums) if per_head else (None, None)
        return cls(float(rel_l2), float(cos), *heads)


def _ratios(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(relative L2, cosine) from [..., 4] sums; two zero tensors agree: (0, 1)."""
    difference, product, x2, y2 = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rel_l2 = np.where(difference == 0, 0.0, np.sqrt(difference / y2))
        cos = np.where(difference == 0, 1.0, product / np.sqrt(x2 * y2))
    return rel_l2, cos


@dataclasses.dataclass(frozen=True)
class Report:
    """Errors of several recipes on the same inputs. Printing it gives the tables.

    Attributes:
      title: one line on the inputs.
      errors: label of the recipe -> tensor ("o", "lse", "dq", "dk", "dv") -> `Error`. A recipe
        without a backward pass has no gradients here.
      skipped: label -> why this preset was not run.
    """

    title: str
    errors: dict[str, dict[str, Error]]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def best(self, *tensors: str) -> str:
        """The recipe whose largest relative L2 error over `tensors` is the smallest.

        Args:
          *tensors: of "o", "lse", "dq", "dk", "dv"; by default all but "lse". Only recipes that
            have all of them take part, so naming none means: the best recipe for training, or for
            inference if the comparison was made without gradients.

        Raises:
          ValueError: an unknown tensor, or no recipe that has them all without NaN.
        """
        unknown = [t for t in tensors if t not in TENSORS]
        if unknown:
            raise ValueError(
                f"best() was asked for the tensor {unknown[0]!r}; choose from {', '.join(TENSORS)}."
            )
        if not tensors:
            tensors = tuple(t for t in self._measured() if t != "lse")
        worst = {
            label: max(errors[t].rel_l2 for t in tensors)
            for label, errors in self.errors.items()
            if all(t in errors and errors[t].rel_l2 >= 0 for t in tensors)
        }
        if not worst:
            raise ValueError(
                f"no recipe of this comparison has a finite error of {', '.join(tensors)}; the "
                f"recipes are {', '.join(self.errors)}."
            )
        return min(worst, key=worst.get)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and floats, ready for `json.dump`."""

        def plain(error: Error) -> dict[str, Any]:
            fields = dataclasses.asdict(error)
            return {
                key: x.tolist() if isinstance(x, np.ndarray) else x
                for key, x in fields.items()
                if x is not None
            }

        return {
            "title": self.title,
            "errors": {
                label: {tensor: plain(error) for tensor, error in errors.items()}
                for label, errors in self.errors.items()
            },
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        heads = [e.heads_rel_l2 for errors in self.errors.values() for e in errors.values()]
        worst = any(x is not None and x.size > 1 for x in heads)
        note = ", in brackets that of the worst head" if worst else ""

        def cells(pick):
            rows = self.errors.values()
            return [[_cell(row.get(tensor), pick) for tensor in self._measured()] for row in rows]

        lines = [self.title, "", f"relative L2 error{note}"]
        lines += self._table(cells(lambda e: (e.rel_l2, e.heads_rel_l2)))
        lines += ["", f"1 − cosine{note}"]
        lines += self._table(cells(lambda e: (1 - e.cos, _one_minus(e.heads_cos))))
        lines += [f"not run: {label}: {reason}" for label, reason in self.skipped.items()]
        return "\n".join(lines)

    def plot(self, path: str | None = None):
        """Bars of the relative L2 errors, a dot for each head; needs matplotlib.

        Args:
          path: where to save the figure (the suffix chooses the format); None does not save.

        Returns:
          The matplotlib `Figure`.

        Raises:
          ImportError: without matplotlib, saying how to install it.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as missing:
            raise ImportError(
                "Report.plot() draws with matplotlib, which is not installed; run `pip install "
                "matplotlib`, or use print(report) or report.to_dict() instead."
            ) from missing
        tensors = self._measured()
        figure = Figure(figsize=(2 + 1.6 * len(tensors), 4), layout="constrained")
        FigureCanvasAgg(figure)  # no window, no global state: works on machines without a display
        axes = figure.add_subplot()
        width = 0.8 / max(len(self.errors), 1)
        for index, (label, errors) in enumerate(self.errors.items()):
            shown = [i for i, t in enumerate(tensors) if t in errors]
            x = np.array(shown) + (index - (len(self.errors) - 1) / 2) * width
            axes.bar(x, [errors[tensors[i]].rel_l2 for i in shown], width * 0.9, label=label)
            for position, i in zip(x, shown, strict=True):
                heads = errors[tensors[i]].heads_rel_l2
                if heads is not None:
                    axes.plot(np.full(heads.size, position), heads.ravel(), "k.", markersize=3)
        axes.set_xticks(range(len(tensors)), [TITLES[t] for t in tensors])
        axes.set_ylabel("relative L2 error")
        axes.set_title(self.title, fontsize="small")
        axes.legend(fontsize="small")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _measured(self) -> list[str]:
        """The tensors that some recipe has, in order."""
        return [t for t in TENSORS if any(t in errors for errors in self.errors.values())]

    def _table(self, cells: list[list[str]]) -> list[str]:
        header = ["recipe"] + [TITLES[t] for t in self._measured()]
        rows = [[label, *row] for label, row in zip(self.errors, cells, strict=True)]
        return format_table(header, rows)


def format_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others])

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def _one_minus(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else 1 - x


def _cell(error: Error | None, pick: Callable[[Error], tuple[float, np.ndarray | None]]) -> str:
    """The overall figure and that of the worst head, "–" for a tensor that was not measured."""
    if error is None:
        return "–"
    total, heads = pick(error)
    if heads is None or heads.size < 2:
        return _number(total)
    return f"{_number(total)} ({_number(np.max(heads))})"


def _number(x: float) -> str:
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"
