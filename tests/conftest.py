"""Eight virtual CPU devices and quick compilation for every test, and tests marked `gpu` only where there is a GPU."""

import os

FLAGS = {  # read by XLA when JAX starts its backend
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",  # the many small programs take longest to compile
    "--xla_gpu_autotune_level": "0",  # XLA's own products on a GPU are only compared with
}
given = os.environ.get("XLA_FLAGS", "")
wanted = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *wanted]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from instruction_sets import isa  # noqa: E402, F401  (a fixture)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU (run with -m gpu)")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    try:
        jax.devices("cuda")
    except RuntimeError:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="JAX sees no NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_let_go():
    """Each keeps pieces of memory mapped, and a process may have 65530: XLA crashes where it gets no more."""
    yield
    jax.clear_caches()
