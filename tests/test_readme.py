"""What README.md and docs/ claim and code can check: examples, tables, links."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT, load

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def test_the_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    q, out, grads = names["q"], names["out"], names["grads"]
    assert out.shape == q.shape == grads.shape and out.dtype == jnp.bfloat16
    assert np.all(np.isfinite(np.asarray(grads, np.float32))) and jnp.any(grads != 0)
    x = jnp.ones((1, 16, 512))
    assert names["layer"](x).shape == x.shape


@pytest.mark.parametrize("name", ["support_table", "speed_table"])
def test_the_tables_are_current(name):
    assert load(f"tools/{name}.py").spliced(README) == README, f"run python tools/{name}.py"
    assert "| `train8` |" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    folders = "docs|tools|tests|examples|benchmarks|cuda|cpu|sage_jax"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_both_commands_are_in_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in ("demo", "test"):
        assert f"make {command}" in README and command in targets
