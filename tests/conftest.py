"""Eight fake devices, strict shapes, full-precision products."""

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
