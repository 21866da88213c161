"""Prints what `make` installs into its virtual environment, one requirement a line.

The package's own dependencies and extras come from pyproject.toml. Where a driver is visible, JAX's
CUDA plugin of the driver's generation is added, and nvcc where the machine has none.
"""

import pathlib
import re
import shutil
import subprocess
import tomllib

# What pip would otherwise fetch into a build environment of its own, at every build.
BUILD_TOOLS = ["scikit-build-core>=0.10", "nanobind>=2.2", "cmake>=3.24", "ninja"]
NVCC = ["nvidia-cuda-nvcc==13.0.*", "nvidia-cuda-cccl==13.0.*", "nvidia-cuda-runtime==13.0.*"]


def main() -> None:
    root = pathlib.Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["examples"], *extras["test"]}
    print("\n".join(sorted(wanted) + BUILD_TOOLS + cuda(driver_generation())))


def cuda(generation: int | None) -> list[str]:
    """The CUDA packages for a driver of CUDA `generation` (13, 12, or None without a driver)."""
    if generation is None:
        return []
    plugin = [f"jax[cuda{min(generation, 13)}]"]
    # A kernel built by nvcc 13 does not run under a driver of CUDA 12, so no nvcc is added there.
    return plugin if generation < 13 or shutil.which("nvcc") else plugin + NVCC


def driver_generation() -> int | None:
    """Major version of the newest CUDA that the visible driver can run."""
    if shutil.which("nvidia-smi") is None:
        return None
    said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"CUDA Version: (\d+)", said)
    return int(found[1]) if found else None


if __name__ == "__main__":
    main()
