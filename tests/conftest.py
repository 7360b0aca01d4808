"""What every test stands on: the installed package, eight CPU devices, strict promotion.

Two environment variables change that:
  JAX_FLASH2_TEST_SOURCE=1  tests the source tree instead of the installed package.
  JAX_FLASH2_TEST_GPU=1     runs tests/gpu on this machine's GPU, and nothing on the CPU.
"""

import os
import pathlib
import sys

import hypothesis
import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = os.environ.get("JAX_FLASH2_TEST_SOURCE") == "1"
GPU = os.environ.get("JAX_FLASH2_TEST_GPU") == "1"

# `python -m pytest` puts the root first on the path, where the source tree would win.
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
if SOURCE:
    sys.path.insert(0, str(ROOT))

# A GPU machine has tests of its own; the rest is written for eight CPU devices.
collect_ignore = [] if GPU else ["gpu"]

if GPU:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
else:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

# One example may compile for seconds, so there is no deadline. Every run draws the same
# examples; `--hypothesis-profile=explore` draws new ones, and more of them.
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=30, derandomize=True, database=None
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=300)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    import jax_flash2

    folder = pathlib.Path(jax_flash2.__file__).resolve().parent
    if (folder.parent == ROOT) != SOURCE:
        raise pytest.UsageError(
            f"the tests are for the installed jax_flash2, but {folder} was imported; run "
            "`pip install .`, or set JAX_FLASH2_TEST_SOURCE=1 to test the source tree"
        )


@pytest.fixture(scope="module")
def quickly_compiled():
    """For a module of many small programs: `pytest.mark.usefixtures` asks for it."""
    from cases import quick_compilation

    with quick_compilation():
        yield
