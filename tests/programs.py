"""What compiled programs call."""

import collections
import re


def native_calls(text: str) -> dict[str, int]:
    """How often a program, in XLA's text of it, calls each native operation (docs/abi.md), by its name."""
    called = re.findall(r'custom_call_target="sage_jax_(\w+)"', text)
    return dict(sorted(collections.Counter(called).items()))
