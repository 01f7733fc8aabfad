"""Properties that every method has, from one table of runs."""

import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conformance import METHODS, ORDER, PAIRWISE, N, Q, Variation

from tda import gradients, meshes, streams
from tda.attribution import baselines, products
from tda.curvature import kronecker
from tda.streams import Loop

# Rounding of float32 in sums of a few hundred terms, times the condition of
# the damped inverses: the largest eigenvalue over the damping is below 100.
SAME = 1e-5
STATISTICS = {
  "moments": kronecker.MOMENTS,
  "squares": kronecker.SQUARES,
  "products": products.DOT_AND_SQUARE,
  "self": products.SELF,
  "inputs": baselines.INPUTS,
}
SMALL = Variation(loop=Loop(4), query_batch=2)


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
  """Runs of the same shapes share what they compile."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in zip(options, (None, 1.0, 0), strict=True):
    jax.config.update(name, value)


run = functools.cache(conformance.run)


def assert_close(found, expected, tolerance=SAME):
  assert found.dtype == np.float32
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
def test_shape_and_finite(method):
  found = run(Variation())[method]
  assert found.shape == ((N, Q) if method in PAIRWISE else (N,))
  assert np.isfinite(found).all() and found.std() > 0


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_examples_and_of_queries(method):
  assert_close(run(SMALL)[method], run(Variation())[method])


@pytest.mark.parametrize("method", METHODS)
def test_microbatches(method):
  """Of 3 rows in batches of 6, so that the last is filled up."""
  found = run(Variation(loop=Loop(6, microbatch=3)))[method]
  assert_close(found, run(Variation())[method])


def test_microbatches_on_devices():
  loop = Loop(8, mesh=meshes.mesh(4, 1), microbatch=4)
  chosen = ("ekfac",)
  found = run(Variation(methods=chosen, loop=loop))["ekfac"]
  assert_close(found, run(Variation())["ekfac"])
  with pytest.raises(ValueError, match="multiple of 4"):
    run(Variation(methods=chosen, loop=loop._replace(microbatch=6)))


@pytest.mark.parametrize("method", METHODS)
def test_permutation(method):
  """Scores move with their examples and queries; a draw stays in its place."""
  found = run(SMALL._replace(shuffled=True))[method]
  rows, columns = ORDER
  expected = run(Variation())[method]
  if method != "random":
    expected = expected[rows]
    expected = expected[:, columns] if method in PAIRWISE else expected
  assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 1), (4, 2)])
def test_devices(shape, method):
  """Rows over the data axis, parameters over the model axis."""
  loop = Loop(4, mesh=meshes.mesh(*shape))
  assert_close(run(Variation(loop=loop))[method], run(Variation())[method])


def test_drawn_labels_on_devices():
  """Draws belong to examples, whatever the batch and the mesh."""
  plain = Variation(methods=("diagonal",), labels="sampled:2")
  spread = plain._replace(loop=Loop(4, mesh=meshes.mesh(4, 2)))
  assert_close(run(spread)["diagonal"], run(plain)["diagonal"])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_without_jit(statistic):
  """What every method does to a batch; only `streams` compiles it."""
  p = oracles.problem("linear", n=3)
  batch = streams.Batch(p.data, np.arange(3), np.array([1, 1, 0]))
  one = gradients.backward_pass(p.found, p.objective, STATISTICS[statistic])
  operands = None
  if statistic == "products":
    operands = {"out/w": jnp.ones((2, 1, 3, 5))}
  found, finite = one(p.params, batch, operands)
  expected, _ = jax.jit(one)(p.params, batch, operands)
  assert finite.all()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
  """Half precision costs what its rounding costs, and scores stay float32.

  Rounding parameters and inputs at random in float32 says how much one
  rounding of each moves the scores. bfloat16 rounds, beside these two, four
  activations and the gradients of each: ten, where the reference has two, so
  that the error is √5 times as large; twice that bounds its spread.
  """
  exact = run(Variation())[method]
  error = np.std(run(Variation(dtype=jnp.bfloat16))[method] - exact)
  rounded = [
    np.std(run(Variation(noise=2.0**-8, seed=seed))[method] - exact)
    for seed in range(3)
  ]
  assert error <= 2 * np.sqrt(5) * max(rounded)
  assert method == "random" or error > 0
  assert run(Variation(dtype=jnp.bfloat16))[method].dtype == np.float32


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
  """A run that is stopped in three of its passes, and its batches."""
  stops, handed, spread = [3, 14, 22], [], meshes.spread
  variation = Variation(
    loop=Loop(4, directory=str(tmp_path_factory.mktemp("run")), save_every=0)
  )

  def stopping(batch, over):
    handed.append(batch)
    if stops and len(handed) == stops[0]:
      stops.pop(0)
      raise KeyboardInterrupt
    return spread(batch, over)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(meshes, "spread", stopping)
    interruptions = 0
    while True:
      try:
        return conformance.run(variation), len(handed), interruptions
      except KeyboardInterrupt:
        interruptions += 1


@pytest.mark.parametrize("method", METHODS)
def test_resume(resumed, method):
  assert_close(resumed[0][method], run(Variation())[method])


def test_resuming_repeats_only_what_was_not_saved(resumed):
  _, handed, interruptions = resumed
  batches = 4 * 9 + 2  # four of the training data in each pass, two of queries
  assert interruptions == 3
  assert handed <= batches + 2 * interruptions
