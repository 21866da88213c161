"""Writes README.md's table of speeds on an H200 from benchmarks/results/nvidia-h200.json.

python tools/speed_table.py    rewrites the block between the two markers of README.md
"""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks/results/nvidia-h200.json"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
BACKWARD_ONLY = ("train8:delta=exact",)  # whose forward pass is another recipe's
PASSES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "both"}
COLUMNS = {  # heading: (implementation, recipe)
    "`train8`": ("sage_jax", "train8"),
    "`train8:delta=exact`": ("sage_jax", "train8:delta=exact"),
    "`sage2`": ("sage_jax", "sage2"),
    "cuDNN bf16": ("cudnn_bf16", None),
    "cuDNN FP8, casts included": ("cudnn_fp8", None),
    "cuDNN FP8, operands given": ("cudnn_fp8_ready", None),
    "`sagebwd`": ("sage_jax", "sagebwd"),
}


def table() -> str:
    """TFLOPS without a mask / causal, a row for each pass, head dimension and length."""
    speed = {}
    for row in json.loads(RESULTS.read_text())["speed"]:
        column = row["impl"], row.get("recipe")
        if row["pass"] == "fwd" and column[1] in BACKWARD_ONLY:
            continue
        speed[row["pass"], row["head_dim"], row["seq"], row["causal"], *column] = row.get("tflops")
    sizes = sorted({key[1:3] for key in speed if key[0] in PASSES}, key=lambda size: (-size[0], -size[1]))
    lines = [
        "| pass | head dim | length | " + " | ".join(COLUMNS) + " |",
        "| --- " * (3 + len(COLUMNS)) + "|",
    ]
    for code, name in PASSES.items():
        for size in sizes:
            cells = [_cell([speed.get((code, *size, causal, *c)) for causal in (False, True)]) for c in COLUMNS.values()]
            lines.append(" | ".join([f"| {name}", *map(str, size), *cells]) + " |")
    return "\n".join(lines)


def spliced(text: str) -> str:
    """README text with the block between the markers made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def _cell(rates):
    return "–" if None in rates else " / ".join(f"{rate:.0f}" for rate in rates)


if __name__ == "__main__":
    README.write_text(spliced(README.read_text()))
