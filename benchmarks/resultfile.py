"""Results files: writing them, printing their tables, going on from an earlier one."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from sage_jax.accuracy_report import format_table


def earlier(path: pathlib.Path, head: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The results that `attention.py` goes on from: those in the file if they are of the same code and machine."""
    empty = {**head, "tests": {"passed": 0, "failed": 0, "skipped": 0}, "speed": [], "accuracy": []}
    if fresh or not path.exists():
        return empty
    found = json.loads(path.read_text())
    same = ("gpu", "driver", "cuda", "jax", "tree")
    if any(found.get(field) != head[field] for field in same):
        print(f"{path} was measured on other code or another machine; starting afresh")
        return empty
    return {**found, "date": head["date"]}


def store(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the file in one step: a run that is killed leaves the last complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(_compact(results))
    os.replace(scratch, path)


def _compact(results: dict[str, Any]) -> str:
    """JSON with one line a row, so that a diff shows which figures changed."""
    parts = []
    for field, value in results.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            rows = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in value)
            text = f"[\n{rows}\n  ]"
        parts.append(f"  {json.dumps(field)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def speed_table(results: dict[str, Any]) -> str:
    """The speed rows with their ratio to a reference: cuDNN bf16, or XLA where that is missing."""
    rows = results["speed"]
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        where = tuple(row[f] for f in ("head_dim", "pass", "seq", "causal", "batch", "heads"))
        lines.setdefault(where, []).append(row)
    base = "cudnn_bf16" if any(row["impl"] == "cudnn_bf16" for row in rows) else "xla"
    fields = ["pass", "head dim", "seq", "batch", "causal", "ms", "TFLOPS"]
    header = ["implementation", *fields, f"× {base}"]
    cells = []
    for group in lines.values():
        reference = [row["ms"] for row in group if row["impl"] == base]
        for row in sorted(group, key=lambda row: row["ms"]):
            cells.append(
                [
                    " ".join(filter(None, (row["impl"], row["recipe"]))),
                    row["pass"],
                    str(row["head_dim"]),
                    str(row["seq"]),
                    str(row["batch"]),
                    "yes" if row["causal"] else "no",
                    f"{row['ms']:.3f}",
                    f"{row['tflops']:.1f}" if row["tflops"] else "–",
                    f"{reference[0] / row['ms']:.2f}" if reference else "–",
                ]
            )
    return "\n".join(format_table(header, cells))


def accuracy_table(results: dict[str, Any]) -> str:
    """Relative L2 errors: a line for each implementation and data set."""
    tensors = ("o", "dq", "dk", "dv")
    lines: dict[tuple, dict[str, float | None]] = {}
    for row in results["accuracy"]:
        name = " ".join(filter(None, (row["impl"], row["recipe"])))
        where = (name, row["data"], str(row["head_dim"]), str(row["seq"]))
        lines.setdefault(where, {})[row["tensor"]] = row["rel_l2"]
    header = ["implementation", "data", "head dim", "seq", *tensors]
    cells = [
        [*where, *(_error(errors.get(t, "–")) for t in tensors)] for where, errors in lines.items()
    ]
    return "\n".join(format_table(header, cells))


def _error(x: float | str | None) -> str:
    return x if isinstance(x, str) else "NaN" if x is None else f"{x:.4f}"
