"""Eight fake devices, strict shapes, full-precision products.

Most of a test's time is the compiler's, so that programs are compiled with few
optimizations, in the processes that tests start too. What a test says of the
optimized program takes `optimized`.

XLA's newer emitters of CPU code take four times as long to compile as those
before them, from the same operations: where there is a choice, before jaxlib
0.11, they are off.
"""

import os
from importlib import metadata

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  flags = os.environ.get("XLA_FLAGS", "")  # one that is unknown is fatal
  os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """A process that keeps thousands of them runs out of memory maps."""
  yield
  jax.clear_caches()


@pytest.fixture
def optimized():
  """Programs with all optimizations."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
